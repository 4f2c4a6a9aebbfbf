"""What the smooth lDDT costs in blocks, and as its formula stands."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict

import torch

from megafold.bench import measure, memory
from megafold.bench.accuracy import relative_errors
from megafold.bench.records import Environment, Record, environment
from megafold.model.smooth_lddt import THRESHOLDS, smooth_lddt

DENSITY = 0.05  # heavy atoms in a cubic angstrom of a protein
RADIUS = 15.0  # angstrom


def plain_smooth_lddt(
    x: torch.Tensor, true: torch.Tensor, resolved: torch.Tensor, radius: torch.Tensor
) -> torch.Tensor:
    """Algorithm 27 as it is printed, with tensors over copies and pairs; arguments as the other."""
    true_distance = (true[:, None] - true).norm(dim=-1)
    difference = x[:, :, None] - x[:, None]
    error = ((difference.square().sum(-1) + 1e-10).sqrt() - true_distance).abs()
    score = sum(torch.sigmoid(threshold - error) for threshold in THRESHOLDS) / len(THRESHOLDS)
    near = (true_distance < radius[:, None]) & resolved[:, None] & resolved
    near = near & ~torch.eye(len(true), dtype=torch.bool, device=x.device)
    return 1.0 - (score * near).sum((1, 2)) / near.sum()


def smooth_lddt_costs(
    samples: int,
    atoms: int,
    device: torch.device | str,
    *,
    implementations: tuple[str, ...] = ("megafold", "eager"),
    seconds: float = 1.0,
) -> Iterator[Record]:
    """Time, peak memory and error with the gradient, float32, one record per implementation.

    The atoms fill a ball as densely as a protein and are in order along one axis, so that
    neighbours in the list are near in space, as along a chain. The error is that of the
    gradient against float64.
    """
    device = torch.device(device)
    generator = torch.Generator().manual_seed(0)
    size = (atoms / DENSITY) ** (1 / 3)
    true = size * torch.rand(atoms, 3, generator=generator, dtype=torch.float64)
    true = true[true[:, 0].argsort()]
    x = true + torch.randn(samples, atoms, 3, generator=generator, dtype=torch.float64)
    x, true = x.to(device, torch.float32), true.to(device, torch.float32)
    rest = (
        true,
        torch.ones(atoms, dtype=torch.bool, device=device),
        torch.full((atoms,), RADIUS, device=device),
    )
    exact = _gradient(smooth_lddt, x.double(), rest)
    around = environment(device)
    functions = {"megafold": smooth_lddt, "eager": plain_smooth_lddt}
    for name in implementations:
        yield _cost(name, functions[name], x, rest, exact, seconds, around)


def _cost(
    name: str,
    function: Callable[..., torch.Tensor],
    x: torch.Tensor,
    rest: tuple[torch.Tensor, ...],
    exact: torch.Tensor,
    seconds: float,
    around: Environment,
) -> Record:
    def call() -> torch.Tensor:
        return _gradient(function, x, rest)

    error, _ = relative_errors(call(), exact)
    timing = measure.time_call(call, x.device, seconds=seconds, min_repeats=2)
    return Record(
        op="smooth_lddt",
        shape=f"S{x.shape[0]} A{x.shape[1]}",
        dtype="float32",
        impl=name,
        direction="full",
        ms=timing.ms,
        ms_q1=timing.ms_q1,
        ms_q3=timing.ms_q3,
        peak_mb=memory.peak_bytes(call, x.device) / memory.MB,
        error=error,
        **asdict(around),
    )


def _gradient(function, x: torch.Tensor, rest: tuple[torch.Tensor, ...]) -> torch.Tensor:
    x = x.detach().requires_grad_()
    (gradient,) = torch.autograd.grad(function(x, *rest).sum(), x)
    return gradient

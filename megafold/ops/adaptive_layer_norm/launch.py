"""Adaptive LayerNorm on the host: the projections of the condition, and the launches.

The condition is projected by LayerNorm + Linear, for gate and shift at once, as often as there
are conditions; what is kept for the backward pass is statistics. That projects once more for
the gate, and writes the gradients of both projections side by side.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch

from megafold.ops.adaptive_layer_norm.kernels import gradient_kernel, modulate_kernel
from megafold.ops.launcher import Launcher, Layout, layout, on
from megafold.ops.layer_norm.launch import (
    WIDEST,
    as_rows,
    cdiv,
    fitted,
    multiprocessors,
    padded,
)
from megafold.ops.layer_norm_linear import launch as projection
from megafold.ops.tuning import Config, Found, lookup

MODULATE = "adaptive_layer_norm.modulate"
GRADIENT = "adaptive_layer_norm.gradient"
KERNELS = (MODULATE, GRADIENT)


class Problem(NamedTuple):
    """The sizes of one call; row m of a has the condition ``(m // inner) % conditions``."""

    rows: int
    conditions: int
    inner: int
    channels: int

    @property
    def sharing(self) -> int:
        """Rows that share one condition."""
        return self.rows // self.conditions if self.conditions else 0

    @classmethod
    def of(cls, a: torch.Tensor, s: torch.Tensor) -> Problem:
        """For an s that :func:`shared` returned."""
        rows, conditions = a.numel() // a.shape[-1], s.numel() // s.shape[-1]
        lead, own = a.shape[:-1], s.shape[:-1]
        inner = 1
        for size, of_s in zip(reversed(lead), reversed(own), strict=False):
            if of_s != 1 and of_s == size:
                break
            inner *= size
        # One condition for all of them, and no dimension to tell which way it is repeated.
        return cls(rows, conditions, 1 if conditions == 1 else inner, a.shape[-1])


def shared(a: torch.Tensor, s: torch.Tensor) -> torch.Tensor:
    """s as the kernels take it: repeated over leading and over trailing dimensions of a alone.

    Where a dimension between two of its own is repeated, it is written out.
    """
    lead = a.shape[:-1]
    own = (1,) * (len(lead) - s.dim() + 1) + tuple(s.shape[:-1])
    there = [i for i, size in enumerate(own) if size != 1]
    if not there:
        return s
    first, last = there[0], there[-1]
    between = [i for i in range(first, last) if own[i] == 1 and lead[i] != 1]
    if not between:
        return s
    shape = [lead[i] if first <= i <= last else own[i] for i in range(len(lead))]
    return s.expand(*shape, s.shape[-1])


def config_of(kernel: str, a: torch.Tensor, problem: Problem) -> Found:
    """The block sizes a kernel runs with for a problem, and where they are from."""
    sizes = (("C", min(padded(problem.channels), WIDEST)), ("M", problem.rows))
    return lookup(kernel, a.device, a.dtype, sizes)


def described(a: torch.Tensor, s: torch.Tensor, weight_gate: torch.Tensor) -> tuple[str, ...]:
    """What both passes of a call run, with block sizes and where those are from."""
    s = shared(a, s)
    problem = Problem.of(a, s)
    own = (f"{k}: {(f := config_of(k, a, problem)).config} ({f.source})" for k in KERNELS)
    both = weight_gate.new_empty((2 * weight_gate.shape[0], weight_gate.shape[1]))
    lines = projection.described(s, both)
    once = f"{problem.conditions} conditions projected once, each for {problem.sharing} rows of a"
    return (*own, f"{once}, by layer_norm_linear:", *(f"  {line}" for line in lines))


def forward(
    a: torch.Tensor,
    s: torch.Tensor,
    norm_weight_s: torch.Tensor | None,
    weight_gate: torch.Tensor,
    bias_gate: torch.Tensor | None,
    weight_shift: torch.Tensor,
    eps: float,
    dtype: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The output, contiguous, in ``dtype``; statistics fp32 ``[2, M]`` of a, ``[2, K]`` of s."""
    problem = Problem.of(a, s)
    weight, bias = _side_by_side(weight_gate, bias_gate, weight_shift)
    projected, stats_s = projection.forward(s, norm_weight_s, None, weight, bias, eps)
    out = torch.empty(a.shape, dtype=dtype, device=a.device)
    stats_a = torch.empty((2, problem.rows), dtype=torch.float32, device=a.device)
    if out.numel():
        launch_modulate(problem, as_rows(a), projected, out, stats_a, eps)
    return out, stats_a, stats_s


def backward(
    grad: torch.Tensor,
    a: torch.Tensor,
    s: torch.Tensor,
    norm_weight_s: torch.Tensor | None,
    weight_gate: torch.Tensor,
    bias_gate: torch.Tensor | None,
    weight_shift: torch.Tensor,
    stats_a: torch.Tensor,
    stats_s: torch.Tensor,
    eps: float,
    asked: Sequence[bool],
) -> list[torch.Tensor]:
    """The gradients asked for of a, s, norm_weight_s, weight_gate, bias_gate and weight_shift."""
    operands = (a, s, norm_weight_s, weight_gate, bias_gate, weight_shift)
    if not grad.numel():
        return [
            torch.zeros(t.shape, dtype=t.dtype, device=t.device)
            for t, one in zip(operands, asked, strict=True)
            if one
        ]
    problem, channels = Problem.of(a, s), a.shape[-1]
    for_a, for_s, for_norm, for_gate, for_bias, for_shift = asked
    for_weight = for_gate or for_shift
    gate, _ = projection.forward(s, norm_weight_s, None, weight_gate, bias_gate, eps)
    grad_a = torch.empty(a.shape, dtype=a.dtype, device=a.device) if for_a else None
    projected = launch_gradient(
        problem, as_rows(grad), as_rows(a), gate, stats_a, grad_a, any(asked[1:])
    )  # fmt: skip
    of_s = of_norm = of_gate = of_bias = of_shift = None
    if projected is not None:
        weight, bias = _side_by_side(weight_gate, bias_gate, weight_shift)
        wanted = (for_s, for_norm, False, for_weight, for_bias)
        found = iter(
            projection.backward(projected, s, norm_weight_s, None, weight, bias, stats_s, wanted)
        )
        of_s, of_norm, _, of_both, of_bias = (next(found) if one else None for one in wanted)
        # Copies: what a registered operator returns shares no memory.
        if for_weight:
            of_gate, of_shift = of_both[:channels].clone(), of_both[channels:].clone()
        if for_bias:
            of_bias = of_bias[:channels].clone()
    results = (grad_a, of_s, of_norm, of_gate, of_bias, of_shift)
    return [
        value.view(t.shape).to(t.dtype)
        for t, value, one in zip(operands, results, asked, strict=True)
        if one
    ]


def launch_modulate(problem, a, projected, out, stats, eps) -> Any:
    """Fill ``out`` and ``stats``; arguments as those of the kernel."""
    config = config_of(MODULATE, a, problem).config
    launcher = _modulate(
        modulate_kernel, config, problem, a.device, eps, layout(a), projected.dtype, out.dtype
    )
    with on(a.device):
        return launcher(a, projected, out, stats)


def launch_gradient(problem, grad, a, gate, stats, grad_a, for_projected) -> torch.Tensor | None:
    """Fill ``grad_a`` where it is not None; the gradient of the projections where asked for.

    Returns:
        ``[K, 2 C]`` in the dtype of ``gate``, or None.
    """
    config = config_of(GRADIENT, a, problem).config
    blocks = cdiv(problem.conditions, fitted(config, problem.channels)["ROWS"])
    wanted = cdiv(config.blocks["WAVES"] * multiprocessors(a.device), blocks)
    per_group = cdiv(problem.sharing, min(wanted, problem.sharing))
    groups = cdiv(problem.sharing, per_group)
    sums = None
    if for_projected:
        dtype = gate.dtype if groups == 1 else torch.float32
        shape = (groups, problem.conditions, 2 * problem.channels)
        sums = torch.empty(shape, dtype=dtype, device=a.device)
    launcher = _gradient(
        gradient_kernel, config, problem, blocks * groups, per_group, a.device,
        layout(grad), layout(a), gate.dtype, grad_a is not None,
        None if sums is None else sums.dtype,
    )  # fmt: skip
    with on(a.device):
        launcher(grad, a, gate, stats, grad_a, sums)
    if sums is None:
        return None
    return sums[0] if groups == 1 else sums.sum(dim=0).to(gate.dtype)


def _side_by_side(
    weight_gate: torch.Tensor, bias_gate: torch.Tensor | None, weight_shift: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Weight and bias of one linear layer that computes gate, then shift."""
    weight = torch.cat([weight_gate, weight_shift])
    if bias_gate is None:
        return weight, None
    return weight, torch.cat([bias_gate, torch.zeros_like(bias_gate)])


@lru_cache(maxsize=4096)
def _modulate(
    kernel: Any, config: Config, problem: Problem, device: torch.device, eps: float, a: Layout,
    projected: torch.dtype, out: torch.dtype,
) -> Launcher:  # fmt: skip
    constants = fitted(config, problem.channels)
    programs = cdiv(problem.rows, constants["ROWS"])
    return Launcher(kernel, programs, (a[0][0], eps, *problem), constants, config.options)


@lru_cache(maxsize=4096)
def _gradient(
    kernel: Any, config: Config, problem: Problem, programs: int, per_group: int,
    device: torch.device, grad: Layout, a: Layout, gate: torch.dtype, for_a: bool,
    sums: torch.dtype | None,
) -> Launcher:  # fmt: skip
    constants = fitted(config, problem.channels)
    numbers = (grad[0][0], a[0][0], *problem, problem.sharing, per_group)
    return Launcher(kernel, programs, numbers, constants, config.options)

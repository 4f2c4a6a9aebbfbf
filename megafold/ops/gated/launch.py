"""A gate on the host: block sizes, memory, and launches."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch

from megafold.ops.gated.function import dtype_of
from megafold.ops.gated.kernels import backward_kernel, forward_kernel
from megafold.ops.gated_linear.rows import Rows, as_rows
from megafold.ops.launcher import Launcher, Layout, layout, on
from megafold.ops.layer_norm import launch as by_rows
from megafold.ops.layer_norm.launch import WIDEST, padded
from megafold.ops.sizes import cdiv, multiprocessors, power_of_two
from megafold.ops.sums import add_sums
from megafold.ops.tuning import Config, Found, lookup

FORWARD = "gated.forward"
BACKWARD = "gated.backward"
KERNELS = (FORWARD, BACKWARD)

# Programs for each multiprocessor, below which rows that share a gate are shared out among several.
WAVES = 2


class Problem(NamedTuple):
    """The sizes of one call."""

    sharing: int  # rows of x that share a gate; all of them where none do
    conditions: int  # rows of a gate that is shared; else 1
    channels: int
    shared: bool

    @classmethod
    def of(cls, x: torch.Tensor, gate: torch.Tensor) -> Problem:
        """For a gate that has as many of x's last dimensions as it has any."""
        channels = x.shape[-1]
        rows, conditions = x.numel() // channels, gate.numel() // channels
        if rows == conditions:
            return cls(rows, 1, channels, False)
        return cls(rows // conditions, conditions, channels, True)


def config_of(kernel: str, x: torch.Tensor, problem: Problem) -> Found:
    """The block sizes a kernel runs with for a problem, and where they are from."""
    sizes = (
        ("C", min(padded(problem.channels), WIDEST)),
        ("M", problem.sharing * problem.conditions),
        ("S", problem.sharing if problem.shared else 1),
    )
    return lookup(kernel, x.device, 8 * x.dtype.itemsize, sizes)


def described(x: torch.Tensor, gate: torch.Tensor) -> tuple[str, ...]:
    """What both passes of a call run, with block sizes and where those are from."""
    problem = Problem.of(x, gate)
    found = {kernel: config_of(kernel, x, problem) for kernel in KERNELS}
    lines = tuple(f"{kernel}: {f.config} ({f.source})" for kernel, f in found.items())
    how = f"{problem.sharing} rows share a gate, whose gradient is added up in registers"
    return (*lines, *problem.shared * (how,))


def forward(x: torch.Tensor, gate: torch.Tensor, residual: torch.Tensor | None) -> torch.Tensor:
    """The output ``[..., C]``, contiguous; gate ``[..., C]`` as :meth:`Problem.of` takes it."""
    out = torch.empty(x.shape, dtype=dtype_of(x, residual), device=x.device)
    if out.numel():
        problem = Problem.of(x, gate)
        inner, rows = _rows(problem, x, gate, residual)
        tensors = (*(one.tensor for one in rows), out)
        launcher = _forward(
            forward_kernel, config_of(FORWARD, x, problem).config, problem, inner, _strides(rows),
            x.device, *(layout(t) for t in tensors),
        )  # fmt: skip
        with on(x.device):
            launcher(*tensors)
    return out


def backward(
    grad: torch.Tensor, x: torch.Tensor, gate: torch.Tensor, asked: Sequence[bool]
) -> list[torch.Tensor]:
    """The gradients asked for of x and gate, contiguous."""
    make = torch.empty if x.numel() else torch.zeros
    grad_x, grad_gate = found = [
        make(t.shape, dtype=t.dtype, device=t.device) if one else None
        for t, one in zip((x, gate), asked, strict=True)
    ]
    if x.numel():
        problem = Problem.of(x, gate)
        config = config_of(BACKWARD, x, problem).config
        groups, per_group = _groups(config, problem, x.device)
        sums = grad_gate
        if problem.shared and groups > 1 and grad_gate is not None:
            sums = torch.empty((groups, *gate.shape), dtype=torch.float32, device=x.device)
        inner, rows = _rows(problem, x, gate, grad)
        tensors = (*(one.tensor for one in rows), grad_x, sums)
        launcher = _backward(
            backward_kernel, config, problem, inner, _strides(rows), groups, per_group, x.device,
            *(layout(t) for t in tensors),
        )  # fmt: skip
        with on(x.device):
            launcher(*tensors)
        if sums is not grad_gate:
            add_sums(sums, grad_gate)
    return [gradient for gradient in found if gradient is not None]


def _rows(
    problem: Problem, x: torch.Tensor, gate: torch.Tensor, other: torch.Tensor | None
) -> tuple[int, tuple[Rows, ...]]:
    """J, and all three as the kernels read them, other as x is; copies where there is no view."""
    lead = x.shape[:-1]
    if not problem.shared:
        return as_rows(lead, x, gate.expand(x.shape), other)
    flat = by_rows.as_rows(gate)
    inner, (of_x, of_other) = as_rows(lead, x, other)
    return inner, (of_x, Rows(flat, 0, flat.stride(0)), of_other)


def _strides(rows: tuple[Rows, ...]) -> tuple[int, ...]:
    return tuple(stride for one in rows for stride in one[1:])


@lru_cache(maxsize=4096)
def _groups(config: Config, problem: Problem, device: torch.device) -> tuple[int, int]:
    """Groups of blocks of rows, each with programs of its own, and the blocks of one."""
    blocks = _fitted(config, problem)
    many = cdiv(problem.sharing, blocks["ROWS"])
    if not problem.shared:
        return many, 1
    wanted = cdiv(WAVES * multiprocessors(device), _tiles(problem, blocks))
    per_group = cdiv(many, min(many, wanted))
    return cdiv(many, per_group), per_group


@lru_cache(maxsize=4096)
def _forward(
    kernel: Any, config: Config, problem: Problem, inner: int, strides: tuple[int, ...],
    device: torch.device, *alike: Layout | None,
) -> Launcher:  # fmt: skip
    constants = _constants(config, problem)
    programs = _tiles(problem, constants) * cdiv(problem.sharing, constants["ROWS"])
    numbers = (*strides, inner, *problem[:3])
    return Launcher(kernel, programs, numbers, constants, config.options)


@lru_cache(maxsize=4096)
def _backward(
    kernel: Any, config: Config, problem: Problem, inner: int, strides: tuple[int, ...],
    groups: int, per_group: int, device: torch.device, *alike: Layout | None,
) -> Launcher:  # fmt: skip
    constants = _constants(config, problem)
    programs = _tiles(problem, constants) * groups
    numbers = (*strides, inner, *problem[:3], per_group)
    return Launcher(kernel, programs, numbers, constants, config.options)


def _constants(config: Config, problem: Problem) -> dict[str, Any]:
    blocks = _fitted(config, problem)
    even = problem.channels % blocks["BLOCK_C"] == 0
    return {"SHARED": problem.shared, "EVEN": even, **blocks}


def _tiles(problem: Problem, blocks: dict[str, Any]) -> int:
    """Programs for one block of rows that share a gate, of every gate."""
    return problem.conditions * cdiv(problem.channels, blocks["BLOCK_C"])


def _fitted(config: Config, problem: Problem) -> dict[str, int]:
    """The block sizes of a table, no larger than the problem."""
    most = {"ROWS": power_of_two(problem.sharing), "BLOCK_C": power_of_two(problem.channels)}
    return {name: min(size, most[name]) for name, size in config.blocks.items()}

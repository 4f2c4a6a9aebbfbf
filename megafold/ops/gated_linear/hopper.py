"""The gated linear layer on Hopper GPUs: when a kernel of its own runs, with what sizes, and how.

The kernel (:mod:`~megafold.ops.gated_linear.hopper_backward`) has all gradients. It is written in
Gluon, Triton's language of layouts and warps with roles, which compiles for this chip alone. What
it does not take, that of :mod:`~megafold.ops.gated_linear.kernels` does.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache, lru_cache
from typing import Any, NamedTuple

import torch

from megafold.ops.gated_linear.rows import Rows
from megafold.ops.hopper import HALVES, Box, box, described, is_hopper
from megafold.ops.launcher import Launcher, Layout, layout, on
from megafold.ops.sizes import cdiv, multiprocessors
from megafold.ops.tuning import is_overridden

CHANNELS = 128  # and as many outputs
PART = 64  # channels of a group of four warps
FEWEST_ROWS = 12_288  # fewer leave a program two tiles or one; of 16,384 it is faster by a quarter
# Rows of a tile along I and J. The first lie near each other in memory whichever of the two comes
# first there; the second are for rows of one dimension.
SIDES = ((8, 8), (1, 64))
STAGES = 4  # tiles of each kind in shared memory: as many as there is room for
REGISTERS = 208  # of a thread that multiplies


@cache
def has_gluon() -> bool:
    """Whether this Triton has what the kernel is written in."""
    try:
        from megafold.ops.gated_linear import hopper_backward  # noqa: F401
    except (ImportError, AttributeError, TypeError):
        return False
    return True


def why_not(
    problem: Any, weight: torch.Tensor, grad: torch.dtype, dropout: torch.Tensor | None, kernel: str
) -> str:
    """Why the gradients of a call are not Hopper's, in words; empty where they are.

    Decided from what `explain` knows too; a call may yet be laid out in memory in a way that TMA
    does not read, or ask for some gradients only.

    Args:
        weight: in the dtype that x and gate have as well.
        grad: dtype of the gradient of the output.
        dropout: what dropout multiplies by, or None.
        kernel: that which runs otherwise.
    """
    if not is_hopper(weight.device):
        return "not a Hopper GPU"
    if is_overridden(kernel):
        return "use_config has another kernel in force"
    if weight.dtype not in HALVES:
        return "operands that are not of 16 bits"
    if grad != weight.dtype:
        return "an output that is not of the operands' dtype"
    if dropout is not None and dropout.dtype not in HALVES:
        return "dropout that is not of 16 bits"
    if not problem.channels == problem.outs == CHANNELS:
        return f"{problem.channels} channels and {problem.outs} outputs, not {CHANNELS} of both"
    if problem.rows < FEWEST_ROWS:
        return f"fewer than {FEWEST_ROWS} rows"
    return "" if has_gluon() else "this Triton has no Gluon for it"


def as_pairs(problem: Any, inner: int, rows: Sequence[Rows]) -> list[torch.Tensor]:
    """Rows as ``[I, J, C]``, of which TMA needs to know every stride."""
    shape = (problem.rows // inner, inner, CHANNELS)
    return [r.tensor.as_strided(shape, (r.i, r.j, 1)) for r in rows]


class Plan(NamedTuple):
    """How rows ``[I, J]`` are cut into tiles, and shared out."""

    side_i: int  # rows of a tile along I, and along J
    side_j: int
    tiles: int
    across: int  # of which along J
    programs: int


@lru_cache(maxsize=1024)
def plan_of(outer: int, inner: int, device: torch.device) -> Plan:
    """The fewest tiles; of as many, those whose rows lie near each other."""

    def cut(side_i: int, side_j: int) -> Plan:
        across = cdiv(inner, side_j)
        tiles = cdiv(outer, side_i) * across
        return Plan(side_i, side_j, tiles, across, min(tiles, multiprocessors(device)))

    return min((cut(*sides) for sides in SIDES), key=lambda plan: plan.tiles)


def launch(plan: Plan, grad, x, gate, dropout: Rows, grad_x, grad_gate, weight, sums) -> Any:
    """Fill ``grad_x``, ``grad_gate`` and ``sums``, fp32 ``[programs, O, C]``.

    Tensors of rows are as :func:`as_pairs` makes them.
    """
    launcher = _launcher(
        plan, STAGES, REGISTERS, *x.shape[:2], dropout[1:], x.dtype, x.device,
        layout(dropout.tensor),
    )  # fmt: skip
    whole, part, of_weight = _boxes(plan.side_i, plan.side_j, x.dtype)
    tiles = (
        *(described(t, whole) for t in (grad, x, gate)), described(weight, of_weight),
        *(described(t, part) for t in (grad_x, grad_gate)),
    )  # fmt: skip
    with on(x.device):
        return launcher(*tiles, dropout.tensor, sums)


@cache
def _boxes(side_i: int, side_j: int, dtype: torch.dtype) -> tuple[Box, Box, Box]:
    """What TMA moves at once: of rows all channels, and those of a group; of the weight those."""
    from triton.experimental.gluon import language as gl

    element = gl.bfloat16 if dtype == torch.bfloat16 else gl.float16
    whole, part = (box((side_i, side_j, n), element) for n in (CHANNELS, PART))
    return whole, part, box((CHANNELS, PART), element)


@lru_cache(maxsize=1024)
def _launcher(
    plan: Plan, stages: int, registers: int, outer: int, inner: int, strides: tuple[int, int],
    dtype: torch.dtype, device: torch.device, dropout: Layout | None,
) -> Launcher:  # fmt: skip
    from triton.experimental.gluon import language as gl

    from megafold.ops.gated_linear.hopper_backward import hopper_backward_kernel

    constants = {
        "SIDE_I": plan.side_i,
        "SIDE_J": plan.side_j,
        "STAGES": stages,
        "REGISTERS": registers,
        "HALVES": gl.NVMMASharedLayout(128, 16, rank=2),
    }
    numbers = (*strides, outer, inner, plan.tiles, plan.across)
    return Launcher(hopper_backward_kernel, plan.programs, numbers, constants, {"num_warps": 4})

"""LayerNorm + Linear on Hopper GPUs: when gradients come from a kernel of their own, and how.

The kernel (:mod:`~megafold.ops.layer_norm_linear.hopper_backward`) is written in Gluon, Triton's
language of layouts and warps with roles, which compiles for this chip alone. What it does not take,
those of :mod:`~megafold.ops.layer_norm_linear.kernels` do.
"""

from __future__ import annotations

from functools import cache, lru_cache
from typing import Any, NamedTuple

import torch

from megafold.ops.hopper import HALVES, Box, box, described, is_hopper
from megafold.ops.launcher import Launcher, Layout, layout, on
from megafold.ops.sizes import cdiv, multiprocessors
from megafold.ops.tuning import is_overridden

CHANNELS = 128
TILE = 64  # rows of a tile of shared memory, of which there are 14
MOST_OUTS = 9 * TILE  # of which the weight leaves three tiles to fetch ahead
LEAST_OUTS = 129  # up to 128 one program holds all there is
SLICE = 256  # outputs of a program that sums for the weight
FEWEST_ROWS = 32_768  # at which it was measured to be faster; of fewer it is not known
REGISTERS = 208
# Of the programs those that sum for the weight, by its tiles: the two kinds then go through the
# rows at one pace, and what one reads the other finds in L2. The fastest of three to seven shares
# each on an H100; where they drift apart it takes up to two thirds longer.
SHARES = {3: 0.5, 4: 0.5, 5: 0.61, 6: 0.61, 7: 0.56, 8: 0.5, 9: 0.5}


@cache
def has_gluon() -> bool:
    """Whether this Triton has what the kernel is written in."""
    try:
        from megafold.ops.layer_norm_linear import hopper_backward  # noqa: F401
    except (ImportError, AttributeError, TypeError):
        return False
    return True


def why_not(
    x: torch.Tensor, outs: int, channels: int, dtype: torch.dtype, kernels: tuple[str, ...]
) -> str:
    """Why the gradients of a call are not Hopper's, in words; empty where they are.

    Decided from what `explain` knows too; a call may yet be laid out in memory in a way that TMA
    does not read, or ask for some gradients only.

    Args:
        dtype: of the weight.
        kernels: those that run otherwise.
    """
    if not is_hopper(x.device):
        return "not a Hopper GPU"
    if is_overridden(*kernels):
        return "use_config has other kernels in force"
    if dtype not in HALVES or x.dtype != dtype:
        return "operands that are not all of one dtype of 16 bits"
    if channels != CHANNELS:
        return f"rows of {channels} channels, not {CHANNELS}"
    if not LEAST_OUTS <= outs <= MOST_OUTS or outs % 8:
        return f"{outs} outputs: no multiple of 8 from {LEAST_OUTS} to {MOST_OUTS}"
    if x.numel() // channels < FEWEST_ROWS:
        return f"fewer than {FEWEST_ROWS} rows"
    return "" if has_gluon() else "this Triton has no Gluon for it"


class Plan(NamedTuple):
    """How the programs are shared out: to the gradient of x, and to groups of rows."""

    for_x: int
    groups: int  # of rows, for each 256 outputs: each a program

    def programs(self, outs: int) -> int:
        return self.for_x + self.groups * cdiv(outs, SLICE)


@lru_cache(maxsize=256)
def plan_of(outs: int, device: torch.device) -> Plan:
    """Programs of each kind, so that both go through the rows at one pace."""
    programs, slices = multiprocessors(device), cdiv(outs, SLICE)
    groups = max(1, int(programs * SHARES[cdiv(outs, TILE)]) // slices)
    return Plan(programs - groups * slices, groups)


def launch(
    grad, x, norm_weight, weight, stats, added, grad_x, products, totals, of_weight, of_bias,
    plan: Plan,
) -> Any:  # fmt: skip
    """Fill ``grad_x`` and the sums, whose shapes are said beside the kernel's arguments."""
    launcher = _launcher(
        plan, x.shape[0], weight.shape[0], weight.stride(0), x.dtype, x.device,
        layout(norm_weight), layout(added),
    )  # fmt: skip
    tiles = (described(t, _tile(x.dtype)) for t in (x, grad, weight, grad_x))
    with on(x.device):
        return launcher(
            *tiles, norm_weight, weight, stats, added, products, totals, of_weight, of_bias
        )  # fmt: skip


@cache
def _tile(dtype: torch.dtype) -> Box:
    from triton.experimental.gluon import language as gl

    return box((TILE, CHANNELS), gl.bfloat16 if dtype == torch.bfloat16 else gl.float16)


@lru_cache(maxsize=1024)
def _launcher(
    plan: Plan, rows: int, outs: int, stride_w: int, dtype: torch.dtype, device: torch.device,
    norm_weight: Layout | None, added: Layout | None,
) -> Launcher:  # fmt: skip
    from triton.experimental.gluon import language as gl

    from megafold.ops.layer_norm_linear.hopper_backward import TILES, hopper_backward_kernel

    of_weight = cdiv(outs, TILE)
    constants = {
        "WEIGHT": of_weight,
        "STEPS": cdiv(of_weight, 2),
        "RING": TILES.value - 2 - of_weight,
        "REGISTERS": REGISTERS,
        "HALVES": gl.NVMMASharedLayout(128, 16, rank=2),
        "LINE": gl.SwizzledSharedLayout(1, 1, 1, [0]),
    }
    numbers = (stride_w, 0 if added is None else added[0][0], *plan, rows, outs)
    programs = plan.programs(outs)
    return Launcher(hopper_backward_kernel, programs, numbers, constants, {"num_warps": 4})

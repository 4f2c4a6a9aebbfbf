"""LayerNorm + Linear on Hopper GPUs: when kernels of its own run, with what sizes, and how.

The kernels (:mod:`~megafold.ops.layer_norm_linear.hopper_forward`,
:mod:`~megafold.ops.layer_norm_linear.hopper_backward`) are written in Gluon, Triton's language of
layouts and warps with roles, which compiles for this chip alone. What they do not take, those of
:mod:`~megafold.ops.layer_norm_linear.kernels` do.
"""

from __future__ import annotations

from functools import cache, lru_cache
from typing import Any, NamedTuple

import torch

from megafold.ops.hopper import HALVES, Box, box, described, is_hopper
from megafold.ops.launcher import Launcher, Layout, layout, on
from megafold.ops.sizes import cdiv, multiprocessors
from megafold.ops.tuning import is_overridden
from megafold.ops.tuning.config import device_slug

CHANNELS = 128
TILE = 64  # rows of a tile of shared memory
TILES = 14  # of those that a program has
MOST_OUTS = 9 * TILE  # of which the weight leaves three tiles to fetch ahead
LEAST_OUTS = 129  # up to 128 one program holds all there is
SLICE = 256  # outputs of a program that sums for the weight
FEWEST_ROWS = 32_768  # at which it was measured to be faster; of fewer it is not known
REGISTERS = 208  # of a thread that multiplies, in the backward pass
REGISTERS_FORWARD = {2: 240, 3: 168}  # of a thread, by groups of four warps


class Pace(NamedTuple):
    """What the rate of a GPU's memory decides."""

    # Of the programs those that sum for the weight, by its tiles: the two kinds then go through
    # the rows at one pace, and what one reads the other finds in L2. Of three to nine
    # shares each the fastest, or within 2.5%; where they drift apart it takes up to two thirds
    # longer.
    shares: dict[int, float]
    # Of the forward pass, of more than SLICE outputs: beyond, stores from registers are faster.
    most_rows: float = float("inf")


H100 = Pace({3: 0.5, 4: 0.5, 5: 0.61, 6: 0.61, 7: 0.56, 8: 0.5, 9: 0.5}, 2**18)
PACES = {
    "nvidia-h200": Pace({3: 0.46, 4: 0.44, 5: 0.59, 6: 0.57, 7: 0.54, 8: 0.52, 9: 0.56}),
}


@cache
def pace_of(device: torch.device) -> Pace:
    """That of a GPU; one that was not measured is taken for an H100."""
    return PACES.get(device_slug(device), H100)


@cache
def has_gluon() -> bool:
    """Whether this Triton has what the kernels are written in."""
    try:
        from megafold.ops.layer_norm_linear import (  # noqa: F401
            hopper_backward,
            hopper_forward,
        )
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


def why_not_forward(
    x: torch.Tensor, outs: int, channels: int, dtype: torch.dtype, kernels: tuple[str, ...]
) -> str:
    """The same of the forward pass."""
    found = why_not(x, outs, channels, dtype, kernels)
    if not found and outs > SLICE and x.numel() // channels > pace_of(x.device).most_rows:
        return f"more than {pace_of(x.device).most_rows} rows of more than {SLICE} outputs"
    return found


class Forward(NamedTuple):
    """How the forward kernel uses a multiprocessor; tiles and blocks are those of a group."""

    groups: int  # of four warps, each with 64 rows
    block: int  # tiles of the weight, 64 outputs each, that are multiplied at a time
    staging: int  # blocks of outputs on their way to memory, at most
    depth: int  # tiles of x that are fetched ahead, at most


FORWARD = Forward(groups=2, block=1, staging=3, depth=2)


@lru_cache(maxsize=256)
def forward_of(wanted: Forward, outs: int) -> Forward:
    """What is wanted, or as much of it as the weight leaves room for."""
    weight, (groups, block, staging, depth) = cdiv(outs, TILE), wanted
    while weight % block > 1:  # what is in no whole block is the last tile, or nothing
        block //= 2
    while True:
        # In tiles of 64 by 64: rows of x, and of the weight, have two.
        free = 2 * (TILES - weight) - groups * staging * block
        if free >= 2 * groups:
            return Forward(groups, block, staging, min(depth, free // (2 * groups)))
        staging, block = (staging - 1, block) if staging > 1 else (1, block // 2)


class Plan(NamedTuple):
    """How programs are shared out in the backward pass: to the gradient of x, to groups of rows."""

    for_x: int
    groups: int  # of rows, for each 256 outputs: each a program

    def programs(self, outs: int) -> int:
        return self.for_x + self.groups * cdiv(outs, SLICE)


@lru_cache(maxsize=256)
def plan_of(outs: int, device: torch.device) -> Plan:
    """Programs of each kind, so that both go through the rows at one pace."""
    programs, slices = multiprocessors(device), cdiv(outs, SLICE)
    groups = max(1, int(programs * pace_of(device).shares[cdiv(outs, TILE)]) // slices)
    return Plan(programs - groups * slices, groups)


def launch_forward(x, norm_weight, norm_bias, weight, bias, out, stats, eps) -> Any:
    """Fill ``out`` ``[M, O]`` and ``stats``."""
    plan = forward_of(FORWARD, weight.shape[0])
    launcher = _forward(
        plan, x.shape[0], weight.shape[0], eps, x.device, x.dtype,
        layout(norm_weight), layout(norm_bias), layout(bias),
    )  # fmt: skip
    tiles = (
        described(x, _tile(x.dtype)), described(weight, _tile(x.dtype, TILE)),
        described(out, _tile(x.dtype, TILE * plan.block)),
    )  # fmt: skip
    with on(x.device):
        return launcher(*tiles, norm_weight, norm_bias, bias, stats)


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
def _tile(dtype: torch.dtype, columns: int = CHANNELS) -> Box:
    from triton.experimental.gluon import language as gl

    return box((TILE, columns), gl.bfloat16 if dtype == torch.bfloat16 else gl.float16)


@lru_cache(maxsize=1024)
def _forward(
    plan: Forward, rows: int, outs: int, eps: float, device: torch.device, dtype: torch.dtype,
    *pointers: Layout | None,
) -> Launcher:  # fmt: skip
    from triton.experimental.gluon import language as gl

    from megafold.ops.layer_norm_linear.hopper_forward import hopper_forward_kernel

    weight = cdiv(outs, TILE)
    constants = {
        "WEIGHT": weight,
        **{name.upper(): value for name, value in plan._asdict().items()},
        "REGISTERS": REGISTERS_FORWARD[plan.groups],
        "HALVES": gl.NVMMASharedLayout(128, 16, rank=2),
        "LINE": gl.SwizzledSharedLayout(1, 1, 1, [0]),
    }
    programs = min(multiprocessors(device), cdiv(rows, TILE))
    numbers = (rows, outs, weight // plan.block, eps)
    return Launcher(hopper_forward_kernel, programs, numbers, constants, {"num_warps": 4})


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

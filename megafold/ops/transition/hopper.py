"""The transition on Hopper GPUs: when kernels of its own run, with what sizes, and their launches.

The kernels (:mod:`~megafold.ops.transition.hopper_forward`,
:mod:`~megafold.ops.transition.hopper_backward`, :mod:`~megafold.ops.transition.hopper_weights`) are
written in Gluon, Triton's language of layouts
and warps with roles, which compiles for this chip alone. What they do not take, those of
``forward`` and ``backward`` do.
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
ROWS = 64  # of a group of four warps
UNITS = 64  # what hidden units are a multiple of
TILE = 128  # rows, that programs of the weights' gradients take at a time
FEWEST_ROWS = 12_288  # of 8,192 the gradients take longer than by the portable kernel


class Sizes(NamedTuple):
    """What a kernel is compiled with."""

    groups: int  # of four warps, each with ROWS rows
    units: int  # hidden units of a block
    pairs: int  # tiles of gate and value that are fetched ahead
    outs: int  # and of the output
    registers: int  # of a thread that computes


class WeightSizes(NamedTuple):
    """What the kernel for the weights' gradients is compiled with."""

    stages: int  # tiles of rows that there is room for
    registers: int  # of a thread that computes
    maxnreg: int  # of a thread at the start


FORWARD = Sizes(3, 64, 3, 2, 160)
GRAD_ROWS = Sizes(2, 64, 2, 2, 240)
GRAD_WEIGHTS = WeightSizes(2, 240, 168)


@cache
def has_gluon() -> bool:
    """Whether this Triton has what the kernels are written in."""
    try:
        from megafold.ops.transition import (  # noqa: F401
            hopper_backward,
            hopper_forward,
            hopper_weights,
        )
    except (ImportError, AttributeError, TypeError):
        return False
    return True


def why_not(problem: Any, x: torch.Tensor, dtype: torch.dtype, *kernels: str) -> str:
    """Why a kernel is not Hopper's, in words; empty where it is.

    Decided from what `explain` knows too; a call may yet be laid out in memory in a way that TMA
    does not read, or ask for some gradients only.

    Args:
        dtype: of the weights.
        kernels: those that run otherwise.
    """
    if not is_hopper(x.device):
        return "not a Hopper GPU"
    if is_overridden(*kernels):
        return "use_config has other kernels in force"
    if dtype not in HALVES or x.dtype != dtype:
        return "operands that are not all of one dtype of 16 bits"
    if problem.channels != CHANNELS:
        return f"rows of {problem.channels} channels, not {CHANNELS}"
    if problem.hidden % UNITS or not problem.hidden:
        return f"{problem.hidden} hidden units, no multiple of {UNITS}"
    if problem.rows < FEWEST_ROWS:
        return f"fewer than {FEWEST_ROWS} rows"
    return "" if has_gluon() else "this Triton has no Gluon for it"


def launch_forward(x, norm_weight, norm_bias, gate, value, out, y, stats, eps, residual) -> Any:
    """Fill ``y`` ``[M, C]``, and ``stats`` ``[2, M]`` where they are not None.

    Args:
        residual: whether x is added to the update.
    """
    launcher = _forward(
        FORWARD, x.shape[0], gate.shape[0], 0.0 if eps is None else eps, residual, x.device,
        x.dtype, layout(norm_weight), layout(norm_bias), layout(stats),
    )  # fmt: skip
    boxes = _boxes(FORWARD.units, x.dtype)
    tiles = (
        described(x, boxes.rows), described(gate, boxes.units), described(value, boxes.units),
        described(out, boxes.out), described(y, boxes.rows),
    )  # fmt: skip
    with on(x.device):
        return launcher(*tiles, norm_weight, norm_bias, stats)


def sums_of(rows: int, device: torch.device) -> int:
    """How many sums for the norm's parameters :func:`launch_grad_rows` leaves."""
    return GRAD_ROWS.groups * _programs(GRAD_ROWS, rows, device)


def launch_grad_rows(
    x, norm_weight, norm_bias, gate, value, out, stats, grad, grad_x, sums, normalised, residual
) -> Any:  # fmt: skip
    """Fill ``grad_x``, and ``sums`` and ``normalised`` where they are not None.

    Args:
        sums: fp32 ``[sums_of(rows), 2, C]``.
        residual: whether ``grad`` is added to ``grad_x``.
    """
    launcher = _grad_rows(
        GRAD_ROWS, x.shape[0], gate.shape[0], 0 if stats is None else stats.stride(0), residual,
        x.device, x.dtype, layout(norm_weight), layout(norm_bias), layout(stats), layout(sums),
    )  # fmt: skip
    boxes = _boxes(GRAD_ROWS.units, x.dtype)
    tiles = (
        described(x, boxes.rows), described(gate, boxes.units), described(value, boxes.units),
        described(out, boxes.out), described(grad, boxes.rows), described(grad_x, boxes.rows),
        None if normalised is None else described(normalised, boxes.rows),
    )  # fmt: skip
    with on(x.device):
        return launcher(*tiles, norm_weight, norm_bias, stats, sums)


def splits_of(rows: int, hidden: int, device: torch.device) -> int:
    """In how many parts :func:`launch_grad_weights` adds up: a program a multiprocessor."""
    return max(1, min(multiprocessors(device) // (hidden // UNITS), cdiv(rows, TILE)))


def launch_grad_weights(normalised, grad, gate, value, out, partial) -> Any:
    """Fill ``partial``, fp32 ``[splits_of(rows, H), 3 H, C]``."""
    launcher = _grad_weights(
        GRAD_WEIGHTS, normalised.shape[0], gate.shape[0], partial.shape[0], normalised.device,
        normalised.dtype,
    )  # fmt: skip
    boxes = _boxes(UNITS, normalised.dtype)
    tiles = (
        described(normalised, boxes.rows), described(grad, boxes.rows),
        described(gate, boxes.units), described(value, boxes.units), described(out, boxes.out),
    )  # fmt: skip
    with on(normalised.device):
        return launcher(*tiles, partial)


class _Boxes(NamedTuple):
    """What TMA moves at once."""

    rows: Box  # [M, C]
    units: Box  # of [H, C]
    out: Box  # of [C, H]


@cache
def _boxes(units: int, dtype: torch.dtype) -> _Boxes:
    from triton.experimental.gluon import language as gl

    element = gl.bfloat16 if dtype == torch.bfloat16 else gl.float16
    shapes = (ROWS, CHANNELS), (units, CHANNELS // 2), (CHANNELS, units)
    return _Boxes(*(box(shape, element) for shape in shapes))


@lru_cache(maxsize=1024)
def _forward(
    sizes: Sizes, rows: int, hidden: int, eps: float, residual: bool, device: torch.device,
    dtype: torch.dtype, *pointers: Layout | None,
) -> Launcher:  # fmt: skip
    from megafold.ops.transition.hopper_forward import hopper_forward_kernel

    programs = _programs(sizes, rows, device)
    numbers = (rows, hidden, eps)
    constants, options = _constants(sizes, residual), {"num_warps": 4}
    return Launcher(hopper_forward_kernel, programs, numbers, constants, options)


@lru_cache(maxsize=1024)
def _grad_rows(
    sizes: Sizes, rows: int, hidden: int, stride_stats: int, residual: bool,
    device: torch.device, dtype: torch.dtype, *pointers: Layout | None,
) -> Launcher:  # fmt: skip
    from megafold.ops.transition.hopper_backward import hopper_grad_rows_kernel

    programs = _programs(sizes, rows, device)
    numbers = (rows, hidden, stride_stats)
    constants, options = _constants(sizes, residual), {"num_warps": 4}
    return Launcher(hopper_grad_rows_kernel, programs, numbers, constants, options)


@lru_cache(maxsize=1024)
def _grad_weights(
    sizes: WeightSizes, rows: int, hidden: int, splits: int, device: torch.device,
    dtype: torch.dtype,
) -> Launcher:  # fmt: skip
    from triton.experimental.gluon import language as gl

    from megafold.ops.transition.hopper_weights import hopper_grad_weights_kernel

    constants = {
        "STAGES": sizes.stages,
        "REGISTERS": sizes.registers,
        "PAIR": gl.NVMMASharedLayout(128, 16, rank=2),
    }
    numbers = (cdiv(rows, TILE), splits, hidden)
    programs, options = splits * (hidden // UNITS), {"num_warps": 4, "maxnreg": sizes.maxnreg}
    return Launcher(hopper_grad_weights_kernel, programs, numbers, constants, options)


def _programs(sizes: Sizes, rows: int, device: torch.device) -> int:
    return min(multiprocessors(device), cdiv(rows, sizes.groups * ROWS))


def _constants(sizes: Sizes, residual: bool) -> dict[str, Any]:
    """What both kernels are compiled with."""
    from triton.experimental.gluon import language as gl

    return {
        "PAIRS": sizes.pairs,
        "OUTS": sizes.outs,
        "REGISTERS": sizes.registers,
        "RESIDUAL": residual,
        "PAIR": gl.NVMMASharedLayout(128, 16, rank=2),
        # Eight threads read a line of 64 channels: all banks of shared memory.
        "LINES": gl.DistributedLinearLayout(
            reg_bases=[[0, 1], [0, 2], [0, 4], [0, 64], [16, 0], [32, 0]],
            lane_bases=[[0, 8], [0, 16], [0, 32], [1, 0], [2, 0]],
            warp_bases=[[4, 0], [8, 0]],
            block_bases=[],
            shape=[ROWS, CHANNELS],
        ),
    }

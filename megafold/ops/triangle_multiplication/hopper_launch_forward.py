"""Triangle multiplication forward on Hopper GPUs: the launches of its kernels."""

from __future__ import annotations

from functools import cache, lru_cache
from typing import Any, NamedTuple

import torch

from megafold.ops.hopper import Box, box, described
from megafold.ops.launcher import Launcher, Layout, layout, on
from megafold.ops.sizes import cdiv, multiprocessors
from megafold.ops.triangle_multiplication.hopper import CHANNELS

PAIRS = 64  # of a group of four warps


class Sizes(NamedTuple):
    """How a kernel uses a multiprocessor."""

    groups: int  # of four warps, each with PAIRS pairs
    registers: int  # of a thread


PROJECT = Sizes(3, 168)
OUTPUT = Sizes(2, 240)


def launch_project(problem, z, mask, norm_weight, norm_bias, p, g, edges, stats, eps) -> Any:
    """Fill ``edges`` and ``stats``."""
    pointers = mask, norm_weight, norm_bias, stats
    launcher = _project(
        PROJECT, problem.pairs, eps, z.device, z.dtype, *(layout(t) for t in pointers)
    )
    boxes = _boxes(z.dtype)
    tiles = (
        described(z, boxes.rows), described(p, boxes.square), described(g, boxes.square),
        described(edges, boxes.square),
    )  # fmt: skip
    with on(z.device):
        return launcher(*tiles, *pointers)


def launch_output(
    problem, x, z, norm_in_weight, norm_in_bias, norm_out_weight, norm_out_bias, p, g,
    stats_in, dropout, residual, out, stats_out, eps,
) -> Any:  # fmt: skip
    """Fill ``out``, of the shape of z or ``[M, C]``, and ``stats_out``."""
    pointers = (
        norm_in_weight, norm_in_bias, norm_out_weight, norm_out_bias, stats_in, dropout.tensor,
        stats_out,
    )  # fmt: skip
    launcher = _output(
        OUTPUT, (problem.pairs, problem.tokens, *dropout.strides[:3], eps), dropout.strides[3],
        residual, z.device, z.dtype, *(layout(t) for t in pointers),
    )  # fmt: skip
    boxes = _boxes(z.dtype)
    tiles = (
        described(x, boxes.first), described(z, boxes.rows), described(p, boxes.square),
        described(g, boxes.square), described(out.view(-1, CHANNELS), boxes.rows),
    )  # fmt: skip
    with on(z.device):
        return launcher(*tiles, *pointers)


class _Boxes(NamedTuple):
    """What TMA moves at once."""

    rows: Box  # of [M, C]
    first: Box  # of [C, M]
    square: Box  # of weights, and of [2 C, M]


@cache
def _boxes(dtype: torch.dtype) -> _Boxes:
    from triton.experimental.gluon import language as gl

    element = gl.bfloat16 if dtype == torch.bfloat16 else gl.float16
    shapes = (PAIRS, CHANNELS), (CHANNELS, PAIRS), (CHANNELS // 2, PAIRS)
    return _Boxes(*(box(shape, element) for shape in shapes))


@lru_cache(maxsize=1024)
def _project(
    sizes: Sizes, pairs: int, eps: float, device: torch.device, dtype: torch.dtype,
    *pointers: Layout | None,
) -> Launcher:  # fmt: skip
    from triton.experimental.gluon import language as gl

    from megafold.ops.triangle_multiplication.hopper_forward import hopper_project_kernel

    tile = {"TILE": gl.NVMMASharedLayout(128, 16, rank=2)}
    return _launcher(hopper_project_kernel, sizes, (pairs, 2 * CHANNELS, eps), device, tile)


@lru_cache(maxsize=1024)
def _output(
    sizes: Sizes, numbers: tuple[float | int, ...], channel: int, residual: bool,
    device: torch.device, dtype: torch.dtype, *pointers: Layout | None,
) -> Launcher:  # fmt: skip
    from triton.experimental.gluon import language as gl

    from megafold.ops.triangle_multiplication.hopper_forward import hopper_output_kernel

    halves = gl.NVMMASharedLayout(128, 16, rank=2)
    constants = {"CHANNEL": channel, "RESIDUAL": residual, "HALVES": halves}
    return _launcher(hopper_output_kernel, sizes, numbers, device, constants)


def _launcher(
    kernel: Any, sizes: Sizes, numbers: tuple[float | int, ...], device: torch.device,
    more: dict[str, Any],
) -> Launcher:  # fmt: skip
    from triton.experimental.gluon import language as gl

    programs = min(multiprocessors(device), cdiv(numbers[0], sizes.groups * PAIRS))
    constants = {
        "LINE": gl.SwizzledSharedLayout(1, 1, 1, [0]),
        "REGISTERS": sizes.registers,
        **more,
    }
    return Launcher(kernel, programs, numbers, constants, {"num_warps": 4})

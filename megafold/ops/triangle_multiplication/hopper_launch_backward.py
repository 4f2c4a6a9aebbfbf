"""Triangle multiplication backward on Hopper GPUs, to x and to z: the launches of its kernels."""

from __future__ import annotations

from functools import cache, lru_cache
from typing import Any, NamedTuple

import torch

from megafold.ops.hopper import Box, box, described
from megafold.ops.launcher import Launcher, Layout, layout, on
from megafold.ops.sizes import cdiv, multiprocessors
from megafold.ops.triangle_multiplication.hopper import CHANNELS

PAIRS = 64  # of a group of four warps
GROUPS = 2  # of a program
REGISTERS = 240  # of a thread that computes


def sums_of(problem: Any, device: torch.device) -> int:
    """How many sums for its norm's parameters either kernel leaves: one a group of warps."""
    return GROUPS * _programs(problem.pairs, device)


def launch_grad_x(
    problem, grad, x, z, norm_in_weight, norm_in_bias, norm_out_weight, norm_out_bias, p, g,
    stats_in, stats_out, grad_x, grad_gate, sums,
) -> Any:  # fmt: skip
    """Fill ``grad_x``, ``grad_gate`` and ``sums``, none of them None."""
    pointers = (
        norm_in_weight, norm_in_bias, norm_out_weight, norm_out_bias, stats_in, stats_out, sums
    )  # fmt: skip
    launcher = _grad_x(problem.pairs, z.device, z.dtype, *(layout(t) for t in pointers))
    boxes = _boxes(z.dtype)
    tiles = (
        described(grad, boxes.rows), described(x, boxes.first), described(z, boxes.rows),
        described(p, boxes.rows), described(g, boxes.rows), described(grad_x, boxes.first),
        described(grad_gate, boxes.rows),
    )  # fmt: skip
    with on(z.device):
        return launcher(*tiles, *pointers)


def launch_grad_z(
    problem, edges, grad_gate, z, mask, norm_weight, norm_bias, p, g, g_out, stats, residual,
    grad_z, sums, gap,
) -> Any:  # fmt: skip
    """Fill ``grad_z`` and ``sums``, neither of them None."""
    pointers = (mask, norm_weight, norm_bias, stats, residual, sums)
    stride = 0 if residual is None else residual.stride(0)
    launcher = _grad_z(
        (stride, problem.pairs, gap), z.device, z.dtype, *(layout(t) for t in pointers)
    )
    boxes = _boxes(z.dtype)
    tiles = (
        described(edges, boxes.half), described(grad_gate, boxes.half), described(z, boxes.rows),
        described(p, boxes.half), described(g, boxes.half), described(g_out, boxes.rows),
        described(grad_z, boxes.rows),
    )  # fmt: skip
    with on(z.device):
        return launcher(*tiles, *pointers)


def _programs(pairs: int, device: torch.device) -> int:
    return min(multiprocessors(device), cdiv(pairs, GROUPS * PAIRS))


class _Boxes(NamedTuple):
    """What TMA moves at once."""

    rows: Box  # of [M, C], and of weights
    first: Box  # of [C, M], channels first
    half: Box  # of either


@cache
def _boxes(dtype: torch.dtype) -> _Boxes:
    from triton.experimental.gluon import language as gl

    element = gl.bfloat16 if dtype == torch.bfloat16 else gl.float16
    shapes = (PAIRS, CHANNELS), (CHANNELS, PAIRS), (PAIRS, PAIRS)
    return _Boxes(*(box(shape, element) for shape in shapes))


@lru_cache(maxsize=1024)
def _grad_x(
    pairs: int, device: torch.device, dtype: torch.dtype, *pointers: Layout | None
) -> Launcher:  # fmt: skip
    from triton.experimental.gluon import language as gl

    from megafold.ops.triangle_multiplication.hopper_backward import hopper_grad_x_kernel

    constants = {"REGISTERS": REGISTERS, "HALVES": gl.NVMMASharedLayout(128, 16, rank=2)}
    programs = _programs(pairs, device)
    return Launcher(hopper_grad_x_kernel, programs, (pairs,), constants, {"num_warps": 4})


@lru_cache(maxsize=1024)
def _grad_z(
    numbers: tuple[int, int, int], device: torch.device, dtype: torch.dtype,
    *pointers: Layout | None,
) -> Launcher:  # fmt: skip
    from triton.experimental.gluon import language as gl

    from megafold.ops.triangle_multiplication.hopper_backward import hopper_grad_z_kernel

    constants = {"REGISTERS": REGISTERS, "HALVES": gl.NVMMASharedLayout(128, 16, rank=2)}
    programs = _programs(numbers[1], device)
    return Launcher(hopper_grad_z_kernel, programs, numbers, constants, {"num_warps": 4})

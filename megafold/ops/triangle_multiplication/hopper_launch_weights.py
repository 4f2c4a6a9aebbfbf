"""Gradients of triangle multiplication's weights on Hopper GPUs: the launches of their kernels."""

from __future__ import annotations

from functools import cache, lru_cache
from typing import Any, NamedTuple

import torch

from megafold.ops.hopper import Box, box, described
from megafold.ops.launcher import Launcher, Layout, layout, on
from megafold.ops.sizes import cdiv, multiprocessors
from megafold.ops.triangle_multiplication.hopper import CHANNELS

PAIRS = 64  # of a tile


class Sizes(NamedTuple):
    """What a kernel is compiled with."""

    blocks: int  # programs of a split, each with 128 outputs
    slots: int  # for tiles of as many blocks of pairs, in shared memory
    registers: int  # of a thread that multiplies


IN = Sizes(2, 4, 224)
OUT = Sizes(1, 3, 224)


def launch_weights_in(
    problem, edges, z, mask, norm_weight, norm_bias, p, g, stats, sums, gap
) -> Any:  # fmt: skip
    """Fill ``sums``, of as many splits as :func:`splits` says."""
    boxes = _boxes(z.dtype)
    launcher = _launcher(
        IN, problem.pairs, (problem.pairs, gap), z.device, z.dtype,
        *(layout(t) for t in (mask, norm_weight, norm_bias, stats, sums)),
    )  # fmt: skip
    tiles = (
        described(edges, boxes.first), described(z, boxes.rows), described(p, boxes.rows),
        described(g, boxes.rows),
    )  # fmt: skip
    with on(z.device):
        return launcher(*tiles, mask, norm_weight, norm_bias, stats, sums)


def launch_weights_out(
    problem, grad, x, z, norm_in_weight, norm_in_bias, norm_out_weight, norm_out_bias, p, g,
    stats_in, stats_out, sums,
) -> Any:  # fmt: skip
    """Fill ``sums``, of as many splits as :func:`splits` says."""
    boxes = _boxes(z.dtype)
    pointers = (
        norm_in_weight, norm_in_bias, norm_out_weight, norm_out_bias, stats_in, stats_out, sums
    )  # fmt: skip
    launcher = _launcher(
        OUT, problem.pairs, (problem.pairs,), z.device, z.dtype, *(layout(t) for t in pointers)
    )
    tiles = (
        described(grad, boxes.rows), described(x, boxes.first), described(z, boxes.rows),
        described(p, boxes.rows), described(g, boxes.rows),
    )  # fmt: skip
    with on(z.device):
        return launcher(*tiles, *pointers)


def splits(sizes: Sizes, pairs: int, device: torch.device) -> int:
    """In how many sums over some of the pairs a launch leaves the gradients.

    No more than there are multiprocessors for, nor than the longest of them leaves work for.
    """
    tiles = cdiv(pairs, PAIRS)
    each = cdiv(tiles, max(1, multiprocessors(device) // sizes.blocks))
    return cdiv(tiles, each)


class _Boxes(NamedTuple):
    """What TMA moves at once."""

    rows: Box  # of [M, C], and of weights
    first: Box  # of [.., M], channels first


@cache
def _boxes(dtype: torch.dtype) -> _Boxes:
    from triton.experimental.gluon import language as gl

    element = gl.bfloat16 if dtype == torch.bfloat16 else gl.float16
    return _Boxes(box((PAIRS, CHANNELS), element), box((CHANNELS, PAIRS), element))


@lru_cache(maxsize=1024)
def _launcher(
    sizes: Sizes, pairs: int, numbers: tuple[int, ...], device: torch.device, dtype: torch.dtype,
    *pointers: Layout | None,
) -> Launcher:  # fmt: skip
    from triton.experimental.gluon import language as gl

    from megafold.ops.triangle_multiplication import hopper_weights

    if sizes.blocks == 2:
        kernel = hopper_weights.hopper_weights_in_kernel
    else:
        kernel = hopper_weights.hopper_weights_out_kernel
    constants = {
        "SLOTS": sizes.slots,
        "REGISTERS": sizes.registers,
        "HALVES": gl.NVMMASharedLayout(128, 16, rank=2),
        "LINE": gl.SwizzledSharedLayout(1, 1, 1, [0]),
    }
    programs = sizes.blocks * splits(sizes, pairs, device)
    return Launcher(kernel, programs, numbers, constants, {"num_warps": 4})

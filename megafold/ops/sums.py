"""Sums that programs leave, added up in one order always."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
import triton
import triton.language as tl

from megafold.ops.launcher import Launcher, Layout, layout, on
from megafold.ops.sizes import cdiv

# Sums at once, and numbers, of a program: by how many numbers a sum has, up to so many. The fewer
# they are, the more sums there are as a rule.
BLOCKS = ((2**12, 256, 16), (2**18, 32, 64), (None, 1, 512))
INTERPRETED = (4, 4096)  # a program takes the interpreter long, its numbers do not


@triton.jit
def add_sums_kernel(
    p_sums,  # fp32 [count, numbers], neighbours along the numbers
    p_total,  # [numbers], contiguous, written
    p_done,  # integer, or None: where it is not 0 nothing is done
    stride,  # of a sum
    count,
    numbers,
    SUMS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """BLOCK numbers; SUMS of them are read at once."""
    if p_done is not None:
        numbers = tl.where(tl.load(p_done) == 0, numbers, 0)
        count = tl.where(numbers > 0, count, 0)
    o_i = tl.arange(0, SUMS)
    o_n = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    m_n = (o_n < numbers)[None, :]
    b = tl.zeros([SUMS, BLOCK], tl.float32)
    for start in range(0, count, 4 * SUMS):  # four reads are on their way at a time
        for i in tl.static_range(4):
            o = start + i * SUMS + o_i
            p = p_sums + o.to(tl.int64)[:, None] * stride + o_n[None, :]
            b += tl.load(p, mask=(o < count)[:, None] & m_n, other=0.0)
    tl.store(p_total + o_n, tl.sum(b, 0).to(p_total.dtype.element_ty), mask=o_n < numbers)


def add_sums(sums: torch.Tensor, total: torch.Tensor, done: torch.Tensor | None = None) -> None:
    """Fill ``total``, contiguous and of any dtype, with the sum of ``sums`` over their first.

    Args:
        sums: fp32 ``[count, *total.shape]``, each of them contiguous.
        done: integers; where the GPU finds the first other than 0 nothing is filled.
    """
    stride = sums.stride(0) if sums.shape[0] > 1 else total.numel()
    launcher = _launcher(
        add_sums_kernel, sums.shape[0], stride, total.numel(), total.device,
        layout(total), layout(sums), layout(done),
    )  # fmt: skip
    with on(total.device):
        launcher(sums, total, done)


@lru_cache(maxsize=4096)
def _launcher(
    kernel: Any, count: int, stride: int, numbers: int, device: torch.device, *alike: Layout | None
) -> Launcher:
    sums, block = _blocks(numbers, device)
    constants = {"SUMS": sums, "BLOCK": block}
    programs = cdiv(numbers, block)
    return Launcher(kernel, programs, (stride, count, numbers), constants, {"num_warps": 4})


def _blocks(numbers: int, device: torch.device) -> tuple[int, int]:
    if device.type == "cpu":
        return INTERPRETED
    return next((sums, block) for most, sums, block in BLOCKS if most is None or numbers <= most)

"""Dropout in triangle multiplication: how kernels find it, and the gradient multiplied by it.

The forward pass multiplies by it in its last kernel. The backward pass reads the gradient of the
update twice, so that it is multiplied once, before, in a kernel of its own.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from megafold.ops.gated_linear.rows import expanded, with_neighbours
from megafold.ops.launcher import Launcher, Layout, layout, on
from megafold.ops.layer_norm.launch import padded
from megafold.ops.sizes import cdiv, power_of_two
from megafold.ops.triangle_multiplication.tiles import load_dropout, load_rows, store_tile

NUMBERS = 4096  # of a program: four times 16 bytes of a thread in 16 bits
WARPS = 4


class Dropout(NamedTuple):
    """What dropout multiplies by, ``[B, N, N, C]``, and its strides: 0 where it repeats."""

    tensor: torch.Tensor | None
    strides: tuple[int, int, int, int] = (0, 0, 0, 0)  # of b, i, j and a channel


def as_read(dropout: torch.Tensor | None, shape: torch.Size) -> Dropout:
    """What broadcasts to a shape as kernels read it: copied only if channels lie apart."""
    t = expanded(dropout, shape)
    if t is None:
        return Dropout(None)
    if t.stride(-1) != 0:
        t = with_neighbours(t)
    steps = (step if size > 1 else 0 for size, step in zip(t.shape, t.stride(), strict=True))
    return Dropout(t, tuple(steps))


@triton.jit
def dropout_kernel(
    p_grad,  # [M, C], neighbours along C
    p_dropout,  # [B, N, N, C]
    p_out,  # [M, C], contiguous, written: their product
    stride_grad,  # of a row
    tokens,  # N
    dropout_b,  # strides, 0 where it repeats
    dropout_i,
    dropout_j,
    dropout_c,
    pairs,
    channels,
    EVEN_M: tl.constexpr,  # BLOCK_M divides M
    EVEN: tl.constexpr,  # BLOCK_C is C
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """One program multiplies the gradients of BLOCK_M pairs."""
    i_m = tl.program_id(0).to(tl.int64) * BLOCK_M
    o_m = tl.arange(0, BLOCK_M)
    o_c = tl.arange(0, BLOCK_C)
    m_m, m_c = o_m < pairs - i_m, o_c < channels
    p_rows = p_grad + i_m * stride_grad
    b = load_rows(p_rows, o_m, o_c, stride_grad, m_m, m_c, EVEN_M, EVEN).to(tl.float32)
    b *= load_dropout(
        p_dropout, i_m, o_m, o_c, tokens, dropout_b, dropout_i, dropout_j, dropout_c, m_m, m_c,
        EVEN_M, EVEN,
    )  # fmt: skip
    p_tile = p_out + i_m * channels + o_m[:, None] * channels + o_c[None, :]
    store_tile(p_tile, b.to(p_out.dtype.element_ty), m_m[:, None] & m_c[None, :], EVEN_M and EVEN)


def multiply(grad: torch.Tensor, dropout: Dropout, tokens: int, out: torch.Tensor) -> None:
    """Fill ``out`` ``[M, C]``, contiguous and of any dtype, with ``grad * dropout``.

    Args:
        grad: ``[M, C]``, neighbours along C.
    """
    launcher = _launcher(
        dropout_kernel, tuple(out.shape), (grad.stride(0), tokens, *dropout.strides), out.device,
        *(layout(t) for t in (grad, dropout.tensor, out)),
    )  # fmt: skip
    with on(out.device):
        launcher(grad, dropout.tensor, out)


@lru_cache(maxsize=1024)
def _launcher(
    kernel: Any, shape: tuple[int, int], strides: tuple[int, ...], device: torch.device,
    *alike: Layout | None,
) -> Launcher:  # fmt: skip
    pairs, channels = shape
    width = padded(channels)
    rows = min(NUMBERS // width, power_of_two(pairs))
    constants = {
        "EVEN_M": pairs % rows == 0, "EVEN": channels == width, "BLOCK_M": rows, "BLOCK_C": width,
    }  # fmt: skip
    numbers = (*strides, pairs, channels)
    return Launcher(kernel, cdiv(pairs, rows), numbers, constants, {"num_warps": WARPS})

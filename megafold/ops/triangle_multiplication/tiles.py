"""What the kernels of triangle multiplication share: tiles of pairs, channels and weights.

Tensors of pairs come in two layouts: rows ``[M, C]``, as z has them, and channels first
``[C, M]``, as the product over triangles takes them. A tile has pairs and channels in either
order whatever the layout, for it is its pointers that say where an element is.

Names: ``p_`` pointer, ``o_`` offsets, ``m_`` mask, ``b_`` block.
"""

from __future__ import annotations

import triton
import triton.language as tl

from megafold.ops.layer_norm.kernels import load_channels


@triton.jit
def load_rows(p, o_m, o_c, stride, m_m, m_c, EVEN_M: tl.constexpr, EVEN_C: tl.constexpr):
    """A tile ``[M, C]`` of rows; zeros outside. EVEN: there is every row, every channel."""
    p_tile = p + o_m[:, None] * stride + o_c[None, :]
    if EVEN_M and EVEN_C:
        return tl.load(p_tile)
    elif EVEN_C:
        return tl.load(p_tile, mask=m_m[:, None], other=0.0)
    else:
        return tl.load(p_tile, mask=m_m[:, None] & m_c[None, :], other=0.0)


@triton.jit
def load_dropout(
    p, i_m, o_m, o_c, tokens, stride_b, stride_i, stride_j, stride_c, m_m, m_c,
    EVEN_M: tl.constexpr, EVEN_C: tl.constexpr,
):  # fmt: skip
    """What dropout multiplies pairs ``i_m + o_m`` by, ``[M, C]``, fp32; zeros outside.

    Pair m is ``(b, i, j)`` with ``m = (b N + i) N + j``, and each of these has a stride, 0 where it
    repeats. All but the first pair's place is 32-bit arithmetic.
    """
    o_j = (i_m % tokens).to(tl.int32) + o_m
    o_i = (i_m // tokens).to(tl.int32) + o_j // tokens
    o_row = (o_i // tokens).to(tl.int64) * stride_b + (o_i % tokens).to(tl.int64) * stride_i
    o_row += (o_j % tokens).to(tl.int64) * stride_j
    p_tile = p + (o_row[:, None] + (o_c * stride_c)[None, :])
    if EVEN_M and EVEN_C:
        b = tl.load(p_tile)
    elif EVEN_C:
        b = tl.load(p_tile, mask=m_m[:, None], other=0.0)
    else:
        b = tl.load(p_tile, mask=m_m[:, None] & m_c[None, :], other=0.0)
    return b.to(tl.float32)


@triton.jit
def load_turned(p, o_o, o_c, channels, m_o, m_c, EVEN: tl.constexpr):
    """The transpose ``[C, O]`` of rows ``o_o`` of a weight ``[.., C]``, contiguous."""
    p_tile = p + o_o[None, :] * channels + o_c[:, None]
    if EVEN:
        return tl.load(p_tile, mask=m_o[None, :], other=0.0)
    else:
        return tl.load(p_tile, mask=m_o[None, :] & m_c[:, None], other=0.0)


@triton.jit
def channel_first(p, o_c, o_m, pairs):
    """Pointers ``[C, M]`` into a tensor ``[.., pairs]`` with channels first; 64-bit offsets."""
    return p + o_c.to(tl.int64)[:, None] * pairs + o_m[None, :]


@triton.jit
def load_first(p, o_c, o_m, pairs, m_c, m_m, EVEN_M: tl.constexpr, EVEN_C: tl.constexpr):
    """A tile ``[C, M]`` of a tensor with channels first; zeros outside."""
    p_tile = channel_first(p, o_c, o_m, pairs)
    if EVEN_M and EVEN_C:
        return tl.load(p_tile)
    else:
        return tl.load(p_tile, mask=m_c[:, None] & m_m[None, :], other=0.0)


@triton.jit
def store_tile(p_tile, b, m, EVEN: tl.constexpr):
    """Store a tile, all of it if EVEN."""
    if EVEN:
        tl.store(p_tile, b)
    else:
        tl.store(p_tile, b, mask=m)


@triton.jit
def scaled(b_normal, p_weight, p_bias, o_c, m_c):
    """Rows ``[M, C]`` of unit variance with a norm's scale and offset; zero without channel."""
    b_normal = b_normal * load_channels(p_weight, o_c, m_c, 1.0)
    return b_normal + tl.where(m_c[None, :], load_channels(p_bias, o_c, m_c, 0.0), 0.0)


@triton.jit
def unit_rows(b_x, p_stats, o_m, pairs, m_m, m_c, EVEN_M: tl.constexpr, EVEN_C: tl.constexpr):
    """Rows ``[M, C]`` by their statistics, without scale and offset, fp32, and those.

    Returns them, zero where there is no channel, and one over their deviations ``[M]``.
    """
    b_mean = load_numbers(p_stats, o_m, m_m, EVEN_M)
    b_rstd = load_numbers(p_stats + pairs, o_m, m_m, EVEN_M)
    b_normal = (b_x.to(tl.float32) - b_mean[:, None]) * b_rstd[:, None]
    if not EVEN_C:
        b_normal = tl.where(m_c[None, :], b_normal, 0.0)
    return b_normal, b_rstd


@triton.jit
def load_numbers(p, o_m, m_m, EVEN_M: tl.constexpr):
    """A number of each pair; zeros outside."""
    if EVEN_M:
        return tl.load(p + o_m)
    else:
        return tl.load(p + o_m, mask=m_m, other=0.0)


@triton.jit
def store_sums(p_sums, i_program, b_grad, b_normal, o_c, channels):
    """One program's share of the gradients of a norm's weight and bias, fp32 ``[2, C]``."""
    p_own = p_sums + i_program.to(tl.int64) * 2 * channels + o_c
    tl.store(p_own, tl.sum(b_grad * b_normal, axis=0), mask=o_c < channels)
    tl.store(p_own + channels, tl.sum(b_grad, axis=0), mask=o_c < channels)

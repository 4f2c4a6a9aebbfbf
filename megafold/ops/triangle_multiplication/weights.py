"""Gradients of triangle multiplication's weights in Triton: what they are sums of, and the sums.

Letters and names as in ``forward.py``. A gradient of a weight is a product over all pairs. Here a
program has BLOCK_O rows of two weights, p and g, and adds up their gradients over a share of the
pairs (a *split*), block by block: what is multiplied never leaves the multiprocessor, where a
product by the vendor's library would have it written and read. The price is that z, x and the
gradients are read once for every BLOCK_O outputs, mostly from the L2 cache, for programs of one
split are neighbours. The host adds the splits up in order.
"""

from __future__ import annotations

import triton
import triton.language as tl

from megafold.ops.exact import sigmoid
from megafold.ops.layer_norm.kernels import load_channels
from megafold.ops.products import add_product, dot
from megafold.ops.triangle_multiplication.tiles import (
    load_first,
    load_rows,
    scaled,
    unit_rows,
)


@triton.jit
def weights_out_kernel(
    p_grad,  # [M, C], neighbours along C: gradient of the update, dropout and residual behind it
    p_x,  # [C, M]: the product over triangles, computed again
    p_z,  # [M, C], neighbours along C
    p_norm_in_weight,  # [C] or None, as the norms' other parameters are
    p_norm_in_bias,
    p_norm_out_weight,
    p_norm_out_bias,
    p_p,  # [C, C], contiguous
    p_g,  # [C, C]
    p_stats_in,  # fp32 [2, M]: of z
    p_stats_out,  # fp32 [2, M]: of x
    p_sums,  # fp32 [splits, 2 (p, g), C, C], written
    stride_grad,  # of a row
    stride_z,
    pairs,
    channels,
    EVEN_M: tl.constexpr,  # BLOCK_M divides M
    EVEN: tl.constexpr,  # BLOCK_C is C
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """One program adds up BLOCK_O rows of the gradients of ``p_out`` and ``g_out``."""
    blocks = tl.cdiv(channels, BLOCK_O)
    splits = tl.num_programs(0) // blocks
    i_split = tl.program_id(0) // blocks
    o_o = tl.program_id(0) % blocks * BLOCK_O + tl.arange(0, BLOCK_O)
    o_c = tl.arange(0, BLOCK_C)
    m_o, m_c = o_o < channels, o_c < channels
    PRODUCT: tl.constexpr = p_p.dtype.element_ty
    EXACT: tl.constexpr = PRECISION == "ieee" and p_p.dtype.element_ty == tl.float32
    b_wp = load_rows(p_p, o_o, o_c, channels, m_o, m_c, EVEN, EVEN)
    b_wg = load_rows(p_g, o_o, o_c, channels, m_o, m_c, EVEN, EVEN)
    b_of_wp = tl.zeros([BLOCK_O, BLOCK_C], tl.float32)
    b_of_wg = tl.zeros([BLOCK_O, BLOCK_C], tl.float32)
    b_lost_wp = tl.zeros([BLOCK_O, BLOCK_C], tl.float32)
    b_lost_wg = tl.zeros([BLOCK_O, BLOCK_C], tl.float32)
    for i_block in range(i_split, tl.cdiv(pairs, BLOCK_M), splits):
        i_m = tl.cast(i_block, tl.int64) * BLOCK_M
        o_m = tl.arange(0, BLOCK_M)
        m_m = o_m < pairs - i_m
        b_z = load_rows(p_z + i_m * stride_z, o_m, o_c, stride_z, m_m, m_c, EVEN_M, EVEN)
        b_n, _ = unit_rows(b_z, p_stats_in + i_m, o_m, pairs, m_m, m_c, EVEN_M, EVEN)
        b_n = scaled(b_n, p_norm_in_weight, p_norm_in_bias, o_c, m_c).to(PRODUCT)
        b_x = tl.trans(load_first(p_x + i_m, o_c, o_m, pairs, m_c, m_m, EVEN_M, EVEN))
        b_y, _ = unit_rows(b_x, p_stats_out + i_m, o_m, pairs, m_m, m_c, EVEN_M, EVEN)
        b_y = scaled(b_y, p_norm_out_weight, p_norm_out_bias, o_c, m_c).to(PRODUCT)
        p_rows = p_grad + i_m * stride_grad
        b_grad = load_rows(p_rows, o_m, o_o, stride_grad, m_m, m_o, EVEN_M, EVEN)
        b_gate = sigmoid(dot(b_wg, tl.trans(b_n), PRECISION), EXACT)  # [O, M]
        b_u = dot(b_wp, tl.trans(b_y), PRECISION)
        b_of_u = tl.trans(b_grad).to(tl.float32) * b_gate
        b_of_g = (b_of_u * b_u * (1.0 - b_gate)).to(PRODUCT)
        b_of_u = b_of_u.to(PRODUCT)
        b_of_wp, b_lost_wp = add_product(b_of_u, b_y, b_of_wp, b_lost_wp, PRECISION)
        b_of_wg, b_lost_wg = add_product(b_of_g, b_n, b_of_wg, b_lost_wg, PRECISION)
    _store(p_sums, i_split, b_of_wp, b_of_wg, o_o, o_c, channels, channels)


@triton.jit
def weights_in_kernel(
    p_edges,  # [2 C + gap, M]: gradients of a, then, behind a gap, of b
    p_z,  # [M, C], neighbours along C
    p_mask,  # bool [M] or None
    p_norm_weight,  # [C] or None
    p_norm_bias,  # [C] or None
    p_p,  # [2 C, C], contiguous
    p_g,  # [2 C, C]
    p_stats,  # fp32 [2, M]: of z
    p_sums,  # fp32 [splits, 2 (p, g), 2 C, C], written
    stride_z,  # of a row
    pairs,
    channels,
    gap,
    EVEN_M: tl.constexpr,  # BLOCK_M divides M
    EVEN: tl.constexpr,  # BLOCK_C is C
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """One program adds up BLOCK_O rows of the gradients of ``p_in`` and ``g_in``."""
    blocks = tl.cdiv(2 * channels, BLOCK_O)
    splits = tl.num_programs(0) // blocks
    i_split = tl.program_id(0) // blocks
    o_o = tl.program_id(0) % blocks * BLOCK_O + tl.arange(0, BLOCK_O)
    o_c = tl.arange(0, BLOCK_C)
    m_o, m_c = o_o < 2 * channels, o_c < channels
    PRODUCT: tl.constexpr = p_p.dtype.element_ty
    EXACT: tl.constexpr = PRECISION == "ieee" and p_p.dtype.element_ty == tl.float32
    b_wp = load_rows(p_p, o_o, o_c, channels, m_o, m_c, EVEN, EVEN)
    b_wg = load_rows(p_g, o_o, o_c, channels, m_o, m_c, EVEN, EVEN)
    b_scale = load_channels(p_norm_weight, o_c, m_c, 1.0)
    b_shift = tl.where(m_c[None, :], load_channels(p_norm_bias, o_c, m_c, 0.0), 0.0)
    o_e = o_o + tl.where(o_o < channels, 0, gap)
    b_of_wp = tl.zeros([BLOCK_O, BLOCK_C], tl.float32)
    b_of_wg = tl.zeros([BLOCK_O, BLOCK_C], tl.float32)
    b_lost_wp = tl.zeros([BLOCK_O, BLOCK_C], tl.float32)
    b_lost_wg = tl.zeros([BLOCK_O, BLOCK_C], tl.float32)
    for i_block in range(i_split, tl.cdiv(pairs, BLOCK_M), splits):
        i_m = tl.cast(i_block, tl.int64) * BLOCK_M
        o_m = tl.arange(0, BLOCK_M)
        m_m = o_m < pairs - i_m
        b_z = load_rows(p_z + i_m * stride_z, o_m, o_c, stride_z, m_m, m_c, EVEN_M, EVEN)
        b_n, _ = unit_rows(b_z, p_stats + i_m, o_m, pairs, m_m, m_c, EVEN_M, EVEN)
        b_n = (b_n * b_scale + b_shift).to(PRODUCT)
        b_grad = load_first(p_edges + i_m, o_e, o_m, pairs, m_o, m_m, EVEN_M, EVEN)
        b_gate = sigmoid(dot(b_wg, tl.trans(b_n), PRECISION), EXACT)  # [O, M]
        b_p = dot(b_wp, tl.trans(b_n), PRECISION)
        b_of_p = b_grad.to(tl.float32) * b_gate
        if p_mask is not None:
            b_mask = tl.load(p_mask + i_m + o_m, mask=m_m, other=0) != 0
            b_of_p = tl.where(b_mask[None, :], b_of_p, 0.0)
        b_of_g = (b_of_p * b_p * (1.0 - b_gate)).to(PRODUCT)
        b_of_p = b_of_p.to(PRODUCT)
        b_of_wp, b_lost_wp = add_product(b_of_p, b_n, b_of_wp, b_lost_wp, PRECISION)
        b_of_wg, b_lost_wg = add_product(b_of_g, b_n, b_of_wg, b_lost_wg, PRECISION)
    _store(p_sums, i_split, b_of_wp, b_of_wg, o_o, o_c, 2 * channels, channels)


@triton.jit
def _store(p_sums, i_split, b_of_wp, b_of_wg, o_o, o_c, outputs, channels):
    """A split's sums of rows ``o_o`` of two weights ``[outputs, channels]``."""
    size = outputs * channels
    p_own = p_sums + i_split.to(tl.int64) * 2 * size + o_o[:, None] * channels + o_c[None, :]
    m = (o_o < outputs)[:, None] & (o_c < channels)[None, :]
    tl.store(p_own, b_of_wp, mask=m)
    tl.store(p_own + size, b_of_wg, mask=m)

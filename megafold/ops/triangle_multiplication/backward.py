"""Triangle multiplication backward in Triton: back to the product over triangles, and to z.

Letters and names as in ``forward.py``. Both kernels compute again what the forward pass had in
registers. So do those for the gradients of the weights (``weights.py``), for which nothing has to
be written here. The norms' parameters have a sum for every program, which the host adds up in
order: there are no atomics.
"""

from __future__ import annotations

import triton
import triton.language as tl

from megafold.ops.exact import sigmoid
from megafold.ops.layer_norm.kernels import grad_of_normalised, load_channels
from megafold.ops.products import add_dot, add_product, dot
from megafold.ops.triangle_multiplication.tiles import (
    channel_first,
    load_first,
    load_rows,
    scaled,
    store_sums,
    store_tile,
    unit_rows,
)


@triton.jit
def grad_x_kernel(
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
    p_grad_x,  # [C, M], written; may be p_x; or None
    p_grad_gate,  # [M, C], contiguous, written: of what the sigmoid takes; or None
    p_sums,  # fp32 [programs, 2, C], written; or None
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
    """One program takes the gradient of BLOCK_M pairs back to their x and their gates."""
    i_m = tl.program_id(0).to(tl.int64) * BLOCK_M
    o_m = tl.arange(0, BLOCK_M)
    o_c = tl.arange(0, BLOCK_C)
    m_m, m_c = o_m < pairs - i_m, o_c < channels
    PRODUCT: tl.constexpr = p_p.dtype.element_ty
    EXACT: tl.constexpr = PRECISION == "ieee" and p_p.dtype.element_ty == tl.float32

    b_x = tl.trans(load_first(p_x + i_m, o_c, o_m, pairs, m_c, m_m, EVEN_M, EVEN))
    b_y, _ = unit_rows(b_x, p_stats_out + i_m, o_m, pairs, m_m, m_c, EVEN_M, EVEN)
    b_y = scaled(b_y, p_norm_out_weight, p_norm_out_bias, o_c, m_c).to(PRODUCT)
    b_z = load_rows(p_z + i_m * stride_z, o_m, o_c, stride_z, m_m, m_c, EVEN_M, EVEN)
    b_n, _ = unit_rows(b_z, p_stats_in + i_m, o_m, pairs, m_m, m_c, EVEN_M, EVEN)
    b_n = scaled(b_n, p_norm_in_weight, p_norm_in_bias, o_c, m_c).to(PRODUCT)

    b_grad_y = tl.zeros([BLOCK_M, BLOCK_C], tl.float32)
    for i_o in range(0, channels, BLOCK_O):
        o_o = i_o + tl.arange(0, BLOCK_O)
        m_o = o_o < channels
        b_p = load_rows(p_p, o_o, o_c, channels, m_o, m_c, EVEN, EVEN)  # [O, C]
        b_g = load_rows(p_g, o_o, o_c, channels, m_o, m_c, EVEN, EVEN)
        p_rows = p_grad + i_m * stride_grad
        b_grad = load_rows(p_rows, o_m, o_o, stride_grad, m_m, m_o, EVEN_M, EVEN)
        b_u = dot(b_y, tl.trans(b_p), PRECISION)  # [M, O]
        b_gate = sigmoid(dot(b_n, tl.trans(b_g), PRECISION), EXACT)
        b_of_u = b_grad.to(tl.float32) * b_gate
        if p_grad_gate is not None:
            b_of_gate = (b_of_u * b_u * (1.0 - b_gate)).to(p_grad_gate.dtype.element_ty)
            p_tile = p_grad_gate + i_m * channels + o_m[:, None] * channels + o_o[None, :]
            store_tile(p_tile, b_of_gate, m_m[:, None] & m_o[None, :], EVEN_M and EVEN)
        b_grad_y = add_dot(b_of_u.to(PRODUCT), b_p, b_grad_y, PRECISION)

    # Read again: kept over the loop, it would take registers from it.
    b_x = tl.trans(load_first(p_x + i_m, o_c, o_m, pairs, m_c, m_m, EVEN_M, EVEN))
    b_normal, b_rstd = unit_rows(b_x, p_stats_out + i_m, o_m, pairs, m_m, m_c, EVEN_M, EVEN)
    if p_sums is not None:
        store_sums(p_sums, tl.program_id(0), b_grad_y, b_normal, o_c, channels)
    if p_grad_x is not None:
        b_grad_y *= load_channels(p_norm_out_weight, o_c, m_c, 1.0)
        b_grad_x = grad_of_normalised(b_grad_y, b_normal, b_rstd, channels)
        b_grad_x = tl.trans(b_grad_x.to(p_grad_x.dtype.element_ty))
        p_tile = channel_first(p_grad_x + i_m, o_c, o_m, pairs)
        store_tile(p_tile, b_grad_x, m_c[:, None] & m_m[None, :], EVEN_M and EVEN)


@triton.jit
def grad_z_kernel(
    p_edges,  # [2 C + gap, M]: gradients of a, then, behind a gap, of b
    p_grad_gate,  # [M, C], contiguous: of what the sigmoid of the output takes
    p_z,  # [M, C], neighbours along C
    p_mask,  # bool [M] or None
    p_norm_weight,  # [C] or None
    p_norm_bias,  # [C] or None
    p_p,  # [2 C, C], contiguous, as all weights are
    p_g,  # [2 C, C]
    p_g_out,  # [C, C]
    p_stats,  # fp32 [2, M]: of z
    p_residual,  # [M, C], neighbours along C: of the output, to which z was added; or None
    p_grad_z,  # [M, C], contiguous, written; may be p_grad_gate; or None
    p_sums,  # fp32 [programs, 2, C], written; or None
    stride_z,  # of a row
    stride_residual,
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
    """One program takes the gradients of BLOCK_M pairs back to their z."""
    i_m = tl.program_id(0).to(tl.int64) * BLOCK_M
    o_m = tl.arange(0, BLOCK_M)
    o_c = tl.arange(0, BLOCK_C)
    m_m, m_c = o_m < pairs - i_m, o_c < channels
    PRODUCT: tl.constexpr = p_p.dtype.element_ty
    EXACT: tl.constexpr = PRECISION == "ieee" and p_p.dtype.element_ty == tl.float32

    b_z = load_rows(p_z + i_m * stride_z, o_m, o_c, stride_z, m_m, m_c, EVEN_M, EVEN)
    b_n, _ = unit_rows(b_z, p_stats + i_m, o_m, pairs, m_m, m_c, EVEN_M, EVEN)
    b_n = scaled(b_n, p_norm_weight, p_norm_bias, o_c, m_c).to(PRODUCT)
    if p_mask is not None:
        b_mask = tl.load(p_mask + i_m + o_m, mask=m_m, other=0) != 0

    b_grad_n = tl.zeros([BLOCK_M, BLOCK_C], tl.float32)
    b_lost = tl.zeros([BLOCK_M, BLOCK_C], tl.float32)
    for i_o in range(0, 2 * channels, BLOCK_O):
        o_o = i_o + tl.arange(0, BLOCK_O)
        m_o = o_o < 2 * channels
        b_wp = load_rows(p_p, o_o, o_c, channels, m_o, m_c, EVEN, EVEN)  # [O, C]
        b_wg = load_rows(p_g, o_o, o_c, channels, m_o, m_c, EVEN, EVEN)
        o_e = o_o + tl.where(o_o < channels, 0, gap)
        b_grad = tl.trans(load_first(p_edges + i_m, o_e, o_m, pairs, m_o, m_m, EVEN_M, EVEN))
        b_p = dot(b_n, tl.trans(b_wp), PRECISION)  # [M, O]
        b_gate = sigmoid(dot(b_n, tl.trans(b_wg), PRECISION), EXACT)
        b_of_p = b_grad.to(tl.float32) * b_gate
        if p_mask is not None:
            # Not a mask of the load: one by pairs would have it move two bytes at a time.
            b_of_p = tl.where(b_mask[:, None], b_of_p, 0.0)
        b_of_g = (b_of_p * b_p * (1.0 - b_gate)).to(PRODUCT)
        b_of_p = b_of_p.to(PRODUCT)
        b_grad_n, b_lost = add_product(b_of_p, b_wp, b_grad_n, b_lost, PRECISION)
        b_grad_n, b_lost = add_product(b_of_g, b_wg, b_grad_n, b_lost, PRECISION)
    for i_o in range(0, channels, BLOCK_O):
        o_o = i_o + tl.arange(0, BLOCK_O)
        m_o = o_o < channels
        b_wg = load_rows(p_g_out, o_o, o_c, channels, m_o, m_c, EVEN, EVEN)
        p_rows = p_grad_gate + i_m * channels
        b_of_g = load_rows(p_rows, o_m, o_o, channels, m_m, m_o, EVEN_M, EVEN)
        b_of_g = b_of_g.to(PRODUCT)
        b_grad_n, b_lost = add_product(b_of_g, b_wg, b_grad_n, b_lost, PRECISION)

    # Read again: kept over the loops, it would take registers from them.
    b_z = load_rows(p_z + i_m * stride_z, o_m, o_c, stride_z, m_m, m_c, EVEN_M, EVEN)
    b_normal, b_rstd = unit_rows(b_z, p_stats + i_m, o_m, pairs, m_m, m_c, EVEN_M, EVEN)
    if p_sums is not None:
        store_sums(p_sums, tl.program_id(0), b_grad_n, b_normal, o_c, channels)
    if p_grad_z is not None:
        # Where the gradients of the gates lie, too: each element depends on what was read there.
        b_grad_n *= load_channels(p_norm_weight, o_c, m_c, 1.0)
        b_grad_z = grad_of_normalised(b_grad_n, b_normal, b_rstd, channels)
        if p_residual is not None:
            p_rows = p_residual + i_m * stride_residual
            b_residual = load_rows(p_rows, o_m, o_c, stride_residual, m_m, m_c, EVEN_M, EVEN)
            b_grad_z += b_residual.to(tl.float32)
        b_grad_z = b_grad_z.to(p_grad_z.dtype.element_ty)
        p_tile = p_grad_z + i_m * channels + o_m[:, None] * channels + o_c[None, :]
        store_tile(p_tile, b_grad_z, m_m[:, None] & m_c[None, :], EVEN_M and EVEN)

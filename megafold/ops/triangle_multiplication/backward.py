"""Triangle multiplication backward in Triton: a kernel before the products, and one behind them.

Letters and names as in ``forward.py``. Both kernels compute again what the forward pass had in
registers. What the gradients of the weights are products of, over all pairs, is written for the
vendor's library, which multiplies it; the norms' parameters have a sum for every program, which
the host adds up in order: there are no atomics.
"""

from __future__ import annotations

import triton
import triton.language as tl

from megafold.ops.layer_norm.kernels import grad_of_normalised, load_channels
from megafold.ops.triangle_multiplication.tiles import (
    channel_first,
    load_rows,
    load_turned,
    scaled,
    store_sums,
    unit_rows,
)


@triton.jit
def grad_output_kernel(
    p_grad,  # [M, C], neighbours along C: gradient of the output
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
    p_grad_u,  # [rows, C], written: of the projected y; or None
    p_y,  # [rows, C], written where p_grad_u is: x normalised
    p_sums,  # fp32 [programs of all launches, 2, C], written; or None
    stride_grad,  # of a row
    stride_z,
    pairs,
    channels,
    first,  # pair of this launch; BLOCK_M divides it
    rows,  # pairs of this launch
    EVEN: tl.constexpr,  # BLOCK_C is C
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """One program takes the gradient of BLOCK_M pairs back to their x and their gates."""
    i_r = tl.program_id(0).to(tl.int64) * BLOCK_M  # within the launch
    i_m = first + i_r
    o_m = tl.arange(0, BLOCK_M)
    o_c = tl.arange(0, BLOCK_C)
    m_m, m_c = o_m < rows - i_r, o_c < channels
    m_x = m_c[:, None] & m_m[None, :]
    PRODUCT: tl.constexpr = p_p.dtype.element_ty

    b_x = tl.trans(tl.load(channel_first(p_x + i_m, o_c, o_m, pairs), mask=m_x, other=0.0))
    b_y, _ = unit_rows(b_x, p_stats_out + i_m, o_m, pairs, m_m, m_c)
    b_y = scaled(b_y, p_norm_out_weight, p_norm_out_bias, o_c, m_c).to(PRODUCT)
    b_z = load_rows(p_z + i_m * stride_z, o_m, o_c, stride_z, m_m, m_c, EVEN)
    b_n, _ = unit_rows(b_z, p_stats_in + i_m, o_m, pairs, m_m, m_c)
    b_n = scaled(b_n, p_norm_in_weight, p_norm_in_bias, o_c, m_c).to(PRODUCT)
    if p_grad_u is not None:
        p_rows = p_y + i_r * channels + o_m[:, None] * channels + o_c[None, :]
        tl.store(p_rows, b_y, mask=m_m[:, None] & m_c[None, :])

    b_grad_y = tl.zeros([BLOCK_M, BLOCK_C], tl.float32)
    for i_o in range(0, channels, BLOCK_O):
        o_o = i_o + tl.arange(0, BLOCK_O)
        m_o = o_o < channels
        m = m_m[:, None] & m_o[None, :]
        o_tile = o_m[:, None] * channels + o_o[None, :]
        b_p = load_turned(p_p, o_o, o_c, channels, m_o, m_c, EVEN)  # [C, O]
        b_u = tl.dot(b_y, b_p, input_precision=PRECISION)  # [M, O]
        b_g = load_turned(p_g, o_o, o_c, channels, m_o, m_c, EVEN)
        b_gate = tl.sigmoid(tl.dot(b_n, b_g, input_precision=PRECISION))
        b_grad = load_rows(p_grad + i_m * stride_grad, o_m, o_o, stride_grad, m_m, m_o, False)
        b_of_u = b_grad.to(tl.float32) * b_gate
        if p_grad_gate is not None:
            b_of_gate = b_of_u * b_u * (1.0 - b_gate)
            tl.store(
                p_grad_gate + i_m * channels + o_tile,
                b_of_gate.to(p_grad_gate.dtype.element_ty),
                mask=m,
            )
        b_of_u = b_of_u.to(PRODUCT)
        if p_grad_u is not None:
            tl.store(p_grad_u + i_r * channels + o_tile, b_of_u, mask=m)
        b_grad_y = tl.dot(b_of_u, tl.trans(b_p), b_grad_y, input_precision=PRECISION)

    # Read again: kept over the loop, it would take registers from it.
    b_x = tl.trans(tl.load(channel_first(p_x + i_m, o_c, o_m, pairs), mask=m_x, other=0.0))
    b_normal, b_rstd = unit_rows(b_x, p_stats_out + i_m, o_m, pairs, m_m, m_c)
    if p_sums is not None:
        i_program = first // BLOCK_M + tl.program_id(0)
        store_sums(p_sums, i_program, b_grad_y, b_normal, o_c, channels)
    if p_grad_x is not None:
        b_grad_y *= load_channels(p_norm_out_weight, o_c, m_c, 1.0)
        b_grad_x = grad_of_normalised(b_grad_y, b_normal, b_rstd, channels)
        b_grad_x = tl.trans(b_grad_x.to(p_grad_x.dtype.element_ty))
        tl.store(channel_first(p_grad_x + i_m, o_c, o_m, pairs), b_grad_x, mask=m_x)


@triton.jit
def grad_input_kernel(
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
    p_grad_z,  # [M, C], contiguous, written; may be p_grad_gate; or None
    p_parts,  # [5 C, rows], written: gradients of p n, g n and g_out n; or None
    p_n,  # [C, rows], written where p_parts is: the normalised z
    p_sums,  # fp32 [programs of all launches, 2, C], written; or None
    stride_z,  # of a row
    pairs,
    channels,
    gap,
    first,  # pair of this launch; BLOCK_M divides it
    rows,  # pairs of this launch
    EVEN: tl.constexpr,  # BLOCK_C is C
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """One program takes the gradients of BLOCK_M pairs back to their z."""
    i_r = tl.program_id(0).to(tl.int64) * BLOCK_M  # within the launch
    i_m = first + i_r
    o_m = tl.arange(0, BLOCK_M)
    o_c = tl.arange(0, BLOCK_C)
    m_m, m_c = o_m < rows - i_r, o_c < channels
    PRODUCT: tl.constexpr = p_p.dtype.element_ty

    b_z = load_rows(p_z + i_m * stride_z, o_m, o_c, stride_z, m_m, m_c, EVEN)
    b_n, _ = unit_rows(b_z, p_stats + i_m, o_m, pairs, m_m, m_c)
    b_n = tl.trans(scaled(b_n, p_norm_weight, p_norm_bias, o_c, m_c).to(PRODUCT))  # [C, M]
    if p_parts is not None:
        tl.store(channel_first(p_n + i_r, o_c, o_m, rows), b_n, mask=m_c[:, None] & m_m[None, :])
    m_edges = m_m
    if p_mask is not None:
        m_edges = m_m & (tl.load(p_mask + i_m + o_m, mask=m_m, other=0) != 0)

    b_grad_n = tl.zeros([BLOCK_C, BLOCK_M], tl.float32)
    for i_o in range(0, 2 * channels, BLOCK_O):
        o_o = i_o + tl.arange(0, BLOCK_O)
        m_o = o_o < 2 * channels
        b_wp = load_rows(p_p, o_o, o_c, channels, m_o, m_c, EVEN)  # [O, C]
        b_wg = load_rows(p_g, o_o, o_c, channels, m_o, m_c, EVEN)
        b_p = tl.dot(b_wp, b_n, input_precision=PRECISION)  # [O, M]
        b_gate = tl.sigmoid(tl.dot(b_wg, b_n, input_precision=PRECISION))
        p_tile = channel_first(p_edges + i_m, o_o + tl.where(o_o < channels, 0, gap), o_m, pairs)
        b_grad = tl.load(p_tile, mask=m_o[:, None] & m_edges[None, :], other=0.0)
        b_of_p = b_grad.to(tl.float32) * b_gate
        b_of_g = (b_of_p * b_p * (1.0 - b_gate)).to(PRODUCT)
        b_of_p = b_of_p.to(PRODUCT)
        if p_parts is not None:
            m = m_o[:, None] & m_m[None, :]
            tl.store(channel_first(p_parts + i_r, o_o, o_m, rows), b_of_p, mask=m)
            tl.store(channel_first(p_parts + i_r, 2 * channels + o_o, o_m, rows), b_of_g, mask=m)
        b_grad_n = tl.dot(tl.trans(b_wp), b_of_p, b_grad_n, input_precision=PRECISION)
        b_grad_n = tl.dot(tl.trans(b_wg), b_of_g, b_grad_n, input_precision=PRECISION)
    for i_o in range(0, channels, BLOCK_O):
        o_o = i_o + tl.arange(0, BLOCK_O)
        m_o = o_o < channels
        b_wg = load_rows(p_g_out, o_o, o_c, channels, m_o, m_c, EVEN)
        p_gates = p_grad_gate + i_m * channels + o_m[:, None] * channels + o_o[None, :]
        b_of_g = tl.load(p_gates, mask=m_m[:, None] & m_o[None, :], other=0.0)
        b_of_g = tl.trans(b_of_g.to(PRODUCT))  # [O, M]
        if p_parts is not None:
            p_part = channel_first(p_parts + i_r, 4 * channels + o_o, o_m, rows)
            tl.store(p_part, b_of_g, mask=m_o[:, None] & m_m[None, :])
        b_grad_n = tl.dot(tl.trans(b_wg), b_of_g, b_grad_n, input_precision=PRECISION)

    # Read again: kept over the loops, it would take registers from them.
    b_grad_n = tl.trans(b_grad_n)  # [M, C]
    b_z = load_rows(p_z + i_m * stride_z, o_m, o_c, stride_z, m_m, m_c, EVEN)
    b_normal, b_rstd = unit_rows(b_z, p_stats + i_m, o_m, pairs, m_m, m_c)
    if p_sums is not None:
        i_program = first // BLOCK_M + tl.program_id(0)
        store_sums(p_sums, i_program, b_grad_n, b_normal, o_c, channels)
    if p_grad_z is not None:
        # Where the gradients of the gates lie, too: each element depends on what was read there.
        b_grad_n *= load_channels(p_norm_weight, o_c, m_c, 1.0)
        b_grad_z = grad_of_normalised(b_grad_n, b_normal, b_rstd, channels)
        p_rows = p_grad_z + i_m * channels + o_m[:, None] * channels + o_c[None, :]
        b_grad_z = b_grad_z.to(p_grad_z.dtype.element_ty)
        tl.store(p_rows, b_grad_z, mask=m_m[:, None] & m_c[None, :])

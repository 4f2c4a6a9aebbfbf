"""Triangle multiplication forward in Triton: a kernel before the product, and one behind it.

Letters: M pairs (of all batch entries), C channels, O outputs of a projection. The product over
triangles, between the two, is one batched product over channels by the vendor's library, which
wants channels first: so the first kernel writes a and b, and the second reads the product, as
``[C, M]``, with neighbouring pairs neighbours in memory.

The normalised z, everything that is gated, and the update before dropout and the residual exist in
registers only; both norms' statistics are kept, fp32 ``[2, M]`` (mean, one over the standard
deviation). Products accumulate in fp32, their operands have the dtype of the weights.

Names: ``p_`` pointer, ``o_`` offsets, ``m_`` mask, ``b_`` block, ``i_`` index.
"""

from __future__ import annotations

import triton
import triton.language as tl

from megafold.ops.exact import sigmoid
from megafold.ops.layer_norm.kernels import centred_and_rstd
from megafold.ops.products import dot
from megafold.ops.triangle_multiplication.tiles import (
    channel_first,
    load_dropout,
    load_rows,
    load_turned,
    scaled,
    unit_rows,
)


@triton.jit
def project_kernel(
    p_z,  # [M, C], neighbours along C
    p_mask,  # bool [M] or None
    p_norm_weight,  # [C] or None
    p_norm_bias,  # [C] or None
    p_p,  # [2 C, C], contiguous, as all weights are
    p_g,  # [2 C, C]
    p_edges,  # [2 C, M], written: a, then b
    p_stats,  # fp32 [2, M], written: of z
    stride_z,  # of a row
    eps,
    pairs,
    channels,
    EVEN: tl.constexpr,  # BLOCK_C is C
    PRECISION: tl.constexpr,  # of fp32 products
    BLOCK_M: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """One program computes all channels of a and b for BLOCK_M pairs."""
    EXACT: tl.constexpr = PRECISION == "ieee" and p_p.dtype.element_ty == tl.float32
    i_m = tl.program_id(0).to(tl.int64) * BLOCK_M
    o_m = tl.arange(0, BLOCK_M)
    o_c = tl.arange(0, BLOCK_C)
    m_m, m_c = o_m < pairs - i_m, o_c < channels
    b_z = load_rows(p_z + i_m * stride_z, o_m, o_c, stride_z, m_m, m_c, False, EVEN).to(tl.float32)
    b_centred, b_mean, b_rstd = centred_and_rstd(b_z, m_c[None, :], channels, eps)
    tl.store(p_stats + i_m + o_m, b_mean, mask=m_m)
    tl.store(p_stats + pairs + i_m + o_m, b_rstd, mask=m_m)
    b_n = scaled(b_centred * b_rstd[:, None], p_norm_weight, p_norm_bias, o_c, m_c)
    b_n = tl.trans(b_n.to(p_p.dtype.element_ty))  # [C, M]
    if p_mask is not None:
        b_mask = tl.load(p_mask + i_m + o_m, mask=m_m, other=0) != 0
    for i_o in range(0, 2 * channels, BLOCK_O):
        o_o = i_o + tl.arange(0, BLOCK_O)
        m_o = o_o < 2 * channels
        b_p = load_rows(p_p, o_o, o_c, channels, m_o, m_c, False, EVEN)
        b_p = dot(b_p, b_n, PRECISION)  # [O, M]
        b_g = load_rows(p_g, o_o, o_c, channels, m_o, m_c, False, EVEN)
        b_g = dot(b_g, b_n, PRECISION)
        b_edges = b_p * sigmoid(b_g, EXACT)
        if p_mask is not None:
            b_edges = tl.where(b_mask[None, :], b_edges, 0.0)
        p_tile = channel_first(p_edges + i_m, o_o, o_m, pairs)
        b_edges = b_edges.to(p_edges.dtype.element_ty)
        tl.store(p_tile, b_edges, mask=m_o[:, None] & m_m[None, :])


@triton.jit
def output_kernel(
    p_x,  # [C, M]: the product over triangles
    p_z,  # [M, C], neighbours along C
    p_norm_in_weight,  # [C] or None, as the norms' other parameters are
    p_norm_in_bias,
    p_norm_out_weight,
    p_norm_out_bias,
    p_p,  # [C, C]
    p_g,  # [C, C]
    p_stats_in,  # fp32 [2, M]: of z
    p_dropout,  # [B, N, N, C], what the update is multiplied by; or None
    p_residual,  # [M, C]: z once more, where the update is added to it; or None
    p_out,  # [M, C], contiguous, written
    p_stats_out,  # fp32 [2, M], written: of x
    stride_z,  # of a row
    tokens,  # N
    dropout_b,  # strides, 0 where it repeats
    dropout_i,
    dropout_j,
    dropout_c,
    eps,
    pairs,
    channels,
    EVEN: tl.constexpr,  # BLOCK_C is C
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """One program computes the output of BLOCK_M pairs."""
    i_m = tl.program_id(0).to(tl.int64) * BLOCK_M
    o_m = tl.arange(0, BLOCK_M)
    o_c = tl.arange(0, BLOCK_C)
    m_m, m_c = o_m < pairs - i_m, o_c < channels
    PRODUCT: tl.constexpr = p_p.dtype.element_ty
    EXACT: tl.constexpr = PRECISION == "ieee" and p_p.dtype.element_ty == tl.float32

    m_x = m_c[:, None] & m_m[None, :]
    b_x = tl.load(channel_first(p_x + i_m, o_c, o_m, pairs), mask=m_x, other=0.0)
    b_x = tl.trans(b_x).to(tl.float32)  # [M, C]
    b_centred, b_mean, b_rstd = centred_and_rstd(b_x, m_c[None, :], channels, eps)
    tl.store(p_stats_out + i_m + o_m, b_mean, mask=m_m)
    tl.store(p_stats_out + pairs + i_m + o_m, b_rstd, mask=m_m)
    b_y = scaled(b_centred * b_rstd[:, None], p_norm_out_weight, p_norm_out_bias, o_c, m_c)
    b_y = b_y.to(PRODUCT)
    b_z = load_rows(p_z + i_m * stride_z, o_m, o_c, stride_z, m_m, m_c, False, EVEN)
    b_n, _ = unit_rows(b_z, p_stats_in + i_m, o_m, pairs, m_m, m_c, False, EVEN)
    b_n = scaled(b_n, p_norm_in_weight, p_norm_in_bias, o_c, m_c).to(PRODUCT)
    for i_o in range(0, channels, BLOCK_O):
        o_o = i_o + tl.arange(0, BLOCK_O)
        m_o = o_o < channels
        b_p = load_turned(p_p, o_o, o_c, channels, m_o, m_c, EVEN)  # [C, O]
        b_u = dot(b_y, b_p, PRECISION)  # [M, O]
        b_g = load_turned(p_g, o_o, o_c, channels, m_o, m_c, EVEN)
        b_g = dot(b_n, b_g, PRECISION)
        b_out = b_u * sigmoid(b_g, EXACT)
        if p_dropout is not None:
            b_out *= load_dropout(
                p_dropout, i_m, o_m, o_o, tokens, dropout_b, dropout_i, dropout_j, dropout_c,
                m_m, m_o, False, EVEN,
            )  # fmt: skip
        if p_residual is not None:  # from the cache, where b_z would take registers from the loop
            p_rows = p_residual + i_m * stride_z
            b_residual = load_rows(p_rows, o_m, o_o, stride_z, m_m, m_o, False, EVEN)
            b_out += b_residual.to(tl.float32)
        p_tile = p_out + i_m * channels + o_m[:, None] * channels + o_o[None, :]
        b_out = b_out.to(p_out.dtype.element_ty)
        tl.store(p_tile, b_out, mask=m_m[:, None] & m_o[None, :])

"""LayerNorm + Linear in Triton: one kernel forward, one backward, and the sum of its parts.

Letters: M rows, C channels, O outputs. The normalised x exists in registers only, in the dtype
of the weight, as tensor cores take it; statistics are fp32 ``[2, M]`` (mean, one over the
standard deviation), and every product accumulates in fp32.

The backward pass reads x and the gradient of the output once. All that it needs for the
parameters follows from two sums over rows, with x^ the x normalised without scale and offset:
``S = grad^T x^`` ``[O, C]`` and ``t = sum of grad`` ``[O]``. They give

- weight: ``S * norm_weight + t norm_bias^T``;  bias: ``t``
- norm_weight: ``sum over O of weight * S``;  norm_bias: ``weight^T t``

so that nothing else is summed over rows. Programs sum over rows of their own, and one kernel
adds up what they found, in a fixed order.

Names: ``p_`` pointer, ``o_`` offsets, ``m_`` mask, ``b_`` block, ``i_`` index.
"""

from __future__ import annotations

import triton
import triton.language as tl

from megafold.ops.layer_norm.kernels import (
    centred_and_rstd,
    grad_of_normalised,
    load_channels,
)


@triton.jit
def load_rows(p, o_m, o_c, stride, m_m, m_c, EVEN: tl.constexpr):
    """Rows ``o_m``, columns ``o_c`` of a matrix; zeros outside. EVEN: there is every column."""
    p_tile = p + o_m.to(tl.int64)[:, None] * stride + o_c[None, :]
    if EVEN:
        return tl.load(p_tile, mask=m_m[:, None], other=0.0)
    else:
        return tl.load(p_tile, mask=m_m[:, None] & m_c[None, :], other=0.0)


@triton.jit
def load_turned(p, o_o, o_c, stride, outs, m_c, EVEN: tl.constexpr):
    """The transpose ``[C, O]`` of rows ``o_o`` of the weight ``[O, C]``; zeros outside."""
    p_tile = p + o_o.to(tl.int64)[None, :] * stride + o_c[:, None]
    if EVEN:
        return tl.load(p_tile, mask=(o_o < outs)[None, :], other=0.0)
    else:
        return tl.load(p_tile, mask=(o_o < outs)[None, :] & m_c[:, None], other=0.0)


@triton.jit
def scaled(b_normal, p_norm_weight, p_norm_bias, o_c, m_c):
    """The normalised x with scale and offset, zero where there is no channel."""
    b_normal = b_normal * load_channels(p_norm_weight, o_c, m_c, 1.0)
    return b_normal + tl.where(m_c[None, :], load_channels(p_norm_bias, o_c, m_c, 0.0), 0.0)


@triton.jit
def forward_kernel(
    p_x,  # [M, C], neighbours along C
    p_norm_weight,  # [C] or None
    p_norm_bias,  # [C] or None
    p_weight,  # [O, C], neighbours along C
    p_bias,  # [O] or None
    p_out,  # [M, O], contiguous, written
    p_stats,  # fp32 [2, M], written
    stride_x,  # of a row
    stride_w,  # of a row
    eps,
    rows,
    channels,
    outs,
    per_program,  # blocks of BLOCK_O outputs
    splits,  # programs that share BLOCK_M rows
    EVEN: tl.constexpr,  # BLOCK_C is C
    BLOCK_M: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """One program normalises BLOCK_M rows and computes ``per_program`` blocks of outputs."""
    i_split = tl.program_id(0) % splits
    o_m = (tl.program_id(0) // splits).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    m_m = o_m < rows
    o_c = tl.arange(0, BLOCK_C)
    m_c = o_c < channels

    b_x = load_rows(p_x, o_m, o_c, stride_x, m_m, m_c, EVEN).to(tl.float32)
    b_centred, b_mean, b_rstd = centred_and_rstd(b_x, m_c[None, :], channels, eps)
    b_n = scaled(b_centred * b_rstd[:, None], p_norm_weight, p_norm_bias, o_c, m_c)
    b_n = b_n.to(p_weight.dtype.element_ty)
    if i_split == 0:
        tl.store(p_stats + o_m, b_mean, mask=m_m)
        tl.store(p_stats + rows + o_m, b_rstd, mask=m_m)

    last = tl.minimum((i_split + 1) * per_program, tl.cdiv(outs, BLOCK_O))
    for i_block in range(i_split * per_program, last):
        o_o = i_block * BLOCK_O + tl.arange(0, BLOCK_O)
        m_o = o_o < outs
        b_w = load_turned(p_weight, o_o, o_c, stride_w, outs, m_c, EVEN)
        b_out = tl.dot(b_n, b_w)
        if p_bias is not None:
            b_out += tl.load(p_bias + o_o, mask=m_o, other=0.0).to(tl.float32)[None, :]
        p_tile = p_out + o_m[:, None] * outs + o_o[None, :]
        tl.store(p_tile, b_out.to(p_out.dtype.element_ty), mask=m_m[:, None] & m_o[None, :])


@triton.jit
def load_normal(p_x, p_stats, o_m, o_c, stride_x, rows, m_m, m_c, EVEN: tl.constexpr):
    """Rows of x normalised without scale and offset, fp32, and one over their deviation."""
    b_x = load_rows(p_x, o_m, o_c, stride_x, m_m, m_c, EVEN).to(tl.float32)
    b_mean = tl.load(p_stats + o_m, mask=m_m, other=0.0)
    b_rstd = tl.load(p_stats + rows + o_m, mask=m_m, other=0.0)
    b_normal = (b_x - b_mean[:, None]) * b_rstd[:, None]
    return b_normal if EVEN else tl.where(m_c[None, :], b_normal, 0.0), b_rstd


@triton.jit
def backward_kernel(
    p_grad,  # [M, O], neighbours along O
    p_x,  # [M, C], neighbours along C
    p_norm_weight,  # [C] or None
    p_weight,  # [O, C], neighbours along C
    p_stats,  # fp32 [2, M]
    p_grad_x,  # [M, C], contiguous, written; or None
    p_products,  # fp32 [groups, O, C], written: S of each group of rows; or None
    p_totals,  # fp32 [groups, O], written: t of each group; or None
    stride_g,  # of a row
    stride_x,
    stride_w,
    rows,
    channels,
    outs,
    per_group,  # steps of SLICES blocks of rows
    EVEN: tl.constexpr,  # BLOCK_C is C
    EVEN_O: tl.constexpr,  # BLOCK_O divides O
    SLICES: tl.constexpr,  # blocks of BLOCK_O outputs
    BLOCK_M: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """SLICES programs take one group of rows; each sums over all of them for its own outputs.

    In every step of SLICES blocks of rows each program also takes the gradient of x for one
    block. All of them are at about the same rows, so that what one reads the others find in
    the cache.
    """
    i_slice = tl.program_id(0) % SLICES
    i_group = (tl.program_id(0) // SLICES).to(tl.int64)
    o_c = tl.arange(0, BLOCK_C)
    m_c = o_c < channels
    o_own = i_slice * BLOCK_O + tl.arange(0, BLOCK_O)
    PRODUCT: tl.constexpr = p_weight.dtype.element_ty

    b_product = tl.zeros([BLOCK_O, BLOCK_C], tl.float32)
    b_total = tl.zeros([BLOCK_O], tl.float32)
    b_norm_weight = load_channels(p_norm_weight, o_c, m_c, 1.0)
    if SLICES == 1:
        b_w = load_rows(p_weight, o_own, o_c, stride_w, o_own < outs, m_c, EVEN)
        for i_step in range(per_group):
            o_m = (i_group * per_group + i_step) * BLOCK_M + tl.arange(0, BLOCK_M)
            m_m = o_m < rows
            b_grad = load_rows(p_grad, o_m, o_own, stride_g, m_m, o_own < outs, EVEN_O)
            b_normal, b_rstd = load_normal(
                p_x, p_stats, o_m, o_c, stride_x, rows, m_m, m_c, EVEN
            )  # fmt: skip
            if p_products is not None:
                b_product = tl.dot(tl.trans(b_grad), b_normal.to(PRODUCT), b_product)
            if p_totals is not None:
                b_total += tl.sum(b_grad.to(tl.float32), axis=0)
            if p_grad_x is not None:
                b_of_n = tl.dot(b_grad, b_w) * b_norm_weight
                b_grad_x = grad_of_normalised(b_of_n, b_normal, b_rstd, channels)
                p_tile = p_grad_x + o_m[:, None] * channels + o_c[None, :]
                b_grad_x = b_grad_x.to(p_grad_x.dtype.element_ty)
                tl.store(p_tile, b_grad_x, mask=m_m[:, None] & m_c[None, :])
    else:
        for i_step in range(per_group):
            i_first = (i_group * per_group + i_step) * SLICES
            # The last step may be short; where there are few rows there is no other.
            there = (tl.cdiv(rows, BLOCK_M) - i_first).to(tl.int32)
            if p_products is not None:
                for i in range(tl.minimum(there, SLICES)):
                    o_m = (i_first + i) * BLOCK_M + tl.arange(0, BLOCK_M)
                    m_m = o_m < rows
                    b_grad = load_rows(p_grad, o_m, o_own, stride_g, m_m, o_own < outs, EVEN_O)
                    b_normal, _ = load_normal(
                        p_x, p_stats, o_m, o_c, stride_x, rows, m_m, m_c, EVEN
                    )  # fmt: skip
                    b_product = tl.dot(tl.trans(b_grad), b_normal.to(PRODUCT), b_product)
                    if p_totals is not None:
                        b_total += tl.sum(b_grad.to(tl.float32), axis=0)
            if p_grad_x is not None:
                o_m = (i_first + i_slice) * BLOCK_M + tl.arange(0, BLOCK_M)
                m_m = o_m < rows
                b_of_n = tl.zeros([BLOCK_M, BLOCK_C], tl.float32)
                for i_o in range(0, tl.where(i_slice < there, SLICES * BLOCK_O, 0), BLOCK_O):
                    o_o = i_o + tl.arange(0, BLOCK_O)
                    b_grad = load_rows(p_grad, o_m, o_o, stride_g, m_m, o_o < outs, EVEN_O)
                    b_w = load_rows(p_weight, o_o, o_c, stride_w, o_o < outs, m_c, EVEN)
                    b_of_n = tl.dot(b_grad, b_w, b_of_n)
                b_normal, b_rstd = load_normal(
                    p_x, p_stats, o_m, o_c, stride_x, rows, m_m, m_c, EVEN
                )  # fmt: skip
                b_of_n *= b_norm_weight
                b_grad_x = grad_of_normalised(b_of_n, b_normal, b_rstd, channels)
                p_tile = p_grad_x + o_m[:, None] * channels + o_c[None, :]
                b_grad_x = b_grad_x.to(p_grad_x.dtype.element_ty)
                tl.store(p_tile, b_grad_x, mask=m_m[:, None] & m_c[None, :])
    if p_products is not None:
        p_tile = p_products + i_group * outs * channels
        p_tile += o_own[:, None] * channels + o_c[None, :]
        tl.store(p_tile, b_product, mask=(o_own < outs)[:, None] & m_c[None, :])
        if p_totals is not None:
            tl.store(p_totals + i_group * outs + o_own, b_total, mask=o_own < outs)


@triton.jit
def finish_kernel(
    p_products,  # fp32 [groups, O, C]: S of each group of rows
    p_totals,  # fp32 [groups, O]: t of each; or None
    p_norm_weight,  # [C] or None
    p_norm_bias,  # [C] or None
    p_weight,  # [O, C], neighbours along C
    p_grad_weight,  # [O, C], contiguous, written; or None
    p_grad_bias,  # [O], written; or None
    p_norms,  # fp32 [2, blocks of outputs, C], written: gradients of the norm's; or None
    stride_w,  # of a row
    groups,
    channels,
    outs,
    BLOCK_G: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """One program adds up the groups for one tile of the weight; see the top of this file."""
    blocks_c = tl.cdiv(channels, BLOCK_C)
    i_o, i_c = tl.program_id(0) // blocks_c, tl.program_id(0) % blocks_c
    o_o = i_o * BLOCK_O + tl.arange(0, BLOCK_O)
    o_c = i_c * BLOCK_C + tl.arange(0, BLOCK_C)
    o_g = tl.arange(0, BLOCK_G).to(tl.int64)
    m_o, m_c = o_o < outs, o_c < channels
    m = m_o[:, None] & m_c[None, :]
    p_tile = p_products + o_o[:, None] * channels + o_c[None, :]
    b_sums = tl.zeros([BLOCK_G, BLOCK_O, BLOCK_C], tl.float32)
    b_totals = tl.zeros([BLOCK_G, BLOCK_O], tl.float32)
    for i_g in range(0, groups, BLOCK_G):
        m_g = i_g + o_g < groups
        p_group = p_tile[None, :, :] + ((i_g + o_g) * outs * channels)[:, None, None]
        b_sums += tl.load(p_group, mask=m_g[:, None, None] & m[None, :, :], other=0.0)
        if p_totals is not None:
            p_total = p_totals + ((i_g + o_g) * outs)[:, None] + o_o[None, :]
            b_totals += tl.load(p_total, mask=m_g[:, None] & m_o[None, :], other=0.0)
    b_product = tl.sum(b_sums, axis=0)
    b_total = tl.sum(b_totals, axis=0)
    if p_grad_weight is not None:
        b_grad = b_product * load_channels(p_norm_weight, o_c, m_c, 1.0)
        if p_norm_bias is not None:
            b_grad += b_total[:, None] * load_channels(p_norm_bias, o_c, m_c, 0.0)
        p_own = p_grad_weight + o_o[:, None] * channels + o_c[None, :]
        tl.store(p_own, b_grad.to(p_grad_weight.dtype.element_ty), mask=m)
    if p_grad_bias is not None and i_c == 0:
        tl.store(p_grad_bias + o_o, b_total.to(p_grad_bias.dtype.element_ty), mask=m_o)
    if p_norms is not None:
        p_own = p_weight + o_o.to(tl.int64)[:, None] * stride_w + o_c[None, :]
        b_w = tl.load(p_own, mask=m, other=0.0).to(tl.float32)
        p_own = p_norms + i_o * channels + o_c
        tl.store(p_own, tl.sum(b_w * b_product, axis=0), mask=m_c)
        if p_totals is not None:
            p_own += tl.cdiv(outs, BLOCK_O) * channels
            tl.store(p_own, tl.sum(b_w * b_total[:, None], axis=0), mask=m_c)

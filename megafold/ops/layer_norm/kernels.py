"""LayerNorm by rows in Triton: for products that are left to cuBLAS.

Letters: M rows, C channels. Statistics are fp32 ``[2, M]``: the mean, and one over the standard
deviation. Everything is computed in fp32; the variance from what the mean has been taken from,
so that a large mean cancels nothing.

Names: ``p_`` pointer, ``o_`` offsets, ``m_`` mask, ``b_`` block.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def rstd_of(b_variance, eps):
    """One over the standard deviation, rounded correctly: its error is that of a whole row."""
    return tl.div_rn(1.0, tl.sqrt_rn(b_variance + eps))


@triton.jit
def centred_and_rstd(b_x, m_c, channels, eps):
    """Rows ``[M, C]`` without their mean, their mean and one over their deviation, ``[M]``.

    ``b_x`` is zero where ``m_c`` (``[1, C]``) says that there is no channel, and the result too.
    """
    b_mean = tl.sum(b_x, axis=1) / channels
    b_centred = tl.where(m_c, b_x - b_mean[:, None], 0.0)
    b_rstd = rstd_of(tl.sum(b_centred * b_centred, axis=1) / channels, eps)
    return b_centred, b_mean, b_rstd


@triton.jit
def load_channels(p, o_c, m_c, default):
    """Numbers of each channel in fp32, ``[1, C]``; ``default`` where the pointer is None."""
    if p is None:
        return tl.full([1, o_c.shape[0]], default, tl.float32)
    else:
        return tl.load(p + o_c, mask=m_c, other=0.0).to(tl.float32)[None, :]


@triton.jit
def grad_of_normalised(b_grad, b_normal, b_rstd, channels):
    """Gradient of x for that of ``(x - mean) * rstd``, both zero where there is no channel."""
    b_of_mean = tl.sum(b_grad, axis=1) / channels
    b_of_scale = tl.sum(b_grad * b_normal, axis=1) / channels
    return b_rstd[:, None] * (b_grad - b_of_mean[:, None] - b_normal * b_of_scale[:, None])


@triton.jit
def normalise_kernel(
    p_x,  # [M, C], neighbours along C
    p_weight,  # [C] or None
    p_bias,  # [C] or None
    p_out,  # [M, C], contiguous, written
    p_stats,  # fp32 [2, M]; written, or read if GIVEN
    stride_x,  # of a row
    eps,
    rows,
    channels,
    GIVEN: tl.constexpr,  # the statistics are there already
    ROWS: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """One program normalises ROWS whole rows."""
    o_m = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)  # [ROWS]
    o_c = tl.arange(0, BLOCK_C)
    m_m, m_c = o_m < rows, o_c < channels
    m = m_m[:, None] & m_c[None, :]
    b_x = tl.load(p_x + o_m[:, None] * stride_x + o_c[None, :], mask=m, other=0.0).to(tl.float32)
    if GIVEN:
        b_mean = tl.load(p_stats + o_m, mask=m_m, other=0.0)
        b_rstd = tl.load(p_stats + rows + o_m, mask=m_m, other=0.0)
        b_centred = b_x - b_mean[:, None]
    else:
        b_centred, b_mean, b_rstd = centred_and_rstd(b_x, m_c[None, :], channels, eps)
        tl.store(p_stats + o_m, b_mean, mask=m_m)
        tl.store(p_stats + rows + o_m, b_rstd, mask=m_m)
    b_out = b_centred * b_rstd[:, None] * load_channels(p_weight, o_c, m_c, 1.0)
    b_out += load_channels(p_bias, o_c, m_c, 0.0)
    p_tile = p_out + o_m[:, None] * channels + o_c[None, :]
    tl.store(p_tile, b_out.to(p_out.dtype.element_ty), mask=m)


@triton.jit
def gradient_kernel(
    p_grad,  # [M, C], contiguous: gradient of the normalised x
    p_x,  # [M, C], neighbours along C
    p_weight,  # [C] or None
    p_stats,  # fp32 [2, M]
    p_grad_x,  # [M, C], contiguous, written; may be p_grad; or None
    p_sums,  # fp32 [2, programs, C], written: gradients of weight and bias; or None
    stride_x,  # of a row
    rows,
    channels,
    per_program,  # blocks of ROWS rows
    ROWS: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """One program takes ``per_program`` blocks of whole rows, and sums over them."""
    o_c = tl.arange(0, BLOCK_C)
    m_c = o_c < channels
    b_weight = load_channels(p_weight, o_c, m_c, 1.0)
    b_of_weight = tl.zeros([ROWS, BLOCK_C], tl.float32)
    b_of_bias = tl.zeros([ROWS, BLOCK_C], tl.float32)
    first = tl.program_id(0).to(tl.int64) * per_program * ROWS
    for i in range(per_program):
        o_m = first + i * ROWS + tl.arange(0, ROWS)
        m_m = o_m < rows
        m = m_m[:, None] & m_c[None, :]
        p_tile = o_m[:, None] * channels + o_c[None, :]
        b_grad = tl.load(p_grad + p_tile, mask=m, other=0.0).to(tl.float32)
        b_x = tl.load(p_x + o_m[:, None] * stride_x + o_c[None, :], mask=m, other=0.0)
        b_mean = tl.load(p_stats + o_m, mask=m_m, other=0.0)
        b_rstd = tl.load(p_stats + rows + o_m, mask=m_m, other=0.0)
        b_normal = tl.where(m, (b_x.to(tl.float32) - b_mean[:, None]) * b_rstd[:, None], 0.0)
        if p_sums is not None:
            b_of_weight += b_grad * b_normal
            b_of_bias += b_grad
        if p_grad_x is not None:
            b_grad_x = grad_of_normalised(b_grad * b_weight, b_normal, b_rstd, channels)
            tl.store(p_grad_x + p_tile, b_grad_x.to(p_grad_x.dtype.element_ty), mask=m)
    if p_sums is not None:
        p_own = p_sums + tl.program_id(0) * channels + o_c
        tl.store(p_own, tl.sum(b_of_weight, axis=0), mask=m_c)
        tl.store(p_own + tl.num_programs(0) * channels, tl.sum(b_of_bias, axis=0), mask=m_c)

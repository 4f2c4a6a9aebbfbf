"""The modulation of adaptive LayerNorm in Triton: ``sigmoid(gate) * layer_norm(a) + shift``.

Letters: M rows of a, K rows of the condition, C channels. Row m of a has the condition
``(m // inner) % K``: inner neighbouring rows share one, and so do the rows of each of the outer
repetitions (samples). The normalised a and the sigmoid exist in registers only.

Names: ``p_`` pointer, ``o_`` offsets, ``m_`` mask, ``b_`` block, ``i_`` index.
"""

from __future__ import annotations

import triton
import triton.language as tl

from megafold.ops.exact import sigmoid
from megafold.ops.layer_norm.kernels import centred_and_rstd, grad_of_normalised


@triton.jit
def modulate_kernel(
    p_a,  # [M, C], neighbours along C
    p_gate,  # [K, C], contiguous: before the sigmoid
    p_shift,  # [K, C], contiguous
    p_out,  # [M, C], contiguous, written
    p_stats,  # fp32 [2, M], written: mean, one over the standard deviation
    stride_a,  # of a row
    eps,
    rows,
    conditions,
    inner,
    channels,
    ROWS: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """One program computes ROWS whole rows."""
    o_m = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)  # [ROWS]
    o_c = tl.arange(0, BLOCK_C)
    m_m, m_c = o_m < rows, o_c < channels
    m = m_m[:, None] & m_c[None, :]
    b_a = tl.load(p_a + o_m[:, None] * stride_a + o_c[None, :], mask=m, other=0.0).to(tl.float32)
    o_own = (((o_m // inner) % conditions) * channels)[:, None] + o_c[None, :]
    b_gate = tl.load(p_gate + o_own, mask=m, other=0.0).to(tl.float32)
    b_shift = tl.load(p_shift + o_own, mask=m, other=0.0).to(tl.float32)
    b_centred, b_mean, b_rstd = centred_and_rstd(b_a, m_c[None, :], channels, eps)
    b_gate = sigmoid(b_gate, p_gate.dtype.element_ty == tl.float32)
    b_out = b_gate * (b_centred * b_rstd[:, None]) + b_shift
    p_tile = p_out + o_m[:, None] * channels + o_c[None, :]
    tl.store(p_tile, b_out.to(p_out.dtype.element_ty), mask=m)
    tl.store(p_stats + o_m, b_mean, mask=m_m)
    tl.store(p_stats + rows + o_m, b_rstd, mask=m_m)


@triton.jit
def gradient_kernel(
    p_grad,  # [M, C], neighbours along C
    p_a,  # [M, C], neighbours along C
    p_gate,  # [K, C], contiguous: before the sigmoid
    p_stats,  # fp32 [2, M]
    p_added,  # [M, C], neighbours along C: what is added to the gradient of a; or None
    p_grad_a,  # [M, C], contiguous, written; or None
    p_grad_projected,  # [groups, 2, K, C], contiguous, written: of gate and shift; or None
    stride_g,  # of a row
    stride_a,
    stride_added,
    rows,
    conditions,
    inner,
    channels,
    sharing,  # rows of a that share a condition
    per_group,  # of them that one program takes
    ROWS: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """One program takes ROWS conditions, and walks over ``per_group`` rows of each."""
    blocks = tl.cdiv(conditions, ROWS)
    i_group = tl.program_id(0) // blocks
    o_k = (tl.program_id(0) % blocks).to(tl.int64) * ROWS + tl.arange(0, ROWS)  # [ROWS]
    o_c = tl.arange(0, BLOCK_C)
    m_k, m_c = o_k < conditions, o_c < channels
    m = m_k[:, None] & m_c[None, :]
    b_gate = tl.load(p_gate + o_k[:, None] * channels + o_c[None, :], mask=m, other=0.0)
    b_gate = sigmoid(b_gate.to(tl.float32), p_gate.dtype.element_ty == tl.float32)
    b_of_gate = tl.zeros([ROWS, BLOCK_C], tl.float32)
    b_of_shift = tl.zeros([ROWS, BLOCK_C], tl.float32)
    last = tl.minimum((i_group + 1) * per_group, sharing)
    for i in range(i_group * per_group, last):
        o_m = ((i // inner) * conditions + o_k) * inner + i % inner
        b_a = tl.load(p_a + o_m[:, None] * stride_a + o_c[None, :], mask=m, other=0.0)
        b_grad = tl.load(p_grad + o_m[:, None] * stride_g + o_c[None, :], mask=m, other=0.0)
        b_grad = b_grad.to(tl.float32)
        if p_added is not None:
            p_tile = p_added + o_m[:, None] * stride_added + o_c[None, :]
            b_added = tl.load(p_tile, mask=m, other=0.0)
        b_mean = tl.load(p_stats + o_m, mask=m_k, other=0.0)
        b_rstd = tl.load(p_stats + rows + o_m, mask=m_k, other=0.0)
        b_normal = tl.where(m, (b_a.to(tl.float32) - b_mean[:, None]) * b_rstd[:, None], 0.0)
        if p_grad_projected is not None:
            b_of_gate += b_grad * b_normal
            b_of_shift += b_grad
        if p_grad_a is not None:
            b_grad_a = grad_of_normalised(b_grad * b_gate, b_normal, b_rstd, channels)
            if p_added is not None:
                b_grad_a += b_added.to(tl.float32)
            p_tile = p_grad_a + o_m[:, None] * channels + o_c[None, :]
            tl.store(p_tile, b_grad_a.to(p_grad_a.dtype.element_ty), mask=m)
    if p_grad_projected is not None:
        b_of_gate *= b_gate * (1.0 - b_gate)
        o_own = o_k[:, None] * channels + o_c[None, :]
        first = i_group.to(tl.int64) * 2
        kind = p_grad_projected.dtype.element_ty
        p_own = p_grad_projected + first * conditions * channels + o_own
        tl.store(p_own, b_of_gate.to(kind), mask=m)
        p_own = p_grad_projected + (first + 1) * conditions * channels + o_own
        tl.store(p_own, b_of_shift.to(kind), mask=m)


@triton.jit
def gradient_rows_kernel(
    p_grad,  # [M, C], neighbours along C
    p_a,  # [M, C], neighbours along C
    p_gate,  # [M, C], contiguous: before the sigmoid
    p_stats,  # fp32 [2, M]
    p_added,  # [M, C], neighbours along C: what is added to the gradient of a; or None
    p_grad_a,  # [M, C], contiguous, written; or None
    p_grad_projected,  # [M, 2 C], contiguous, written: of gate, then of shift; or None
    p_sums,  # fp32 [programs, C], written: for the gate's bias; or None
    stride_g,  # of a row
    stride_a,
    stride_added,
    rows,
    channels,
    per_program,  # blocks of ROWS rows
    ROWS: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Where every row has a condition of its own: ``per_program`` blocks of rows, and a sum."""
    o_c = tl.arange(0, BLOCK_C)
    m_c = o_c < channels
    b_sum = tl.zeros([ROWS, BLOCK_C], tl.float32)
    first = tl.program_id(0).to(tl.int64) * per_program * ROWS
    for i in range(per_program):
        o_m = first + i * ROWS + tl.arange(0, ROWS)
        m_m = o_m < rows
        m = m_m[:, None] & m_c[None, :]
        o_own = o_m[:, None] * channels + o_c[None, :]
        b_gate = tl.load(p_gate + o_own, mask=m, other=0.0).to(tl.float32)
        b_gate = sigmoid(b_gate, p_gate.dtype.element_ty == tl.float32)
        b_a = tl.load(p_a + o_m[:, None] * stride_a + o_c[None, :], mask=m, other=0.0)
        b_grad = tl.load(p_grad + o_m[:, None] * stride_g + o_c[None, :], mask=m, other=0.0)
        b_grad = b_grad.to(tl.float32)
        if p_added is not None:
            p_tile = p_added + o_m[:, None] * stride_added + o_c[None, :]
            b_added = tl.load(p_tile, mask=m, other=0.0)
        b_mean = tl.load(p_stats + o_m, mask=m_m, other=0.0)
        b_rstd = tl.load(p_stats + rows + o_m, mask=m_m, other=0.0)
        b_normal = tl.where(m, (b_a.to(tl.float32) - b_mean[:, None]) * b_rstd[:, None], 0.0)
        if p_grad_a is not None:
            b_grad_a = grad_of_normalised(b_grad * b_gate, b_normal, b_rstd, channels)
            if p_added is not None:
                b_grad_a += b_added.to(tl.float32)
            tl.store(p_grad_a + o_own, b_grad_a.to(p_grad_a.dtype.element_ty), mask=m)
        b_of_gate = b_grad * b_normal * (b_gate * (1.0 - b_gate))
        if p_grad_projected is not None:
            kind = p_grad_projected.dtype.element_ty
            p_own = p_grad_projected + o_m[:, None] * 2 * channels + o_c[None, :]
            tl.store(p_own, b_of_gate.to(kind), mask=m)
            tl.store(p_own + channels, b_grad.to(kind), mask=m)
        if p_sums is not None:
            b_sum += b_of_gate
    if p_sums is not None:
        tl.store(p_sums + tl.program_id(0) * channels + o_c, tl.sum(b_sum, axis=0), mask=m_c)


@triton.jit
def _add_up(p_sums, p_to, i, programs, channels, BLOCK_P: tl.constexpr, BLOCK_S: tl.constexpr):
    o_c = i * BLOCK_S + tl.arange(0, BLOCK_S)
    o_p = tl.arange(0, BLOCK_P)
    b_sums = tl.zeros([BLOCK_P, BLOCK_S], tl.float32)
    for start in range(0, programs, BLOCK_P):
        m = (start + o_p < programs)[:, None] & (o_c < channels)[None, :]
        p = p_sums + (start + o_p)[:, None] * channels + o_c[None, :]
        b_sums += tl.load(p, mask=m, other=0.0)
    tl.store(p_to + o_c, tl.sum(b_sums, axis=0).to(p_to.dtype.element_ty), mask=o_c < channels)


@triton.jit
def finish_kernel(
    p_both,  # [2 C, S], contiguous: gradients of the gate's weight, then of the shift's; or None
    p_of_bias,  # fp32 [programs, C]; or None
    p_of_norm,  # fp32 [programs, S]; or None
    p_gate,  # [C, S], contiguous, written as all that follow are; or None
    p_shift,  # [C, S]
    p_bias,  # [C]
    p_norm,  # [S]
    half,  # C S
    programs,
    channels,
    programs_s,
    channels_s,
    BLOCK: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    """Tensors of their own from what was multiplied as one; sums of programs, added in order.

    A program copies BLOCK consecutive elements of both weights, or adds up BLOCK_S sums.
    """
    i = tl.program_id(0)
    if p_both is not None:
        copies = tl.cdiv(half, BLOCK)
        if i < copies:
            o = i * BLOCK + tl.arange(0, BLOCK)  # [BLOCK]
            m = o < half
            if p_gate is not None:
                tl.store(p_gate + o, tl.load(p_both + o, mask=m, other=0.0), mask=m)
            if p_shift is not None:
                tl.store(p_shift + o, tl.load(p_both + half + o, mask=m, other=0.0), mask=m)
        i -= copies
    if p_of_bias is not None:
        blocks = tl.cdiv(channels, BLOCK_S)
        if (i >= 0) & (i < blocks):
            _add_up(p_of_bias, p_bias, i, programs, channels, BLOCK_P, BLOCK_S)
        i -= blocks
    if p_of_norm is not None:  # noqa: SIM102, which is known when this is compiled
        if i >= 0:
            _add_up(p_of_norm, p_norm, i, programs_s, channels_s, BLOCK_P, BLOCK_S)

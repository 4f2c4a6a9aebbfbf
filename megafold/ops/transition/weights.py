"""The gradients of the transition's parameters in Triton: products over rows, and their sums.

Letters and names as in ``forward.py``; U is one of the 3 H hidden columns that the kernel by rows
writes: gradients of gate, of value, the activation. The rows of a chunk are split among programs;
each split adds to a partial sum of its own, in fp32, over all chunks, and a last kernel adds the
splits in order (no atomics).
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def grad_weights_kernel(
    p_hidden,  # [M, 3 H], contiguous: gradients of gate, of value, activation
    p_normalised,  # [M, C], rows any distance apart
    p_grad,  # [M, C], rows any distance apart: gradient of the output
    p_partial,  # fp32 [splits, 3 H, C], written, or added to
    stride_normalised,
    stride_grad,
    rows,
    channels,
    hidden,
    per_split,  # rows of a split, a multiple of BLOCK_K
    FIRST: tl.constexpr,  # whether p_partial is written and not added to
    EVEN_M: tl.constexpr,
    EVEN_U: tl.constexpr,
    EVEN_C: tl.constexpr,
    BLOCK_U: tl.constexpr,
    BLOCK_K: tl.constexpr,  # rows of a product
    BLOCK_C: tl.constexpr,
):
    """One program multiplies BLOCK_U hidden columns with all channels over a split of the rows.

    The gradients of gate and value with the normalised rows, the activation with the gradient of
    the output.
    """
    of_pairs = tl.cdiv(2 * hidden, BLOCK_U)
    tiles = of_pairs + tl.cdiv(hidden, BLOCK_U)
    tile = tl.program_id(0) % tiles
    split = (tl.program_id(0) // tiles).to(tl.int64)
    of_out = tile >= of_pairs
    start = tl.where(of_out, 2 * hidden + (tile - of_pairs) * BLOCK_U, tile * BLOCK_U)
    end = tl.where(of_out, 3 * hidden, 2 * hidden)
    p_right = tl.where(of_out, p_grad, p_normalised)
    stride = tl.where(of_out, stride_grad, stride_normalised)
    o_u = start + tl.arange(0, BLOCK_U)
    o_k = tl.arange(0, BLOCK_K)
    o_c = tl.arange(0, BLOCK_C)
    first = split * per_split
    last = tl.minimum(first + per_split, rows)
    p_left = p_hidden + (first + o_k)[:, None] * (3 * hidden) + o_u[None, :]
    p_right = p_right + (first + o_k)[:, None] * stride + o_c[None, :]
    b_total = tl.zeros([BLOCK_U, BLOCK_C], tl.float32)
    # Blocks are counted in 32 bits: a loop over 64-bit numbers takes registers.
    for k in range(0, tl.cdiv(tl.maximum(last - first, 0), BLOCK_K).to(tl.int32)):
        if EVEN_M and EVEN_U and EVEN_C:
            b_left = tl.load(p_left)  # [BLOCK_K, BLOCK_U]
            b_right = tl.load(p_right)  # [BLOCK_K, BLOCK_C]
        else:
            m = (first + k * BLOCK_K + o_k < last)[:, None]
            b_left = tl.load(p_left, mask=m & (o_u < end)[None, :], other=0.0)
            b_right = tl.load(p_right, mask=m & (o_c < channels)[None, :], other=0.0)
        b_total = tl.dot(tl.trans(b_left), b_right, acc=b_total)
        p_left += BLOCK_K * 3 * hidden
        p_right += BLOCK_K * stride
    p = p_partial + split * 3 * hidden * channels + o_u[:, None] * channels + o_c[None, :]
    mask = (o_u < end)[:, None] & (o_c < channels)[None, :]
    if not FIRST:
        b_total += tl.load(p, mask=mask, other=0.0)
    tl.store(p, b_total, mask=mask)


@triton.jit
def _reduce_weights(
    p_partial, p_gate, p_value, p_out, i_block, splits, channels, hidden,
    BLOCK_U: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    o_u = i_block * BLOCK_U + tl.arange(0, BLOCK_U)
    o_c = tl.arange(0, BLOCK_C)
    mask = (o_u < 3 * hidden)[:, None] & (o_c < channels)[None, :]
    p = p_partial + o_u[:, None] * channels + o_c[None, :]
    b_total = tl.zeros([BLOCK_U, BLOCK_C], tl.float32)
    for _split in range(0, splits):
        b_total += tl.load(p, mask=mask, other=0.0)
        p += 3 * hidden * channels
    if p_gate is not None:
        p_tile = p_gate + o_u[:, None] * channels + o_c[None, :]
        of_gate = mask & (o_u < hidden)[:, None]
        tl.store(p_tile, b_total.to(p_gate.dtype.element_ty), mask=of_gate)
    if p_value is not None:
        p_tile = p_value + (o_u - hidden)[:, None] * channels + o_c[None, :]
        of_value = mask & ((o_u >= hidden) & (o_u < 2 * hidden))[:, None]
        tl.store(p_tile, b_total.to(p_value.dtype.element_ty), mask=of_value)
    if p_out is not None:
        p_tile = p_out + o_c[None, :] * hidden + (o_u - 2 * hidden)[:, None]
        of_out = mask & (o_u >= 2 * hidden)[:, None]
        tl.store(p_tile, b_total.to(p_out.dtype.element_ty), mask=of_out)


@triton.jit
def _reduce_sums(
    p_sums, p_weight, p_bias, i_block, programs, channels, width,
    BLOCK_P: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    o_s = i_block * BLOCK_S + tl.arange(0, BLOCK_S)  # of the weight, then of the bias if any
    o_p = tl.arange(0, BLOCK_P)
    b_sums = tl.zeros([BLOCK_P, BLOCK_S], tl.float32)
    for start in range(0, programs, BLOCK_P):
        mask = (start + o_p < programs)[:, None] & (o_s < width)[None, :]
        p = p_sums + (start + o_p).to(tl.int64)[:, None] * width + o_s[None, :]
        b_sums += tl.load(p, mask=mask, other=0.0)
    b_sum = tl.sum(b_sums, 0)
    if p_weight is not None:
        tl.store(p_weight + o_s, b_sum.to(p_weight.dtype.element_ty), mask=o_s < channels)
    if p_bias is not None:
        of_bias = (o_s >= channels) & (o_s < width)
        tl.store(p_bias + (o_s - channels), b_sum.to(p_bias.dtype.element_ty), mask=of_bias)


@triton.jit
def split_gradients_kernel(
    p_both,  # [2 H, C], contiguous: of gate's weight, then of value's; or None
    p_sums,  # fp32 [programs, width]: for the norm's weight, and bias if 2 C wide; or None
    p_gate,  # [H, C], contiguous, written as all that follow are; or None
    p_value,  # [H, C]
    p_norm_weight,  # [C]
    p_norm_bias,  # [C]
    half,  # H C
    programs,
    channels,
    width,
    BLOCK: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    """Tensors of their own from what was multiplied as one; sums added in order.

    A program copies BLOCK consecutive elements of both weights, or adds up BLOCK_S sums.
    """
    program = tl.program_id(0)
    if p_both is None:
        _reduce_sums(
            p_sums, p_norm_weight, p_norm_bias, program, programs, channels, width, BLOCK_P, BLOCK_S
        )
    else:
        copies = tl.cdiv(half, BLOCK)
        if program < copies:
            o = program * BLOCK + tl.arange(0, BLOCK)  # [BLOCK]
            m = o < half
            if p_gate is not None:
                b = tl.load(p_both + o, mask=m, other=0.0)
                tl.store(p_gate + o, b.to(p_gate.dtype.element_ty), mask=m)
            if p_value is not None:
                b = tl.load(p_both + half + o, mask=m, other=0.0)
                tl.store(p_value + o, b.to(p_value.dtype.element_ty), mask=m)
        elif p_sums is not None:
            _reduce_sums(
                p_sums, p_norm_weight, p_norm_bias, program - copies, programs, channels, width,
                BLOCK_P, BLOCK_S,
            )  # fmt: skip


@triton.jit
def reduce_gradients_kernel(
    p_partial,  # fp32 [splits, 3 H, C]; or None
    p_sums,  # fp32 [programs, 2, C]: for the norm's weight and bias; or None
    p_gate,  # [H, C], contiguous, written as all that follow are; or None
    p_value,  # [H, C]
    p_out,  # [C, H]
    p_norm_weight,  # [C]
    p_norm_bias,  # [C]
    splits,
    programs,
    channels,
    hidden,
    BLOCK_U: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    """Add partial sums in order: a program those of BLOCK_U hidden columns, or BLOCK_S sums."""
    program = tl.program_id(0)
    if p_partial is None:
        _reduce_sums(
            p_sums, p_norm_weight, p_norm_bias, program, programs, channels, 2 * channels,
            BLOCK_P, BLOCK_S,
        )  # fmt: skip
    else:
        of_weights = tl.cdiv(3 * hidden, BLOCK_U)
        if program < of_weights:
            _reduce_weights(
                p_partial, p_gate, p_value, p_out, program, splits, channels, hidden,
                BLOCK_U, BLOCK_C,
            )  # fmt: skip
        elif p_sums is not None:
            _reduce_sums(
                p_sums, p_norm_weight, p_norm_bias, program - of_weights, programs, channels,
                2 * channels, BLOCK_P, BLOCK_S,
            )  # fmt: skip

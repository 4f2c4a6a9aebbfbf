"""The transition backward in Triton: one kernel computes all that is hidden again, by rows.

Letters and names as in ``forward.py``. A program has the gradient of BLOCK_M rows of x, a sum of
its own for the gradients of the norm's parameters (the host adds the sums, in order: no
atomics), and what the weights' gradients are products of: the normalised rows, the hidden
activation, and the gradients of gate and value. These are written for a chunk of rows at a time
and multiplied by the vendor's library.
"""

from __future__ import annotations

import triton
import triton.language as tl

from megafold.ops.transition.tiles import (
    load_channel,
    load_normalised,
    load_rows,
    load_weight,
    long,
    norm_gradient,
    norm_sums,
    store_rows,
    swiglu_gradients,
)


@triton.jit
def grad_rows_kernel(
    p_x,  # [M, C], rows any distance apart
    p_norm_weight,  # [C] or None
    p_norm_bias,  # [C] or None
    p_gate,  # [H, C], contiguous, as the other weights are
    p_value,  # [H, C]
    p_out,  # [C, H]
    p_stats,  # fp32 [2, M]: mean, and one over the standard deviation; or None
    p_grad,  # [M, C], rows any distance apart: gradient of the output
    p_grad_x,  # [M, C], contiguous, written; or None
    p_sums,  # fp32 [programs, 2, C], written: for the norm's weight and bias; or None
    p_normalised,  # [M, C], contiguous, written where p_hidden is; None without a norm
    p_hidden,  # [3, M, H], contiguous, written: activation, gradients of gate and value; or None
    stride_x,
    stride_grad,
    stride_stats,  # from a row's mean to its inverse deviation
    rows,
    channels,
    hidden,
    NORM: tl.constexpr,  # whether x is normalised
    HAS_WEIGHT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    STORE_X: tl.constexpr,
    STORE_SUMS: tl.constexpr,
    STORE_HIDDEN: tl.constexpr,
    EVEN_M: tl.constexpr,
    EVEN_H: tl.constexpr,
    EVEN_C: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """One program takes BLOCK_M rows through five products for each block of hidden units."""
    i_m = tl.program_id(0).to(tl.int64) * BLOCK_M
    o_m = tl.arange(0, BLOCK_M)
    o_h = tl.arange(0, BLOCK_H)
    o_c = tl.arange(0, BLOCK_C)

    if NORM:
        b_hat, b_n, b_inverse = load_normalised(
            p_x, p_norm_weight, p_norm_bias, p_stats, i_m, o_m, o_c, stride_x, stride_stats, rows,
            channels, HAS_WEIGHT, HAS_BIAS, EVEN_M, EVEN_C,
        )  # fmt: skip
    else:
        b_n = load_rows(p_x, i_m, o_m, o_c, stride_x, rows, channels, EVEN_M, EVEN_C)
    b_n = b_n.to(p_gate.dtype.element_ty)
    b_dy = load_rows(p_grad, i_m, o_m, o_c, stride_grad, rows, channels, EVEN_M, EVEN_C)
    if NORM and STORE_HIDDEN:
        store_rows(p_normalised, b_n, i_m, o_m, o_c, channels, rows, channels, EVEN_M, EVEN_C)

    b_dn = tl.zeros([BLOCK_M, BLOCK_C], tl.float32)
    for start in range(0, hidden, BLOCK_H):
        b_wg = load_weight(p_gate, start, o_h, o_c, channels, 1, hidden, channels, EVEN_H, EVEN_C)
        b_wv = load_weight(p_value, start, o_h, o_c, channels, 1, hidden, channels, EVEN_H, EVEN_C)
        b_wo = load_weight(p_out, start, o_h, o_c, 1, hidden, hidden, channels, EVEN_H, EVEN_C)
        b_gate = tl.dot(b_n, tl.trans(b_wg))  # [BLOCK_M, BLOCK_H]
        b_value = tl.dot(b_n, tl.trans(b_wv))
        b_dh = tl.dot(b_dy, tl.trans(b_wo))
        b_h, b_dg, b_dv = swiglu_gradients(b_dh, b_gate, b_value)
        b_dg = b_dg.to(b_n.dtype)
        b_dv = b_dv.to(b_n.dtype)
        if STORE_HIDDEN:
            p = p_hidden + start
            left = hidden - start
            plane = long(rows) * hidden
            store_rows(p, b_h, i_m, o_m, o_h, hidden, rows, left, EVEN_M, EVEN_H)
            store_rows(p + plane, b_dg, i_m, o_m, o_h, hidden, rows, left, EVEN_M, EVEN_H)
            store_rows(p + 2 * plane, b_dv, i_m, o_m, o_h, hidden, rows, left, EVEN_M, EVEN_H)
        b_dn = tl.dot(b_dg, b_wg, acc=b_dn)
        b_dn = tl.dot(b_dv, b_wv, acc=b_dn)

    if NORM:
        # Read again: kept over the loop, the rows would take registers from it.
        b_hat, _b_n, b_inverse = load_normalised(
            p_x, None, None, p_stats, i_m, o_m, o_c, stride_x, stride_stats, rows, channels,
            False, False, EVEN_M, EVEN_C,
        )  # fmt: skip
        if STORE_SUMS:
            norm_sums(p_sums, tl.program_id(0), b_dn * b_hat, b_dn, o_c, channels)
        if HAS_WEIGHT:
            b_dn = b_dn * load_channel(p_norm_weight, o_c, channels, EVEN_C)[None, :]
        b_dn = norm_gradient(b_dn, b_hat, b_inverse, channels)
    if STORE_X:
        store_rows(p_grad_x, b_dn, i_m, o_m, o_c, channels, rows, channels, EVEN_M, EVEN_C)

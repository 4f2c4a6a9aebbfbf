"""The transition backward in Triton, by rows: all that is hidden is computed again.

Letters and names as in ``forward.py``. A program has the gradient of BLOCK_M rows of x, a sum of
its own for the gradients of the norm's parameters (no atomics), and what the weights' gradients
are products of: the normalised rows, the gradients of gate and value, and the hidden activation.
These are written for a chunk of rows at a time; ``weights.py`` multiplies them.
"""

from __future__ import annotations

import triton
import triton.language as tl

from megafold.ops.transition.tiles import (
    load_channel,
    load_normalised,
    load_rows,
    load_weight,
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
    p_grad,  # [M, C], rows any distance apart: gradient of the output, as products take it
    p_added,  # [M, C], contiguous: what is added to the gradient of x; or None
    p_grad_x,  # [M, C], contiguous, written; or None
    p_sums,  # fp32 [programs, 2, C], written: for the norm's weight and bias; or None
    p_normalised,  # [M, C], contiguous, written where p_hidden is; None without a norm
    p_hidden,  # [M, 3 H], contiguous, written: gradients of gate, of value, activation; or None
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
    o_p = tl.arange(0, 2 * BLOCK_H)  # of gate, then of value
    of_gate = o_p < BLOCK_H
    o_u = o_p % BLOCK_H

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
        # What is computed is an operand in registers, which take from the walk what its products
        # need; what is loaded goes to shared memory. Other threads may have stored what a thread
        # loads: the barrier orders the memory of a program's threads, too.
        tl.debug_barrier()
        b_n = load_rows(p_normalised, i_m, o_m, o_c, channels, rows, channels, EVEN_M, EVEN_C)

    b_dn = tl.zeros([BLOCK_M, BLOCK_C], tl.float32)
    for start in range(0, hidden, BLOCK_H):
        # Gate and value are one product, of one tile from both weights.
        p_w = tl.where(of_gate[:, None], p_gate, p_value)
        p_w = p_w + (start + o_u)[:, None] * channels + o_c[None, :]
        if EVEN_H and EVEN_C:
            b_w = tl.load(p_w)  # [2 BLOCK_H, BLOCK_C]
        else:
            mask = (start + o_u < hidden)[:, None] & (o_c < channels)[None, :]
            b_w = tl.load(p_w, mask=mask, other=0.0)
        b_wo = load_weight(p_out, start, o_h, o_c, 1, hidden, hidden, channels, EVEN_H, EVEN_C)
        b_pair = tl.reshape(tl.dot(b_n, tl.trans(b_w)), [BLOCK_M, 2, BLOCK_H])
        b_gate, b_value = tl.split(tl.permute(b_pair, (0, 2, 1)))
        b_dh = tl.dot(b_dy, tl.trans(b_wo))
        b_h, b_dg, b_dv = swiglu_gradients(b_dh, b_gate, b_value, False)
        b_pair = tl.permute(tl.join(b_dg.to(b_n.dtype), b_dv.to(b_n.dtype)), (0, 2, 1))
        b_pair = tl.reshape(b_pair, [BLOCK_M, 2 * BLOCK_H])
        # The sum is a use of the product in this turn of the loop. A product that is first used
        # in the next turn makes the assembler wait for every product of the loop one by one.
        b_dn = tl.dot(b_pair, b_w, acc=b_dn) + 0.0
        if STORE_HIDDEN:  # after the last product, which does not wait for the stores
            width = 3 * hidden
            p = p_hidden + start
            p_pair = p + i_m * width + o_m.to(tl.int64)[:, None] * width
            p_pair = p_pair + tl.where(of_gate, o_u, o_u + hidden)[None, :]
            if EVEN_M and EVEN_H:
                tl.store(p_pair, b_pair)
            else:
                mask = (i_m + o_m < rows)[:, None] & (start + o_u < hidden)[None, :]
                tl.store(p_pair, b_pair, mask=mask)
            p = p + 2 * hidden
            store_rows(p, b_h, i_m, o_m, o_h, width, rows, hidden - start, EVEN_M, EVEN_H)

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
        if p_added is not None:
            # Contiguous, as what is stored: addresses of its own would take registers in the walk.
            b_added = load_rows(p_added, i_m, o_m, o_c, channels, rows, channels, EVEN_M, EVEN_C)
            b_dn += b_added.to(tl.float32)
        store_rows(p_grad_x, b_dn, i_m, o_m, o_c, channels, rows, channels, EVEN_M, EVEN_C)

"""What is left of a wide transition between the products of the vendor's library, in Triton.

LayerNorm and SwiGLU, forward and backward, and the gradients of the conditioned transition's gate
(`gated` has the others of it): each is one kernel that reads what it needs once and computes in
fp32. A result may be written where an operand of the same shape was read.

Letters: M rows, C channels, H hidden units. Names: ``p_`` pointer, ``o_`` offsets, ``b_`` block,
``i_`` index.
"""

from __future__ import annotations

import triton
import triton.language as tl

from megafold.ops.exact import sigmoid
from megafold.ops.transition.tiles import (
    load_channel,
    load_normalised,
    load_rows,
    norm_gradient,
    norm_sums,
    scaled,
    statistics,
    store_rows,
    store_statistics,
    swiglu,
    swiglu_gradients,
)


@triton.jit
def norm_forward_kernel(
    p_x,  # [M, C], rows any distance apart
    p_weight,  # [C] or None
    p_bias,  # [C] or None
    p_normalised,  # [M, C], contiguous, written
    p_stats,  # fp32 [2, M], written: mean, and one over the standard deviation; or None
    stride_x,
    stride_stats,  # from a row's mean to its inverse deviation
    rows,
    channels,
    eps,
    HAS_WEIGHT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    STORE_STATS: tl.constexpr,
    EVEN_M: tl.constexpr,
    EVEN_C: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """One program normalises BLOCK_M rows."""
    i_m = tl.program_id(0).to(tl.int64) * BLOCK_M
    o_m = tl.arange(0, BLOCK_M)
    o_c = tl.arange(0, BLOCK_C)
    b_x = load_rows(p_x, i_m, o_m, o_c, stride_x, rows, channels, EVEN_M, EVEN_C).to(tl.float32)
    b_mean, b_inverse = statistics(b_x, o_c, channels, eps, EVEN_C)
    if STORE_STATS:
        store_statistics(p_stats, b_mean, b_inverse, i_m, o_m, stride_stats, rows)
    b_hat = (b_x - b_mean[:, None]) * b_inverse[:, None]
    b_n = scaled(b_hat, p_weight, p_bias, o_c, channels, HAS_WEIGHT, HAS_BIAS, EVEN_C)
    store_rows(p_normalised, b_n, i_m, o_m, o_c, channels, rows, channels, EVEN_M, EVEN_C)


@triton.jit
def norm_backward_kernel(
    p_grad,  # [M, C], contiguous: gradient of the normalised rows
    p_x,  # [M, C], rows any distance apart
    p_weight,  # [C] or None
    p_stats,  # fp32 [2, M]
    p_added,  # [M, C], rows any distance apart: what is added to the gradient of x; or None
    p_grad_x,  # [M, C], contiguous, written; may be p_grad; or None
    p_sums,  # fp32 [programs, 2, C], written: for the norm's weight and bias; or None
    stride_x,
    stride_added,
    stride_stats,  # from a row's mean to its inverse deviation
    rows,
    channels,
    per_program,  # blocks of BLOCK_M rows
    HAS_WEIGHT: tl.constexpr,
    STORE_X: tl.constexpr,
    STORE_SUMS: tl.constexpr,
    EVEN_M: tl.constexpr,
    EVEN_C: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """One program takes ``per_program`` blocks, and adds up their share of the parameters'."""
    o_m = tl.arange(0, BLOCK_M)
    o_c = tl.arange(0, BLOCK_C)
    if HAS_WEIGHT:
        b_weight = load_channel(p_weight, o_c, channels, EVEN_C)[None, :]
    b_of_weight = tl.zeros([BLOCK_M, BLOCK_C], tl.float32)
    b_of_bias = tl.zeros([BLOCK_M, BLOCK_C], tl.float32)
    first = tl.program_id(0).to(tl.int64) * per_program
    for i in range(per_program):
        i_m = (first + i) * BLOCK_M
        b_dn = load_rows(p_grad, i_m, o_m, o_c, channels, rows, channels, EVEN_M, EVEN_C)
        b_dn = b_dn.to(tl.float32)
        if p_added is not None:
            b_added = load_rows(
                p_added, i_m, o_m, o_c, stride_added, rows, channels, EVEN_M, EVEN_C
            )
        b_hat, _b_n, b_inverse = load_normalised(
            p_x, None, None, p_stats, i_m, o_m, o_c, stride_x, stride_stats, rows, channels,
            False, False, EVEN_M, EVEN_C,
        )  # fmt: skip
        if STORE_SUMS:
            b_of_weight += b_dn * b_hat
            b_of_bias += b_dn
        if STORE_X:
            if HAS_WEIGHT:
                b_dn = b_dn * b_weight
            b_dx = norm_gradient(b_dn, b_hat, b_inverse, channels)
            if p_added is not None:
                b_dx += b_added.to(tl.float32)
            store_rows(p_grad_x, b_dx, i_m, o_m, o_c, channels, rows, channels, EVEN_M, EVEN_C)
    if STORE_SUMS:
        norm_sums(p_sums, tl.program_id(0), b_of_weight, b_of_bias, o_c, channels)


@triton.jit
def swiglu_forward_kernel(
    p_pairs,  # [M, 2 H], contiguous: gate, then value
    p_activation,  # [M, H], rows stride_a apart, written; may be gate's place
    stride_a,
    rows,
    hidden,
    EVEN_M: tl.constexpr,
    EVEN_H: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    """One program computes ``silu(gate) * value`` for BLOCK_H hidden units of BLOCK_M rows."""
    blocks = tl.cdiv(hidden, BLOCK_H)
    # In 64 bits before it is multiplied: hidden activations outgrow 2**31 elements.
    i_m = (tl.program_id(0) // blocks).to(tl.int64) * BLOCK_M
    i_h = (tl.program_id(0) % blocks) * BLOCK_H
    o_m = tl.arange(0, BLOCK_M)
    o_h = tl.arange(0, BLOCK_H)
    left = hidden - i_h
    p = p_pairs + i_h
    b_gate = load_rows(p, i_m, o_m, o_h, 2 * hidden, rows, left, EVEN_M, EVEN_H)
    b_value = load_rows(p + hidden, i_m, o_m, o_h, 2 * hidden, rows, left, EVEN_M, EVEN_H)
    EXACT: tl.constexpr = p_pairs.dtype.element_ty == tl.float32
    b_h = swiglu(b_gate.to(tl.float32), b_value.to(tl.float32), EXACT)
    store_rows(p_activation + i_h, b_h, i_m, o_m, o_h, stride_a, rows, left, EVEN_M, EVEN_H)


@triton.jit
def swiglu_backward_kernel(
    p_pairs,  # [M, 2 H], contiguous: gate, then value
    p_grad,  # [M, H], rows stride_a apart: of the activation; written: the activation itself
    p_grad_pairs,  # [M, 2 H], contiguous, written: gradients of gate and value; may be p_pairs
    stride_a,
    rows,
    hidden,
    EVEN_M: tl.constexpr,
    EVEN_H: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    """One program takes BLOCK_H hidden units of BLOCK_M rows."""
    blocks = tl.cdiv(hidden, BLOCK_H)
    i_m = (tl.program_id(0) // blocks).to(tl.int64) * BLOCK_M
    i_h = (tl.program_id(0) % blocks) * BLOCK_H
    o_m = tl.arange(0, BLOCK_M)
    o_h = tl.arange(0, BLOCK_H)
    left = hidden - i_h
    p, p_h = p_pairs + i_h, p_grad + i_h
    b_gate = load_rows(p, i_m, o_m, o_h, 2 * hidden, rows, left, EVEN_M, EVEN_H)
    b_value = load_rows(p + hidden, i_m, o_m, o_h, 2 * hidden, rows, left, EVEN_M, EVEN_H)
    b_grad = load_rows(p_h, i_m, o_m, o_h, stride_a, rows, left, EVEN_M, EVEN_H)
    EXACT: tl.constexpr = p_pairs.dtype.element_ty == tl.float32
    b_h, b_dg, b_dv = swiglu_gradients(
        b_grad.to(tl.float32), b_gate.to(tl.float32), b_value.to(tl.float32), EXACT
    )
    store_rows(p_h, b_h, i_m, o_m, o_h, stride_a, rows, left, EVEN_M, EVEN_H)
    p = p_grad_pairs + i_h
    store_rows(p, b_dg, i_m, o_m, o_h, 2 * hidden, rows, left, EVEN_M, EVEN_H)
    store_rows(p + hidden, b_dv, i_m, o_m, o_h, 2 * hidden, rows, left, EVEN_M, EVEN_H)


@triton.jit
def gate_rows_backward_kernel(
    p_grad,  # [M, C], rows any distance apart: gradient of the output
    p_x,  # [M, C], contiguous
    p_gate,  # [M, C], contiguous: every row has a gate of its own
    p_grad_x,  # [M, C], contiguous, written; may be p_x
    p_grad_gate,  # [M, C], contiguous, written
    p_sums,  # fp32 [programs, C], written: of the gate's gradient
    stride_g,
    rows,
    channels,
    per_program,  # blocks of BLOCK_M rows
    EVEN_M: tl.constexpr,
    EVEN_C: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """One program takes ``per_program`` blocks of rows, and adds up the gate's gradients."""
    o_m = tl.arange(0, BLOCK_M)
    o_c = tl.arange(0, BLOCK_C)
    b_sum = tl.zeros([BLOCK_M, BLOCK_C], tl.float32)
    first = tl.program_id(0).to(tl.int64) * per_program
    for i in range(per_program):
        i_m = (first + i) * BLOCK_M
        b_grad = load_rows(p_grad, i_m, o_m, o_c, stride_g, rows, channels, EVEN_M, EVEN_C)
        b_x = load_rows(p_x, i_m, o_m, o_c, channels, rows, channels, EVEN_M, EVEN_C)
        b_gate = load_rows(p_gate, i_m, o_m, o_c, channels, rows, channels, EVEN_M, EVEN_C)
        b_sigmoid = sigmoid(b_gate.to(tl.float32), p_gate.dtype.element_ty == tl.float32)
        b_dx = b_grad.to(tl.float32) * b_sigmoid
        b_dgate = b_dx * b_x.to(tl.float32) * (1.0 - b_sigmoid)
        b_sum += b_dgate
        store_rows(p_grad_x, b_dx, i_m, o_m, o_c, channels, rows, channels, EVEN_M, EVEN_C)
        store_rows(p_grad_gate, b_dgate, i_m, o_m, o_c, channels, rows, channels, EVEN_M, EVEN_C)
    p = p_sums + tl.program_id(0).to(tl.int64) * channels + o_c
    tl.store(p, tl.sum(b_sum, 0), mask=o_c < channels)

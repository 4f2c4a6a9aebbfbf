"""A gated linear layer in Triton: one kernel forward, one backward and the sum of what it leaves.

Letters: M rows, C channels, O outputs. Rows have two dimensions, ``[I, J]`` with M = I J, and a
tensor any stride for each, 0 where it repeats; row m is ``(m // J, m % J)``. Rows multiplied with
their gate exist in registers only, in the dtype of the weight, as tensor cores take them; sigmoids
are fp32, and so is every sum.

Programs walk over rows. A forward program has all channels, and all outputs: at once where BLOCK_O
holds them, with the weight at hand, else one block after another. A backward program has BLOCK_C
channels and all outputs: the gradients of its part of x and gate, and the sum of that of the weight
over its rows, in registers. Programs that share rows are neighbours, so that the gradient of the
output, which each of them needs, is in L2 when the second reads it.

Names: ``p_`` pointer, ``o_`` offsets, ``m_`` mask, ``b_`` block, ``i_`` index.
"""

from __future__ import annotations

import triton
import triton.language as tl

from megafold.ops.exact import sigmoid
from megafold.ops.products import add_product, dot_in_parts


@triton.jit
def starts(o_m, inner, stride_i, stride_j):
    """Where rows ``o_m`` of a tensor begin, in 64 bits."""
    return (o_m // inner).to(tl.int64) * stride_i + (o_m % inner).to(tl.int64) * stride_j


@triton.jit
def load_rows(p, o_start, m_m, o_n, width, EVEN: tl.constexpr):
    """Rows ``[M, N]`` of a tensor; zeros where there is no row, or none of ``width`` columns."""
    p_tile = p + (o_start[:, None] + o_n[None, :])
    if EVEN:
        return tl.load(p_tile, mask=m_m[:, None], other=0.0)
    else:
        return tl.load(p_tile, mask=m_m[:, None] & (o_n < width)[None, :], other=0.0)


@triton.jit
def store_rows(p, b, o_start, m_m, o_n, width, EVEN: tl.constexpr):
    """Store what there is of rows ``[M, N]``."""
    p_tile = p + (o_start[:, None] + o_n[None, :])
    b = b.to(p.dtype.element_ty)
    if EVEN:
        tl.store(p_tile, b, mask=m_m[:, None])
    else:
        tl.store(p_tile, b, mask=m_m[:, None] & (o_n < width)[None, :])


@triton.jit
def load_weight(
    p_weight, stride, o_o, o_c, OUTS: tl.constexpr, C: tl.constexpr, EVEN: tl.constexpr
):
    """Outputs ``o_o``, channels ``o_c`` of the weight; zeros outside. EVEN: all are there."""
    p_tile = p_weight + (o_o[:, None] * stride + o_c[None, :])
    if EVEN:
        return tl.load(p_tile)
    else:
        return tl.load(p_tile, mask=(o_o < OUTS)[:, None] & (o_c < C)[None, :], other=0.0)


@triton.jit
def put_out(
    b_gated, b_w, p_residual, p_dropout, p_out, o_residual, o_dropout, o_out, m_m, first, o_o,
    OUTS: tl.constexpr, EVEN_O: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Outputs ``first + o_o`` of some rows, whose tensors begin at ``o_residual`` and so on."""
    o_n = first + o_o
    if p_residual is not None:  # asked for before the product, which need not wait for it
        b_residual = load_rows(p_residual, o_residual, m_m, o_n, OUTS, EVEN_O)
    b_out = dot_in_parts(b_gated, tl.trans(b_w), b_w.shape[1], PRECISION)
    if p_dropout is not None:
        b_out *= load_rows(p_dropout, o_dropout, m_m, o_n, OUTS, EVEN_O).to(tl.float32)
    if p_residual is not None:
        b_out += b_residual.to(tl.float32)
    store_rows(p_out, b_out, o_out, m_m, o_n, OUTS, EVEN_O)


@triton.jit
def forward_kernel(
    p_x,  # [I, J, C], neighbours along C
    p_gate,  # [I, J, C], neighbours along C: before its sigmoid
    p_weight,  # [O, C], neighbours along C
    p_residual,  # [I, J, O], neighbours along O; or None
    p_dropout,  # [I, J, O], neighbours along O; or None
    p_out,  # [M, O], contiguous, written
    x_i,  # strides
    x_j,
    gate_i,
    gate_j,
    residual_i,
    residual_j,
    dropout_i,
    dropout_j,
    stride_w,  # of a row
    rows,
    inner,  # J
    blocks,  # of BLOCK_M rows
    C: tl.constexpr,
    OUTS: tl.constexpr,
    EVEN_C: tl.constexpr,  # BLOCK_C is C
    EVEN_O: tl.constexpr,  # BLOCK_O divides O
    BLOCK_M: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_C: tl.constexpr,  # the power of two from C on
    PRECISION: tl.constexpr,  # of fp32 products
):
    """A program takes one block of rows after another."""
    EVEN: tl.constexpr = EVEN_C and EVEN_O
    HELD: tl.constexpr = BLOCK_O >= OUTS
    EXACT: tl.constexpr = PRECISION == "ieee" and p_weight.dtype.element_ty == tl.float32
    o_o, o_c = tl.arange(0, BLOCK_O), tl.arange(0, BLOCK_C)
    if HELD:
        b_w = load_weight(p_weight, stride_w, o_o, o_c, OUTS, C, EVEN)
    for i in range(tl.program_id(0), blocks, tl.num_programs(0)):
        o_m = i * BLOCK_M + tl.arange(0, BLOCK_M)
        m_m = o_m < rows
        b_gate = load_rows(p_gate, starts(o_m, inner, gate_i, gate_j), m_m, o_c, C, EVEN_C)
        b_x = load_rows(p_x, starts(o_m, inner, x_i, x_j), m_m, o_c, C, EVEN_C)
        b_gated = sigmoid(b_gate.to(tl.float32), EXACT) * b_x.to(tl.float32)
        b_gated = b_gated.to(p_weight.dtype.element_ty)
        o_residual = starts(o_m, inner, residual_i, residual_j)
        o_dropout = starts(o_m, inner, dropout_i, dropout_j)
        o_out = o_m.to(tl.int64) * OUTS
        if HELD:
            put_out(
                b_gated, b_w, p_residual, p_dropout, p_out, o_residual, o_dropout, o_out, m_m,
                0, o_o, OUTS, EVEN_O, PRECISION,
            )  # fmt: skip
        else:
            for first in range(0, OUTS, BLOCK_O):
                b_part = load_weight(p_weight, stride_w, first + o_o, o_c, OUTS, C, EVEN)
                put_out(
                    b_gated, b_part, p_residual, p_dropout, p_out, o_residual, o_dropout, o_out,
                    m_m, first, o_o, OUTS, EVEN_O, PRECISION,
                )  # fmt: skip


@triton.jit
def load_update_grad(
    p_grad, p_dropout, p_weight, o_grad, o_dropout, m_m, o_o,
    OUTS: tl.constexpr, EVEN_O: tl.constexpr,
):  # fmt: skip
    """The gradient of some rows before dropout, as products take it."""
    b_g = load_rows(p_grad, o_grad, m_m, o_o, OUTS, EVEN_O)
    if p_dropout is not None:
        b_dropout = load_rows(p_dropout, o_dropout, m_m, o_o, OUTS, EVEN_O)
        b_g = b_g.to(tl.float32) * b_dropout.to(tl.float32)
    return b_g.to(p_weight.dtype.element_ty)


@triton.jit
def backward_kernel(
    p_grad,  # [I, J, O], neighbours along O
    p_x,  # [I, J, C], neighbours along C
    p_gate,  # [I, J, C], neighbours along C: before its sigmoid
    p_weight,  # [O, C], neighbours along C
    p_dropout,  # [I, J, O], neighbours along O; or None
    p_grad_x,  # [I, J, C], neighbours along C, written; or None
    p_grad_gate,  # [I, J, C], neighbours along C, written; or None
    p_products,  # fp32 [groups, O, C], written: the weight's gradient by each group; or None
    grad_i,  # strides
    grad_j,
    x_i,
    x_j,
    gate_i,
    gate_j,
    dropout_i,
    dropout_j,
    grad_x_i,
    grad_x_j,
    grad_gate_i,
    grad_gate_j,
    stride_w,  # of a row
    rows,
    inner,  # J
    blocks,  # of BLOCK_M rows
    per_group,  # blocks of one program
    SLICES: tl.constexpr,  # blocks of channels, and programs that share a group of rows
    C: tl.constexpr,
    OUTS: tl.constexpr,
    EVEN_C: tl.constexpr,  # BLOCK_C divides C
    EVEN_O: tl.constexpr,  # BLOCK_O is O
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_O: tl.constexpr,  # the power of two from O on
    PRECISION: tl.constexpr,  # of fp32 products
):
    """A program walks over a group of rows, BLOCK_C channels of them."""
    OF_X: tl.constexpr = p_grad_x is not None
    OF_GATE: tl.constexpr = p_grad_gate is not None
    OF_WEIGHT: tl.constexpr = p_products is not None
    PRODUCT: tl.constexpr = p_weight.dtype.element_ty
    EXACT: tl.constexpr = PRECISION == "ieee" and tl.float32 == PRODUCT
    i_group = tl.program_id(0) // SLICES
    o_o = tl.arange(0, BLOCK_O)
    o_c = tl.program_id(0) % SLICES * BLOCK_C + tl.arange(0, BLOCK_C)
    if OF_X or OF_GATE:
        b_w = load_weight(p_weight, stride_w, o_o, o_c, OUTS, C, EVEN_C and EVEN_O)
    if OF_WEIGHT:
        b_product = tl.zeros([BLOCK_O, BLOCK_C], tl.float32)
        b_lost = tl.zeros([BLOCK_O, BLOCK_C], tl.float32)
    for i in range(i_group * per_group, tl.minimum((i_group + 1) * per_group, blocks)):
        o_m = i * BLOCK_M + tl.arange(0, BLOCK_M)
        m_m = o_m < rows
        b_g = load_update_grad(
            p_grad, p_dropout, p_weight, starts(o_m, inner, grad_i, grad_j),
            starts(o_m, inner, dropout_i, dropout_j), m_m, o_o, OUTS, EVEN_O,
        )  # fmt: skip
        b_gate = load_rows(p_gate, starts(o_m, inner, gate_i, gate_j), m_m, o_c, C, EVEN_C)
        if OF_GATE or OF_WEIGHT:
            b_x = load_rows(p_x, starts(o_m, inner, x_i, x_j), m_m, o_c, C, EVEN_C)
        if OF_X or OF_GATE:
            b_of_gated = dot_in_parts(b_g, b_w, BLOCK_O, PRECISION)
        b_s = sigmoid(b_gate.to(tl.float32), EXACT)
        if OF_GATE or OF_WEIGHT:
            b_gated = (b_x.to(tl.float32) * b_s).to(PRODUCT)
        if OF_WEIGHT:
            b_product, b_lost = add_product(tl.trans(b_g), b_gated, b_product, b_lost, PRECISION)
        if OF_X:
            o_own = starts(o_m, inner, grad_x_i, grad_x_j)
            store_rows(p_grad_x, b_of_gated * b_s, o_own, m_m, o_c, C, EVEN_C)
        if OF_GATE:
            b_of_gate = b_of_gated * (b_gated.to(tl.float32) * (1.0 - b_s))
            o_own = starts(o_m, inner, grad_gate_i, grad_gate_j)
            store_rows(p_grad_gate, b_of_gate, o_own, m_m, o_c, C, EVEN_C)
    if OF_WEIGHT:
        o_own = (i_group.to(tl.int64) * OUTS + o_o) * C
        store_rows(p_products, b_product, o_own, o_o < OUTS, o_c, C, EVEN_C)

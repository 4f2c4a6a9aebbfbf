"""A gate in Triton, one kernel forward and one backward: ``residual + sigmoid(gate) * x``.

Letters: M rows of x, C channels, K rows of the gate, S rows of x that share one: M = S K. Row
``s K + k`` of x has row k of the gate. With a gate for every row (SHARED is false) S is M, K is 1,
and row s has row s. A program takes BLOCK_C channels of ROWS rows that share a gate, or that
follow each other: the gate is read, and its sigmoid computed, once for all that share it.

Rows have two dimensions, ``[I, J]`` with M = I J, and a tensor any stride for each, as those of
``gated_linear``: what windows of atoms leave is cut off behind the last atom of each sample.

Names: ``p_`` pointer, ``o_`` offsets, ``m_`` mask, ``b_`` block, ``i_`` index.
"""

from __future__ import annotations

import triton
import triton.language as tl

from megafold.ops.exact import sigmoid
from megafold.ops.gated_linear.kernels import load_rows, starts, store_rows


@triton.jit
def load_sigmoid(p_gate, o_gate, m_m, o_c, channels, EVEN: tl.constexpr, EXACT: tl.constexpr):
    """The sigmoid of rows of the gate that begin at ``o_gate``, in fp32."""
    return sigmoid(load_rows(p_gate, o_gate, m_m, o_c, channels, EVEN).to(tl.float32), EXACT)


@triton.jit
def forward_kernel(
    p_x,  # [I, J, C], neighbours along C as in all that follow
    p_gate,  # [K, C], or [I, J, C] where it is not shared: before the sigmoid
    p_residual,  # [I, J, C]; or None
    p_out,  # [M, C], contiguous, written
    x_i,  # strides
    x_j,
    gate_i,  # 0 where it is shared
    gate_j,
    residual_i,
    residual_j,
    inner,  # J
    sharing,  # S
    conditions,  # K
    channels,
    SHARED: tl.constexpr,
    EVEN: tl.constexpr,  # BLOCK_C divides C
    ROWS: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """``residual + sigmoid(gate) * x`` of one tile."""
    EXACT: tl.constexpr = p_x.dtype.element_ty == tl.float32
    slices = tl.cdiv(channels, BLOCK_C)
    i_k = tl.program_id(0) // slices % conditions
    o_s = tl.program_id(0) // slices // conditions * ROWS + tl.arange(0, ROWS)
    o_c = tl.program_id(0) % slices * BLOCK_C + tl.arange(0, BLOCK_C)
    m_m = o_s < sharing
    o_m = o_s * conditions + i_k
    b_x = load_rows(p_x, starts(o_m, inner, x_i, x_j), m_m, o_c, channels, EVEN)
    if p_residual is not None:
        o_residual = starts(o_m, inner, residual_i, residual_j)
        b_residual = load_rows(p_residual, o_residual, m_m, o_c, channels, EVEN)
    if SHARED:
        o_gate = (i_k + tl.arange(0, 1)).to(tl.int64) * gate_j
        m_gate = tl.arange(0, 1) == 0
    else:
        o_gate = starts(o_m, inner, gate_i, gate_j)
        m_gate = m_m
    b_sigmoid = load_sigmoid(p_gate, o_gate, m_gate, o_c, channels, EVEN, EXACT)
    b_out = b_sigmoid * b_x.to(tl.float32)
    if p_residual is not None:
        b_out += b_residual.to(tl.float32)
    store_rows(p_out, b_out, o_m.to(tl.int64) * channels, m_m, o_c, channels, EVEN)


@triton.jit
def backward_kernel(
    p_x,  # [I, J, C], neighbours along C as in all that follow
    p_gate,  # [K, C], or [I, J, C] where it is not shared: before the sigmoid
    p_grad,  # [I, J, C]: of the output
    p_grad_x,  # [M, C], contiguous, written; or None
    p_grad_gate,  # [groups, K, C], or [M, C], contiguous, written; or None
    x_i,  # strides
    x_j,
    gate_i,  # 0 where it is shared
    gate_j,
    grad_i,
    grad_j,
    inner,  # J
    sharing,  # S
    conditions,  # K
    channels,
    per_group,  # blocks of ROWS rows that share a gate; 1 where it is not shared
    SHARED: tl.constexpr,
    EVEN: tl.constexpr,  # BLOCK_C divides C
    ROWS: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Both gradients of a group of tiles: that of a shared gate is added up in registers."""
    EXACT: tl.constexpr = p_x.dtype.element_ty == tl.float32
    OF_GATE: tl.constexpr = p_grad_gate is not None
    slices = tl.cdiv(channels, BLOCK_C)
    i_k = tl.program_id(0) // slices % conditions
    i_group = tl.program_id(0) // slices // conditions
    o_c = tl.program_id(0) % slices * BLOCK_C + tl.arange(0, BLOCK_C)
    if SHARED:
        o_gate = (i_k + tl.arange(0, 1)).to(tl.int64) * gate_j
        m_gate = tl.arange(0, 1) == 0
        b_sigmoid = load_sigmoid(p_gate, o_gate, m_gate, o_c, channels, EVEN, EXACT)
        b_sum = tl.zeros([ROWS, BLOCK_C], tl.float32)
    for i in range(per_group):
        o_s = (i_group * per_group + i) * ROWS + tl.arange(0, ROWS)
        m_m = o_s < sharing
        o_m = o_s * conditions + i_k
        o_own = o_m.to(tl.int64) * channels
        b_grad = load_rows(p_grad, starts(o_m, inner, grad_i, grad_j), m_m, o_c, channels, EVEN)
        if OF_GATE:
            b_x = load_rows(p_x, starts(o_m, inner, x_i, x_j), m_m, o_c, channels, EVEN)
        if not SHARED:
            o_gate = starts(o_m, inner, gate_i, gate_j)
            b_sigmoid = load_sigmoid(p_gate, o_gate, m_m, o_c, channels, EVEN, EXACT)
        b_of_x = b_grad.to(tl.float32) * b_sigmoid
        if p_grad_x is not None:
            store_rows(p_grad_x, b_of_x, o_own, m_m, o_c, channels, EVEN)
        if OF_GATE:
            b_of_gate = b_of_x * b_x.to(tl.float32) * (1.0 - b_sigmoid)
            if SHARED:
                b_sum += b_of_gate
            else:
                store_rows(p_grad_gate, b_of_gate, o_own, m_m, o_c, channels, EVEN)
    if SHARED and OF_GATE:
        p = p_grad_gate + ((i_group.to(tl.int64) * conditions + i_k) * channels + o_c)
        tl.store(p, tl.sum(b_sum, 0).to(p_grad_gate.dtype.element_ty), mask=o_c < channels)

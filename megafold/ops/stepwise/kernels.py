"""What stands between the products of a conditioned transformer block, in Triton, without gradient.

Letters: M rows, K rows of the condition, C channels. Row m has the condition ``m % K``. Programs
take whole rows, or BLOCK_C channels of them where no row has to be added up.

Names: ``p_`` pointer, ``o_`` offsets, ``m_`` mask, ``b_`` block.
"""

from __future__ import annotations

import triton
import triton.language as tl

from megafold.ops.exact import sigmoid
from megafold.ops.layer_norm.kernels import centred_and_rstd


@triton.jit
def load_rows(p, o_m, stride, o_c, m):
    """Rows ``o_m``, channels ``o_c`` of a tensor in fp32; zeros where the mask says so."""
    return tl.load(p + o_m[:, None] * stride + o_c[None, :], mask=m, other=0.0).to(tl.float32)


@triton.jit
def modulate_kernel(
    p_a,  # [M, C], neighbours along C as in all that follow
    p_gate,  # [K, C]: before the sigmoid
    p_shift,  # [K, C]
    p_out,  # [M, C], contiguous, written
    stride_a,  # of a row
    stride_gate,
    stride_shift,
    eps,
    rows,
    conditions,
    channels,
    ROWS: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """``sigmoid(gate) * layer_norm(a) + shift`` of ROWS rows."""
    o_m = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    o_c = tl.arange(0, BLOCK_C)
    m_c = (o_c < channels)[None, :]
    m = (o_m < rows)[:, None] & m_c
    o_k = o_m % conditions
    b_a = load_rows(p_a, o_m, stride_a, o_c, m)
    b_gate = load_rows(p_gate, o_k, stride_gate, o_c, m)
    b_shift = load_rows(p_shift, o_k, stride_shift, o_c, m)
    b_centred, _, b_rstd = centred_and_rstd(b_a, m_c, channels, eps)
    b_gate = sigmoid(b_gate, p_gate.dtype.element_ty == tl.float32)
    b_out = b_gate * (b_centred * b_rstd[:, None]) + b_shift
    p_tile = p_out + o_m[:, None] * channels + o_c[None, :]
    tl.store(p_tile, b_out.to(p_out.dtype.element_ty), mask=m)


@triton.jit
def gate_kernel(
    p_x,  # [M, C]
    p_gate,  # [K, C]: before the sigmoid
    p_added,  # [M, C]; or None
    p_out,  # [M, C], contiguous, written
    stride_x,  # of a row
    stride_gate,
    stride_added,
    rows,
    conditions,
    channels,
    ROWS: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """``added + sigmoid(gate) * x`` of ROWS rows."""
    blocks = tl.cdiv(channels, BLOCK_C)
    o_m = (tl.program_id(0) // blocks).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    o_c = tl.program_id(0) % blocks * BLOCK_C + tl.arange(0, BLOCK_C)
    m = (o_m < rows)[:, None] & (o_c < channels)[None, :]
    b_gate = load_rows(p_gate, o_m % conditions, stride_gate, o_c, m)
    b_out = sigmoid(b_gate, p_gate.dtype.element_ty == tl.float32)
    b_out *= load_rows(p_x, o_m, stride_x, o_c, m)
    if p_added is not None:
        b_out += load_rows(p_added, o_m, stride_added, o_c, m)
    p_tile = p_out + o_m[:, None] * channels + o_c[None, :]
    tl.store(p_tile, b_out.to(p_out.dtype.element_ty), mask=m)

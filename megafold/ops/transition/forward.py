"""The transition forward in Triton: one kernel, and nothing hidden ever reaches memory.

Letters: M rows, C channels, H hidden units. A program holds BLOCK_M rows of the normalised x
and of the output, and walks over the hidden units: BLOCK_H columns of gate and value are two
products, their SwiGLU is the operand of a third. Rows are as wide as a program holds them, so C
is at most 128.

Names: ``p_`` pointer, ``o_`` offsets, ``b_`` block, ``i_`` index.
"""

from __future__ import annotations

import triton
import triton.language as tl

from megafold.ops.transition.tiles import (
    load_rows,
    load_weight,
    scaled,
    statistics,
    store_rows,
    store_statistics,
    swiglu,
)


@triton.jit
def forward_kernel(
    p_x,  # [M, C], rows any distance apart
    p_norm_weight,  # [C] or None
    p_norm_bias,  # [C] or None
    p_gate,  # [H, C], contiguous, as the other weights are
    p_value,  # [H, C]
    p_out,  # [C, H]
    p_added,  # [M, C], rows any distance apart: what the update is added to, x; or None
    p_y,  # [M, C], contiguous, written
    p_stats,  # fp32 [2, M], written: mean, and one over the standard deviation; or None
    stride_x,
    stride_added,  # that of x, unknown to the compiler: addresses kept over the loop take registers
    rows,
    channels,
    hidden,
    eps,
    NORM: tl.constexpr,  # whether x is to be normalised
    HAS_WEIGHT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    EVEN_M: tl.constexpr,  # BLOCK_M divides M
    EVEN_H: tl.constexpr,
    EVEN_C: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """One program computes BLOCK_M rows of the output."""
    i_m = tl.program_id(0).to(tl.int64) * BLOCK_M
    o_m = tl.arange(0, BLOCK_M)
    o_h = tl.arange(0, BLOCK_H)
    o_c = tl.arange(0, BLOCK_C)

    b_x = load_rows(p_x, i_m, o_m, o_c, stride_x, rows, channels, EVEN_M, EVEN_C)
    if NORM:
        b_x = b_x.to(tl.float32)
        b_mean, b_inverse = statistics(b_x, o_c, channels, eps, EVEN_C)
        store_statistics(p_stats, b_mean, b_inverse, i_m, o_m, rows, rows)
        b_hat = (b_x - b_mean[:, None]) * b_inverse[:, None]
        b_x = scaled(b_hat, p_norm_weight, p_norm_bias, o_c, channels, HAS_WEIGHT, HAS_BIAS, EVEN_C)
    b_n = b_x.to(p_gate.dtype.element_ty)  # [BLOCK_M, BLOCK_C]

    b_y = tl.zeros([BLOCK_M, BLOCK_C], tl.float32)
    for start in range(0, hidden, BLOCK_H):
        b_wg = load_weight(
            p_gate, start, o_h, o_c, channels, 1, hidden, channels, EVEN_H, EVEN_C
        )  # [BLOCK_H, BLOCK_C]
        b_wv = load_weight(p_value, start, o_h, o_c, channels, 1, hidden, channels, EVEN_H, EVEN_C)
        b_gate = tl.dot(b_n, tl.trans(b_wg))  # [BLOCK_M, BLOCK_H]
        b_value = tl.dot(b_n, tl.trans(b_wv))
        b_h = swiglu(b_gate, b_value, False).to(b_n.dtype)
        b_wo = load_weight(
            p_out, start, o_h, o_c, 1, hidden, hidden, channels, EVEN_H, EVEN_C
        )  # [BLOCK_H, BLOCK_C], read through its rows
        b_y = tl.dot(b_h, b_wo, acc=b_y)
    if p_added is not None:
        b_x = load_rows(p_added, i_m, o_m, o_c, stride_added, rows, channels, EVEN_M, EVEN_C)
        b_y += b_x.to(tl.float32)
    store_rows(p_y, b_y, i_m, o_m, o_c, channels, rows, channels, EVEN_M, EVEN_C)

"""EvoAttention in Triton: one kernel forward, three backward, no atomics, nothing cubic in memory.

Letters: B batch, S rows, N queries, M keys, H heads, D head width. *Rows* are the attentions
that share one tile of the bias: the S of one batch entry, or all B S of them where the bias
has no batch. A program takes ROWS of them at once, so that a tile of the bias is read once for
all of them. Statistics are ``[2, B S, H, N]`` in fp32: the shift that was taken from the logits
(their maximum; of 16-bit operands times log2 e) and one over the sum of the weights. Keeping the
two apart, not their logarithm's sum, gives the backward pass the very weights of the forward pass,
also where logits are in the millions and a logarithm has lost its digits.

Names: ``p_`` pointer, ``o_`` offsets, ``b_`` block, ``i_`` index of program or row.
"""

from __future__ import annotations

import triton
import triton.language as tl

from megafold.ops.evo_attention.tiles import (
    ahead,
    at,
    load_bias,
    load_kept,
    load_tile,
    logits,
    long,
    rescaling,
    row,
    shift_of,
    store_tile,
    weights,
)
from megafold.ops.products import add_dot, dot


@triton.jit
def forward_kernel(
    p_q,  # [B, S, N, H, D], any strides
    p_k,  # [B, S, M, H, D], any strides
    p_v,  # [B, S, M, H, D], any strides
    p_mask,  # bool [B, S, M], any strides, or None
    p_bias,  # [B or 1, H, N, M], any strides, or None
    p_out,  # [B, S, N, H, D], contiguous, written
    p_stats,  # fp32 [2, B S, H, N], written
    stride_qb, stride_qs, stride_qn, stride_qh, stride_qd,
    stride_kb, stride_ks, stride_kn, stride_kh, stride_kd,
    stride_vb, stride_vs, stride_vn, stride_vh, stride_vd,
    stride_mb, stride_ms, stride_mk,
    stride_bb, stride_bh, stride_bq, stride_bk,
    scale,
    rows,  # S
    rows_per_bias,  # S, or B S where the batch shares the bias
    stride_inverse,  # B S H N: between the two statistics
    queries,
    keys,
    heads,
    width,
    STEP: tl.constexpr,  # see `tiles.at`
    HAS_MASK: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    EVEN_Q: tl.constexpr,  # BLOCK_Q divides N
    EVEN_K: tl.constexpr,
    EVEN_D: tl.constexpr,
    PRECISION: tl.constexpr,  # of fp32 products: "ieee" or "tf32"
    EXACT: tl.constexpr,  # whether 16 bits are too few: fp32 (not TF32), or few keys
    ROWS: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One program computes BLOCK_Q queries of one head in ROWS rows that share their bias.

    It walks over the keys once with a running maximum and sum (online softmax, Milakov and
    Gimelshein 2018; FlashAttention-2, Dao 2023).
    """
    blocks = tl.cdiv(queries, BLOCK_Q)
    i_q = (tl.program_id(0) % blocks) * BLOCK_Q
    i_head = (tl.program_id(0) // blocks) % heads
    i_group = tl.program_id(0) // (blocks * heads)
    o_q = tl.arange(0, BLOCK_Q)
    o_k = tl.arange(0, BLOCK_K)
    o_d = tl.arange(0, BLOCK_D)
    width = width // STEP * STEP
    SELECT: tl.constexpr = HAS_MASK or not EVEN_K

    p_kr = ()
    p_vr = ()
    p_mr = ()
    b_q = ()
    b_next = ()
    b_acc = ()
    b_max = ()
    b_sum = ()
    for r in tl.static_range(ROWS):
        i_row = row(i_group, r, rows_per_bias, ROWS)
        p_qr = at(p_q, i_row, i_head, rows, stride_qb, stride_qs, stride_qh, STEP)
        b_q = b_q + (
            load_tile(p_qr, i_q, o_q, o_d, stride_qn, stride_qd, queries, width, EVEN_Q, EVEN_D),
        )
        p_kr = p_kr + (at(p_k, i_row, i_head, rows, stride_kb, stride_ks, stride_kh, STEP),)
        p_vr = p_vr + (at(p_v, i_row, i_head, rows, stride_vb, stride_vs, stride_vh, STEP),)
        if HAS_MASK:
            p_mr = p_mr + (at(p_mask, i_row, i_head, rows, stride_mb, stride_ms, 0, 1),)
        else:
            p_mr = p_mr + (0,)
        b_next = b_next + (load_kept(p_mr[r], 0, o_k, stride_mk, keys, HAS_MASK, EVEN_K),)
        b_acc = b_acc + (tl.zeros([BLOCK_Q, BLOCK_D], tl.float32),)
        b_max = b_max + (tl.full([BLOCK_Q], float("-inf"), tl.float32),)
        b_sum = b_sum + (tl.zeros([BLOCK_Q], tl.float32),)
    if HAS_BIAS:
        i_bias = (row(i_group, 0, rows_per_bias, ROWS) // rows_per_bias).to(tl.int64)
        p_bias += i_bias * stride_bb + i_head.to(tl.int64) * stride_bh + long(i_q) * stride_bq
    queries_left = queries - i_q

    for start in range(0, keys, BLOCK_K):
        i_next = ahead(start, BLOCK_K, keys, EVEN_K)
        b_bias = None
        if HAS_BIAS:  # [BLOCK_Q, BLOCK_K], read through its columns
            b_bias = load_bias(
                p_bias, start, o_q, o_k, stride_bq, stride_bk, queries_left, keys, EVEN_Q, EVEN_K
            )
        n_next = ()
        n_acc = ()
        n_max = ()
        n_sum = ()
        for r in tl.static_range(ROWS):
            b_k = load_tile(
                p_kr[r], start, o_k, o_d, stride_kn, stride_kd, keys, width, EVEN_K, EVEN_D
            )
            b_v = load_tile(
                p_vr[r], start, o_k, o_d, stride_vn, stride_vd, keys, width, EVEN_K, EVEN_D
            )
            # The mask is read a block ahead: nothing else would hide the time that takes.
            n_next = n_next + (load_kept(p_mr[r], i_next, o_k, stride_mk, keys, HAS_MASK, EVEN_K),)
            b_s = dot(b_q[r], tl.trans(b_k), PRECISION)
            b_x = logits(b_s, b_bias, b_next[r], scale, HAS_BIAS, SELECT)
            b_new = tl.maximum(b_max[r], tl.max(b_x, 1))
            b_shift = shift_of(b_new, EXACT)
            b_p = weights(b_x, b_shift[:, None], EXACT)
            b_old = rescaling(b_max[r], b_new, EXACT)
            b_a = b_acc[r] * b_old[:, None]
            n_acc = n_acc + (add_dot(b_p.to(b_v.dtype), b_v, b_a, PRECISION),)
            n_sum = n_sum + (b_sum[r] * b_old + tl.sum(b_p, 1),)
            n_max = n_max + (b_new,)
        b_next = n_next
        b_acc = n_acc
        b_max = n_max
        b_sum = n_sum

    for r in tl.static_range(ROWS):
        i_row = row(i_group, r, rows_per_bias, ROWS).to(tl.int64)
        b_shift = shift_of(b_max[r], EXACT or p_q.dtype.element_ty == tl.float32)  # see load_shift
        # A row whose keys are all masked has no weights: zeros, here and in every gradient.
        b_none = b_sum[r] == 0.0
        b_inverse = tl.where(b_none, 0.0, tl.math.div_rn(1.0, tl.where(b_none, 1.0, b_sum[r])))
        p = p_stats + (i_row * heads + i_head) * queries + i_q
        tl.store(p + o_q, b_shift, mask=o_q < queries_left)
        tl.store(p + stride_inverse + o_q, b_inverse, mask=o_q < queries_left)
        p_or = p_out + (i_row * queries * heads + i_head) * width
        b_out = b_acc[r] * b_inverse[:, None]
        store_tile(p_or, b_out, i_q, o_q, o_d, heads * width, queries, width, EVEN_Q and EVEN_D)

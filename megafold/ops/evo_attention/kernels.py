"""EvoAttention in Triton: one kernel forward, three backward, no atomics, nothing cubic in memory.

Letters: B batch, S rows, N queries, M keys, H heads, D head width. *Rows* are the attentions
that share one tile of the bias: the S of one batch entry, or all B S of them where the bias
has no batch. A program takes ROWS of them at once, so that a tile of the bias is read once for
all of them. Statistics are ``[2, B S, H, N]`` in fp32: the shift that was taken from the logits
(their maximum, times log2 e) and one over the sum of the weights. Keeping the two apart, not
their logarithm's sum, gives the backward pass the very weights of the forward pass, also where
logits are in the millions and a logarithm has lost its digits.

Names: ``p_`` pointer, ``o_`` offsets, ``b_`` block, ``i_`` index of program or row.
"""

from __future__ import annotations

import triton
import triton.language as tl

LOG2E: tl.constexpr = tl.constexpr(1.4426950408889634)


@triton.jit
def _load_tile(p, o_n, o_d, stride_n, stride_d, n, d, EVEN_N: tl.constexpr, EVEN_D: tl.constexpr):
    """Rows ``o_n`` and columns ``o_d`` of a matrix ``[n, d]``; zeros beyond its ends."""
    # 64-bit offsets: one row, times its stride, may lie beyond 2**31 elements.
    p_tile = p + o_n.to(tl.int64)[:, None] * stride_n + o_d.to(tl.int64)[None, :] * stride_d
    if EVEN_N and EVEN_D:
        return tl.load(p_tile)
    elif EVEN_D:
        return tl.load(p_tile, mask=o_n[:, None] < n, other=0.0)
    elif EVEN_N:
        return tl.load(p_tile, mask=o_d[None, :] < d, other=0.0)
    else:
        return tl.load(p_tile, mask=(o_n[:, None] < n) & (o_d[None, :] < d), other=0.0)


@triton.jit
def _store_tile(p, b, o_n, o_d, stride_n, n, d, EVEN_N: tl.constexpr, EVEN_D: tl.constexpr):
    """Store what :func:`_load_tile` loads; the columns are contiguous."""
    p_tile = p + o_n.to(tl.int64)[:, None] * stride_n + o_d[None, :]
    b = b.to(p.dtype.element_ty)
    if EVEN_N and EVEN_D:
        tl.store(p_tile, b)
    else:
        tl.store(p_tile, b, mask=(o_n[:, None] < n) & (o_d[None, :] < d))


@triton.jit
def _load_kept(p_mask, o_k, stride_mk, keys, HAS_MASK: tl.constexpr, EVEN_K: tl.constexpr):
    """Which keys ``o_k`` of one row there are and the mask allows, bool."""
    if HAS_MASK:
        if EVEN_K:
            return tl.load(p_mask + o_k.to(tl.int64) * stride_mk) != 0
        return tl.load(p_mask + o_k.to(tl.int64) * stride_mk, mask=o_k < keys, other=0) != 0
    return o_k < keys


@triton.jit
def _row(i_group, r, rows_per_bias, ROWS: tl.constexpr):
    """Row ``r`` of a group of rows, counted over B S.

    The last group of a bias may be short; it does its last row more than once, with one result.
    """
    groups = tl.cdiv(rows_per_bias, ROWS)
    i_in_bias = tl.minimum((i_group % groups) * ROWS + r, rows_per_bias - 1)
    return (i_group // groups) * rows_per_bias + i_in_bias


@triton.jit
def _at(p, i_row, i_head, rows, stride_b, stride_s, stride_h):
    """Where row ``i_row`` (over B S) and one head begin in ``[B, S, N, H, D]``."""
    i_batch, i_s = (i_row // rows).to(tl.int64), (i_row % rows).to(tl.int64)
    return p + i_batch * stride_b + i_s * stride_s + i_head.to(tl.int64) * stride_h


@triton.jit
def _masked_logits(b_s, b_bias, b_kept, scale, HAS_BIAS: tl.constexpr, SELECT: tl.constexpr):
    """Logits of ``[queries, keys]`` from products of q and k; -inf where a key is left out.

    Forward and backward go through these same operations, so that both see the same bits.
    """
    b_x = b_s * scale
    if HAS_BIAS:
        b_x += b_bias
    if SELECT:
        b_x = tl.where(b_kept[None, :], b_x, float("-inf"))
    return b_x


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
    HAS_MASK: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    EVEN_Q: tl.constexpr,  # BLOCK_Q divides N
    EVEN_K: tl.constexpr,
    EVEN_D: tl.constexpr,
    PRECISION: tl.constexpr,  # of fp32 products: "ieee" or "tf32"
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
    i_block = tl.program_id(0) % blocks
    i_head = (tl.program_id(0) // blocks) % heads
    i_group = tl.program_id(0) // (blocks * heads)
    o_q = i_block * BLOCK_Q + tl.arange(0, BLOCK_Q)
    o_d = tl.arange(0, BLOCK_D)
    SELECT: tl.constexpr = HAS_MASK or not EVEN_K

    i_rows = ()
    b_q = ()
    b_acc = ()
    b_max = ()
    b_sum = ()
    for r in tl.static_range(ROWS):
        i_row = _row(i_group, r, rows_per_bias, ROWS)
        p_qr = _at(p_q, i_row, i_head, rows, stride_qb, stride_qs, stride_qh)
        i_rows = i_rows + (i_row,)
        b_q = b_q + (
            _load_tile(p_qr, o_q, o_d, stride_qn, stride_qd, queries, width, EVEN_Q, EVEN_D),
        )
        b_acc = b_acc + (tl.zeros([BLOCK_Q, BLOCK_D], tl.float32),)
        b_max = b_max + (tl.full([BLOCK_Q], float("-inf"), tl.float32),)
        b_sum = b_sum + (tl.zeros([BLOCK_Q], tl.float32),)
    if HAS_BIAS:
        i_bias = (i_rows[0] // rows_per_bias).to(tl.int64)
        p_bias += i_bias * stride_bb + i_head.to(tl.int64) * stride_bh

    for start in range(0, keys, BLOCK_K):
        o_k = start + tl.arange(0, BLOCK_K)
        b_bias = None
        if HAS_BIAS:
            b_bias = _load_tile(
                p_bias, o_q, o_k, stride_bq, stride_bk, queries, keys, EVEN_Q, EVEN_K
            ).to(tl.float32)  # [BLOCK_Q, BLOCK_K]
        n_acc = ()
        n_max = ()
        n_sum = ()
        for r in tl.static_range(ROWS):
            i_row = i_rows[r]
            p_kr = _at(p_k, i_row, i_head, rows, stride_kb, stride_ks, stride_kh)
            b_k = _load_tile(p_kr, o_k, o_d, stride_kn, stride_kd, keys, width, EVEN_K, EVEN_D)
            p_vr = _at(p_v, i_row, i_head, rows, stride_vb, stride_vs, stride_vh)
            b_v = _load_tile(p_vr, o_k, o_d, stride_vn, stride_vd, keys, width, EVEN_K, EVEN_D)
            b_kept = None
            if SELECT:
                p_mr = p_mask
                if HAS_MASK:
                    p_mr = _at(p_mask, i_row, i_head, rows, stride_mb, stride_ms, 0)
                b_kept = _load_kept(p_mr, o_k, stride_mk, keys, HAS_MASK, EVEN_K)
            b_s = tl.dot(b_q[r], tl.trans(b_k), input_precision=PRECISION)
            b_x = _masked_logits(b_s, b_bias, b_kept, scale, HAS_BIAS, SELECT)
            b_new = tl.maximum(b_max[r], tl.max(b_x, 1))
            b_shift = b_new * LOG2E
            if SELECT:  # no key yet: -inf - -inf would be NaN
                b_shift = tl.where(b_new == float("-inf"), 0.0, b_shift)
            b_p = tl.exp2(b_x * LOG2E - b_shift[:, None])
            b_old = tl.exp2(b_max[r] * LOG2E - b_shift)
            b_a = b_acc[r] * b_old[:, None]
            n_acc = n_acc + (tl.dot(b_p.to(b_v.dtype), b_v, acc=b_a, input_precision=PRECISION),)
            n_sum = n_sum + (b_sum[r] * b_old + tl.sum(b_p, 1),)
            n_max = n_max + (b_new,)
        b_acc = n_acc
        b_max = n_max
        b_sum = n_sum

    for r in tl.static_range(ROWS):
        i_row = i_rows[r].to(tl.int64)
        b_shift = tl.where(b_max[r] == float("-inf"), 0.0, b_max[r] * LOG2E)
        # A row whose keys are all masked has no weights: zeros, here and in every gradient.
        b_inverse = tl.where(b_sum[r] > 0.0, 1.0 / b_sum[r], 0.0)
        p = p_stats + (i_row * heads + i_head) * queries
        tl.store(p + o_q, b_shift, mask=o_q < queries)
        p += stride_inverse
        tl.store(p + o_q, b_inverse, mask=o_q < queries)
        p = p_out + (i_row * queries * heads + i_head) * width
        b_out = b_acc[r] * b_inverse[:, None]
        _store_tile(p, b_out, o_q, o_d, heads * width, queries, width, EVEN_Q, EVEN_D)


@triton.jit
def grad_q_kernel(
    p_q, p_k, p_v, p_mask, p_bias, p_out, p_stats,  # as in the forward kernel
    p_grad,  # gradient of out, [B, S, N, H, D], any strides
    p_delta,  # fp32 [B S, H, N], written: sum_d out grad / sum of the weights
    p_grad_q,  # [B, S, N, H, D], contiguous, written
    p_grad_bias,  # [B, H, N, M], contiguous, written where STORE_BIAS
    stride_qb, stride_qs, stride_qn, stride_qh, stride_qd,
    stride_kb, stride_ks, stride_kn, stride_kh, stride_kd,
    stride_vb, stride_vs, stride_vn, stride_vh, stride_vd,
    stride_gb, stride_gs, stride_gn, stride_gh, stride_gd,
    stride_mb, stride_ms, stride_mk,
    stride_bb, stride_bh, stride_bq, stride_bk,
    scale, rows, rows_per_bias, stride_inverse, queries, keys, heads, width,
    HAS_MASK: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    EVEN_Q: tl.constexpr,
    EVEN_K: tl.constexpr,
    EVEN_D: tl.constexpr,
    PRECISION: tl.constexpr,
    STORE_Q: tl.constexpr,  # whether the gradient of q is asked for
    STORE_BIAS: tl.constexpr,  # whether that of a bias is which no rows share
    ROWS: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One program computes the gradient of BLOCK_Q queries of one head in ROWS rows.

    On the way it leaves delta for the other kernels and, where every bias belongs to one row,
    the gradient of the bias, which then is that of the logits.
    """
    blocks = tl.cdiv(queries, BLOCK_Q)
    i_block = tl.program_id(0) % blocks
    i_head = (tl.program_id(0) // blocks) % heads
    i_group = tl.program_id(0) // (blocks * heads)
    o_q = i_block * BLOCK_Q + tl.arange(0, BLOCK_Q)
    o_d = tl.arange(0, BLOCK_D)
    SELECT: tl.constexpr = HAS_MASK or not EVEN_K

    i_rows = ()
    b_q = ()
    b_do = ()
    b_shift = ()
    b_inverse = ()
    b_delta = ()
    b_dq = ()
    for r in tl.static_range(ROWS):
        i_row = _row(i_group, r, rows_per_bias, ROWS)
        i_rows = i_rows + (i_row,)
        p_qr = _at(p_q, i_row, i_head, rows, stride_qb, stride_qs, stride_qh)
        b_q = b_q + (
            _load_tile(p_qr, o_q, o_d, stride_qn, stride_qd, queries, width, EVEN_Q, EVEN_D),
        )
        p_gr = _at(p_grad, i_row, i_head, rows, stride_gb, stride_gs, stride_gh)
        b_g = _load_tile(p_gr, o_q, o_d, stride_gn, stride_gd, queries, width, EVEN_Q, EVEN_D)
        b_do = b_do + (b_g,)
        p_or = p_out + (i_row.to(tl.int64) * queries * heads + i_head) * width
        b_o = _load_tile(p_or, o_q, o_d, heads * width, 1, queries, width, EVEN_Q, EVEN_D)
        o_stats = (i_row.to(tl.int64) * heads + i_head) * queries + o_q
        b_r = tl.load(
            p_stats + stride_inverse + o_stats,
            mask=o_q < queries,
            other=0.0,
        )
        b_d = tl.sum(b_o.to(tl.float32) * b_g.to(tl.float32), 1) * b_r
        tl.store(p_delta + o_stats, b_d, mask=o_q < queries)
        b_shift = b_shift + (tl.load(p_stats + o_stats, mask=o_q < queries, other=0.0),)
        b_inverse = b_inverse + (b_r,)
        b_delta = b_delta + (b_d,)
        b_dq = b_dq + (tl.zeros([BLOCK_Q, BLOCK_D], tl.float32),)
    if HAS_BIAS:
        i_bias = (i_rows[0] // rows_per_bias).to(tl.int64)
        p_bias += i_bias * stride_bb + i_head.to(tl.int64) * stride_bh

    if STORE_Q or STORE_BIAS:
        for start in range(0, keys, BLOCK_K):
            o_k = start + tl.arange(0, BLOCK_K)
            b_bias = None
            if HAS_BIAS:
                b_bias = _load_tile(
                    p_bias, o_q, o_k, stride_bq, stride_bk, queries, keys, EVEN_Q, EVEN_K
                ).to(tl.float32)
            n_dq = ()
            for r in tl.static_range(ROWS):
                i_row = i_rows[r]
                p_kr = _at(p_k, i_row, i_head, rows, stride_kb, stride_ks, stride_kh)
                b_k = _load_tile(p_kr, o_k, o_d, stride_kn, stride_kd, keys, width, EVEN_K, EVEN_D)
                p_vr = _at(p_v, i_row, i_head, rows, stride_vb, stride_vs, stride_vh)
                b_v = _load_tile(p_vr, o_k, o_d, stride_vn, stride_vd, keys, width, EVEN_K, EVEN_D)
                b_kept = None
                if SELECT:
                    p_mr = p_mask
                    if HAS_MASK:
                        p_mr = _at(p_mask, i_row, i_head, rows, stride_mb, stride_ms, 0)
                    b_kept = _load_kept(p_mr, o_k, stride_mk, keys, HAS_MASK, EVEN_K)
                b_s = tl.dot(b_q[r], tl.trans(b_k), input_precision=PRECISION)
                b_x = _masked_logits(b_s, b_bias, b_kept, scale, HAS_BIAS, SELECT)
                b_p = tl.exp2(b_x * LOG2E - b_shift[r][:, None])
                b_dp = tl.dot(b_do[r], tl.trans(b_v), input_precision=PRECISION)
                # One over the sum stands with the gradients: two operations, not three.
                b_ds = b_p * (b_dp * b_inverse[r][:, None] - b_delta[r][:, None])
                if STORE_BIAS:
                    p_br = p_grad_bias + (i_row.to(tl.int64) * heads + i_head) * queries * keys
                    _store_tile(p_br, b_ds, o_q, o_k, keys, queries, keys, EVEN_Q, EVEN_K)
                if STORE_Q:
                    n_dq = n_dq + (
                        tl.dot(b_ds.to(b_k.dtype), b_k, acc=b_dq[r], input_precision=PRECISION),
                    )
                else:
                    n_dq = n_dq + (b_dq[r],)
            b_dq = n_dq

    if STORE_Q:
        for r in tl.static_range(ROWS):
            p = p_grad_q + (i_rows[r].to(tl.int64) * queries * heads + i_head) * width
            b_g = b_dq[r] * scale
            _store_tile(p, b_g, o_q, o_d, heads * width, queries, width, EVEN_Q, EVEN_D)


@triton.jit
def grad_kv_kernel(
    p_q, p_k, p_v, p_mask, p_bias, p_stats, p_grad,  # as above
    p_delta,  # fp32 [B S, H, N], as the kernel for q left it
    p_grad_k,  # [B, S, M, H, D], contiguous, written
    p_grad_v,  # [B, S, M, H, D], contiguous, written
    stride_qb, stride_qs, stride_qn, stride_qh, stride_qd,
    stride_kb, stride_ks, stride_kn, stride_kh, stride_kd,
    stride_vb, stride_vs, stride_vn, stride_vh, stride_vd,
    stride_gb, stride_gs, stride_gn, stride_gh, stride_gd,
    stride_mb, stride_ms, stride_mk,
    stride_bb, stride_bh, stride_bq, stride_bk,
    scale, rows, rows_per_bias, stride_inverse, queries, keys, heads, width,
    HAS_MASK: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    EVEN_Q: tl.constexpr,
    EVEN_K: tl.constexpr,
    EVEN_D: tl.constexpr,
    PRECISION: tl.constexpr,
    STORE_K: tl.constexpr,  # whether the gradient of k is asked for
    STORE_V: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One program computes the gradients of BLOCK_K keys and values of one head in ROWS rows.

    Everything is transposed, ``[keys, queries]``, so that weights and their gradients are left
    operands of the products they enter. Masked keys are not left out on the way: a key's
    gradient depends on no other key once the statistics are known, so it is set to zero at
    the end.
    """
    blocks = tl.cdiv(keys, BLOCK_K)
    i_block = tl.program_id(0) % blocks
    i_head = (tl.program_id(0) // blocks) % heads
    i_group = tl.program_id(0) // (blocks * heads)
    o_k = i_block * BLOCK_K + tl.arange(0, BLOCK_K)
    o_d = tl.arange(0, BLOCK_D)

    i_rows = ()
    b_k = ()
    b_v = ()
    b_dk = ()
    b_dv = ()
    for r in tl.static_range(ROWS):
        i_row = _row(i_group, r, rows_per_bias, ROWS)
        i_rows = i_rows + (i_row,)
        p_kr = _at(p_k, i_row, i_head, rows, stride_kb, stride_ks, stride_kh)
        b_k = b_k + (_load_tile(p_kr, o_k, o_d, stride_kn, stride_kd, keys, width, EVEN_K, EVEN_D),)
        p_vr = _at(p_v, i_row, i_head, rows, stride_vb, stride_vs, stride_vh)
        b_v = b_v + (_load_tile(p_vr, o_k, o_d, stride_vn, stride_vd, keys, width, EVEN_K, EVEN_D),)
        b_dk = b_dk + (tl.zeros([BLOCK_K, BLOCK_D], tl.float32),)
        b_dv = b_dv + (tl.zeros([BLOCK_K, BLOCK_D], tl.float32),)
    if HAS_BIAS:
        i_bias = (i_rows[0] // rows_per_bias).to(tl.int64)
        p_bias += i_bias * stride_bb + i_head.to(tl.int64) * stride_bh

    for start in range(0, queries, BLOCK_Q):
        o_q = start + tl.arange(0, BLOCK_Q)
        b_bias = None
        if HAS_BIAS:
            b_bias = _load_tile(
                p_bias, o_k, o_q, stride_bk, stride_bq, keys, queries, EVEN_K, EVEN_Q
            ).to(tl.float32)  # [BLOCK_K, BLOCK_Q]
        n_dk = ()
        n_dv = ()
        for r in tl.static_range(ROWS):
            i_row = i_rows[r]
            p_qr = _at(p_q, i_row, i_head, rows, stride_qb, stride_qs, stride_qh)
            b_q = _load_tile(p_qr, o_q, o_d, stride_qn, stride_qd, queries, width, EVEN_Q, EVEN_D)
            p_gr = _at(p_grad, i_row, i_head, rows, stride_gb, stride_gs, stride_gh)
            b_do = _load_tile(p_gr, o_q, o_d, stride_gn, stride_gd, queries, width, EVEN_Q, EVEN_D)
            p_shift = p_stats + (i_row.to(tl.int64) * heads + i_head) * queries
            p_inverse = p_shift + stride_inverse
            p_d = p_delta + (i_row.to(tl.int64) * heads + i_head) * queries
            if EVEN_Q:
                b_shift = tl.load(p_shift + o_q)
                b_inverse = tl.load(p_inverse + o_q)
                b_delta = tl.load(p_d + o_q)
            else:  # a query beyond the end has no weights
                b_shift = tl.load(p_shift + o_q, mask=o_q < queries, other=0.0)
                b_inverse = tl.load(p_inverse + o_q, mask=o_q < queries, other=0.0)
                b_delta = tl.load(p_d + o_q, mask=o_q < queries, other=0.0)
            b_s = tl.dot(b_k[r], tl.trans(b_q), input_precision=PRECISION)
            b_x = _masked_logits(b_s, b_bias, None, scale, HAS_BIAS, False)
            b_p = tl.exp2(b_x * LOG2E - b_shift[None, :])
            if STORE_V:
                b_w = (b_p * b_inverse[None, :]).to(b_do.dtype)
                n_dv = n_dv + (tl.dot(b_w, b_do, acc=b_dv[r], input_precision=PRECISION),)
            else:
                n_dv = n_dv + (b_dv[r],)
            if STORE_K:
                b_dp = tl.dot(b_v[r], tl.trans(b_do), input_precision=PRECISION)
                b_ds = b_p * (b_dp * b_inverse[None, :] - b_delta[None, :])
                n_dk = n_dk + (
                    tl.dot(b_ds.to(b_q.dtype), b_q, acc=b_dk[r], input_precision=PRECISION),
                )
            else:
                n_dk = n_dk + (b_dk[r],)
        b_dk = n_dk
        b_dv = n_dv

    for r in tl.static_range(ROWS):
        i_row = i_rows[r]
        b_gk = b_dk[r] * scale
        b_gv = b_dv[r]
        if HAS_MASK:
            p_mr = _at(p_mask, i_row, i_head, rows, stride_mb, stride_ms, 0)
            b_kept = _load_kept(p_mr, o_k, stride_mk, keys, HAS_MASK, EVEN_K)
            b_gk = tl.where(b_kept[:, None], b_gk, 0.0)
            b_gv = tl.where(b_kept[:, None], b_gv, 0.0)
        o_row = (i_row.to(tl.int64) * keys * heads + i_head) * width
        if STORE_K:
            p = p_grad_k + o_row
            _store_tile(p, b_gk, o_k, o_d, heads * width, keys, width, EVEN_K, EVEN_D)
        if STORE_V:
            p = p_grad_v + o_row
            _store_tile(p, b_gv, o_k, o_d, heads * width, keys, width, EVEN_K, EVEN_D)


@triton.jit
def grad_bias_kernel(
    p_q, p_k, p_v, p_mask, p_bias, p_stats, p_grad, p_delta,  # as above
    p_grad_bias,  # [groups, B or 1, H, N, M], contiguous, written
    stride_qb, stride_qs, stride_qn, stride_qh, stride_qd,
    stride_kb, stride_ks, stride_kn, stride_kh, stride_kd,
    stride_vb, stride_vs, stride_vn, stride_vh, stride_vd,
    stride_gb, stride_gs, stride_gn, stride_gh, stride_gd,
    stride_mb, stride_ms, stride_mk,
    stride_bb, stride_bh, stride_bq, stride_bk,
    scale, rows, rows_per_bias, stride_inverse, queries, keys, heads, width,
    biases,  # 1, or B
    rows_per_group,
    HAS_MASK: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    EVEN_Q: tl.constexpr,
    EVEN_K: tl.constexpr,
    EVEN_D: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One program sums one tile of the bias's gradient over the rows of one group.

    Bias and sum stay in registers while the rows pass by: neither is read or written again.
    """
    blocks_q, blocks_k = tl.cdiv(queries, BLOCK_Q), tl.cdiv(keys, BLOCK_K)
    i_tile = tl.program_id(0) % (blocks_q * blocks_k)
    i_head = (tl.program_id(0) // (blocks_q * blocks_k)) % heads
    i_rest = tl.program_id(0) // (blocks_q * blocks_k * heads)
    i_bias = i_rest % biases
    i_group = i_rest // biases
    o_q = (i_tile // blocks_k) * BLOCK_Q + tl.arange(0, BLOCK_Q)
    o_k = (i_tile % blocks_k) * BLOCK_K + tl.arange(0, BLOCK_K)
    o_d = tl.arange(0, BLOCK_D)
    SELECT: tl.constexpr = HAS_MASK or not EVEN_K

    b_bias = None
    if HAS_BIAS:
        p_bias += i_bias.to(tl.int64) * stride_bb + i_head.to(tl.int64) * stride_bh
        b_bias = _load_tile(
            p_bias, o_q, o_k, stride_bq, stride_bk, queries, keys, EVEN_Q, EVEN_K
        ).to(tl.float32)
    b_sum = tl.zeros([BLOCK_Q, BLOCK_K], tl.float32)
    first = i_group * rows_per_group
    last = tl.minimum(first + rows_per_group, rows_per_bias)
    for i in range(first, last):
        i_row = i_bias * rows_per_bias + i
        p_qr = _at(p_q, i_row, i_head, rows, stride_qb, stride_qs, stride_qh)
        b_q = _load_tile(p_qr, o_q, o_d, stride_qn, stride_qd, queries, width, EVEN_Q, EVEN_D)
        p_kr = _at(p_k, i_row, i_head, rows, stride_kb, stride_ks, stride_kh)
        b_k = _load_tile(p_kr, o_k, o_d, stride_kn, stride_kd, keys, width, EVEN_K, EVEN_D)
        p_vr = _at(p_v, i_row, i_head, rows, stride_vb, stride_vs, stride_vh)
        b_v = _load_tile(p_vr, o_k, o_d, stride_vn, stride_vd, keys, width, EVEN_K, EVEN_D)
        p_gr = _at(p_grad, i_row, i_head, rows, stride_gb, stride_gs, stride_gh)
        b_do = _load_tile(p_gr, o_q, o_d, stride_gn, stride_gd, queries, width, EVEN_Q, EVEN_D)
        o_stats = (i_row.to(tl.int64) * heads + i_head) * queries + o_q
        p_inverse = p_stats + stride_inverse
        if EVEN_Q:
            b_shift = tl.load(p_stats + o_stats)
            b_inverse = tl.load(p_inverse + o_stats)
            b_delta = tl.load(p_delta + o_stats)
        else:
            b_shift = tl.load(p_stats + o_stats, mask=o_q < queries, other=0.0)
            b_inverse = tl.load(p_inverse + o_stats, mask=o_q < queries, other=0.0)
            b_delta = tl.load(p_delta + o_stats, mask=o_q < queries, other=0.0)
        b_kept = None
        if SELECT:
            p_mr = p_mask
            if HAS_MASK:
                p_mr = _at(p_mask, i_row, i_head, rows, stride_mb, stride_ms, 0)
            b_kept = _load_kept(p_mr, o_k, stride_mk, keys, HAS_MASK, EVEN_K)
        b_s = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION)
        b_x = _masked_logits(b_s, b_bias, b_kept, scale, HAS_BIAS, SELECT)
        b_p = tl.exp2(b_x * LOG2E - b_shift[:, None])
        b_dp = tl.dot(b_do, tl.trans(b_v), input_precision=PRECISION)
        b_sum += b_p * (b_dp * b_inverse[:, None] - b_delta[:, None])

    p = p_grad_bias + ((i_rest.to(tl.int64)) * heads + i_head) * queries * keys
    _store_tile(p, b_sum, o_q, o_k, keys, queries, keys, EVEN_Q, EVEN_K)

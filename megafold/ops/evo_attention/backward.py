"""EvoAttention's gradients in Triton: one kernel for q, one for k and v, one for the bias."""

from __future__ import annotations

import triton
import triton.language as tl

from megafold.ops.evo_attention.tiles import (
    ahead,
    at,
    grad_logits,
    load_bias,
    load_kept,
    load_row,
    load_shift,
    load_tile,
    logits,
    long,
    next_row,
    row,
    store_gradient,
    weights,
)
from megafold.ops.products import add_dot, dot


@triton.jit
def grad_q_kernel(
    p_q, p_k, p_v, p_mask, p_bias, p_out, p_stats,  # as in the forward kernel
    p_grad,  # gradient of out, [B, S, N, H, D], any strides
    p_delta,  # fp32 [B S, H, N], written: sum_d out grad, over the sum of the weights unless EXACT
    p_grad_q,  # [B, S, N, H, D], written; lies as q does (AS_OPERANDS) or contiguous
    p_grad_bias,  # [B, H, N, M], contiguous, written where STORE_BIAS
    stride_qb, stride_qs, stride_qn, stride_qh, stride_qd,
    stride_kb, stride_ks, stride_kn, stride_kh, stride_kd,
    stride_vb, stride_vs, stride_vn, stride_vh, stride_vd,
    stride_gb, stride_gs, stride_gn, stride_gh, stride_gd,
    stride_mb, stride_ms, stride_mk,
    stride_bb, stride_bh, stride_bq, stride_bk,
    scale, rows, rows_per_bias, stride_inverse, queries, keys, heads, width,
    STEP: tl.constexpr,  # see `tiles.at`
    HAS_MASK: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    EVEN_Q: tl.constexpr,
    EVEN_K: tl.constexpr,
    EVEN_D: tl.constexpr,
    PRECISION: tl.constexpr,
    EXACT: tl.constexpr,
    STORE_Q: tl.constexpr,  # whether the gradient of q is asked for
    STORE_BIAS: tl.constexpr,  # whether that of a bias is which no rows share
    AS_OPERANDS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
    i_program=None,  # None: that of the grid
):  # fmt: skip
    """One program computes the gradient of BLOCK_Q queries of one head in ROWS rows.

    On the way it leaves delta for the other kernels (unless None) and, where every bias belongs to
    one row, the gradient of the bias, which then is that of the logits.
    """
    if i_program is None:
        i_program = tl.program_id(0)
    blocks = tl.cdiv(queries, BLOCK_Q)
    i_q = (i_program % blocks) * BLOCK_Q
    i_head = (i_program // blocks) % heads
    i_group = i_program // (blocks * heads)
    o_q = tl.arange(0, BLOCK_Q)
    o_k = tl.arange(0, BLOCK_K)
    o_d = tl.arange(0, BLOCK_D)
    width = width // STEP * STEP
    FP32: tl.constexpr = p_q.dtype.element_ty == tl.float32
    SELECT: tl.constexpr = HAS_MASK or not EVEN_K

    i_first = row(i_group, 0, rows_per_bias, ROWS)
    if HAS_BIAS:
        i_bias = (i_first // rows_per_bias).to(tl.int64)
        p_bias += i_bias * stride_bb + i_head.to(tl.int64) * stride_bh + long(i_q) * stride_bq
    if STORE_BIAS:
        p_grad_bias += ((i_first.to(tl.int64) * heads + i_head) * queries + i_q) * keys
    queries_left = queries - i_q

    p_kr = ()
    p_vr = ()
    p_mr = ()
    b_q = ()
    b_do = ()
    b_next = ()
    b_shift = ()
    b_inverse = ()
    b_delta = ()
    b_dq = ()
    for r in tl.static_range(ROWS):
        i_row = row(i_group, r, rows_per_bias, ROWS)
        p_qr = at(p_q, i_row, i_head, rows, stride_qb, stride_qs, stride_qh, STEP)
        b_q = b_q + (
            load_tile(p_qr, i_q, o_q, o_d, stride_qn, stride_qd, queries, width, EVEN_Q, EVEN_D),
        )
        p_gr = at(p_grad, i_row, i_head, rows, stride_gb, stride_gs, stride_gh, STEP)
        b_g = load_tile(p_gr, i_q, o_q, o_d, stride_gn, stride_gd, queries, width, EVEN_Q, EVEN_D)
        b_do = b_do + (b_g,)
        i_stats = (i_row.to(tl.int64) * heads + i_head) * queries
        b_r = load_row(p_stats + stride_inverse + i_stats, i_q, o_q, queries, EVEN_Q)
        b_shift = b_shift + (load_shift(p_stats + i_stats, i_q, o_q, queries, EVEN_Q, EXACT, FP32),)
        b_inverse = b_inverse + (b_r,)
        b_dq = b_dq + (tl.zeros([BLOCK_Q, BLOCK_D], tl.float32),)
        p_kr = p_kr + (at(p_k, i_row, i_head, rows, stride_kb, stride_ks, stride_kh, STEP),)
        p_vr = p_vr + (at(p_v, i_row, i_head, rows, stride_vb, stride_vs, stride_vh, STEP),)
        if HAS_MASK:
            p_mr = p_mr + (at(p_mask, i_row, i_head, rows, stride_mb, stride_ms, 0, 1),)
        else:
            p_mr = p_mr + (0,)
        b_next = b_next + (load_kept(p_mr[r], 0, o_k, stride_mk, keys, HAS_MASK, EVEN_K),)
        if EXACT:
            # Where one key has all the weight, its gradient is a difference of near equals that
            # has to cancel as it does in PyTorch: delta from the very products that it is taken
            # from, for one more walk over the keys.
            b_d = tl.zeros([BLOCK_Q], tl.float32)
            for start in range(0, keys, BLOCK_K):
                b_bias = None
                if HAS_BIAS:
                    b_bias = load_bias(
                        p_bias, start, o_q, o_k, stride_bq, stride_bk, queries_left, keys,
                        EVEN_Q, EVEN_K,
                    )  # fmt: skip
                b_k = load_tile(
                    p_kr[r], start, o_k, o_d, stride_kn, stride_kd, keys, width, EVEN_K, EVEN_D
                )
                b_v = load_tile(
                    p_vr[r], start, o_k, o_d, stride_vn, stride_vd, keys, width, EVEN_K, EVEN_D
                )
                b_kept = load_kept(p_mr[r], start, o_k, stride_mk, keys, HAS_MASK, EVEN_K)
                b_s = dot(b_q[r], tl.trans(b_k), PRECISION)
                b_x = logits(b_s, b_bias, b_kept, scale, HAS_BIAS, SELECT)
                b_p = weights(b_x, b_shift[r][:, None], EXACT)
                b_dp = dot(b_do[r], tl.trans(b_v), PRECISION)
                b_d += tl.sum((b_p * b_r[:, None]) * b_dp, 1)
        else:
            p_or = p_out + (i_row.to(tl.int64) * queries * heads + i_head) * width
            b_o = load_tile(p_or, i_q, o_q, o_d, heads * width, 1, queries, width, EVEN_Q, EVEN_D)
            b_d = tl.sum(b_o.to(tl.float32) * b_g.to(tl.float32), 1) * b_r
        if p_delta is not None:
            tl.store(p_delta + i_stats + i_q + o_q, b_d, mask=i_q + o_q < queries)
        b_delta = b_delta + (b_d,)
    if STORE_Q or STORE_BIAS:
        for start in range(0, keys, BLOCK_K):
            i_next = ahead(start, BLOCK_K, keys, EVEN_K)
            b_bias = None
            if HAS_BIAS:
                b_bias = load_bias(
                    p_bias, start, o_q, o_k, stride_bq, stride_bk, queries_left, keys,
                    EVEN_Q, EVEN_K,
                )  # fmt: skip
            n_next = ()
            n_dq = ()
            for r in tl.static_range(ROWS):
                b_k = load_tile(
                    p_kr[r], start, o_k, o_d, stride_kn, stride_kd, keys, width, EVEN_K, EVEN_D
                )
                b_v = load_tile(
                    p_vr[r], start, o_k, o_d, stride_vn, stride_vd, keys, width, EVEN_K, EVEN_D
                )
                n_next = n_next + (
                    load_kept(p_mr[r], i_next, o_k, stride_mk, keys, HAS_MASK, EVEN_K),
                )
                b_s = dot(b_q[r], tl.trans(b_k), PRECISION)
                b_x = logits(b_s, b_bias, b_next[r], scale, HAS_BIAS, SELECT)
                b_p = weights(b_x, b_shift[r][:, None], EXACT)
                b_dp = dot(b_do[r], tl.trans(b_v), PRECISION)
                b_ds = grad_logits(
                    b_p, b_dp, b_inverse[r][:, None], b_delta[r][:, None], EXACT
                )  # fmt: skip
                if STORE_BIAS:
                    p_tile = p_grad_bias + start + (o_q.to(tl.int64)[:, None] * keys + o_k[None, :])
                    m = (o_q < queries_left)[:, None] & (start + o_k < keys)[None, :]
                    tl.store(p_tile, b_ds.to(p_grad_bias.dtype.element_ty), mask=m)
                if STORE_Q:
                    n_dq = n_dq + (add_dot(b_ds.to(b_k.dtype), b_k, b_dq[r], PRECISION),)
                else:
                    n_dq = n_dq + (b_dq[r],)
            b_next = n_next
            b_dq = n_dq

    if STORE_Q:
        for r in tl.static_range(ROWS):
            i_row = row(i_group, r, rows_per_bias, ROWS)
            store_gradient(
                p_grad_q, b_dq[r] * scale, i_row, i_head, i_q, o_q, o_d, stride_qb, stride_qs,
                stride_qn, stride_qh, rows, queries, heads, width, EVEN_Q and EVEN_D,
                AS_OPERANDS, STEP,
            )  # fmt: skip


@triton.jit
def product(b_k, b_q, KEYS_FIRST: tl.constexpr, PRECISION: tl.constexpr):
    """Of every key and every query, ``[keys, queries]`` or ``[queries, keys]``."""
    if KEYS_FIRST:
        return dot(b_k, tl.trans(b_q), PRECISION)
    else:
        return dot(b_q, tl.trans(b_k), PRECISION)


@triton.jit
def of_query(b, KEYS_FIRST: tl.constexpr):
    """A number for each query, beside a :func:`product`."""
    if KEYS_FIRST:
        return b[None, :]
    else:
        return b[:, None]


@triton.jit
def of_keys(b, KEYS_FIRST: tl.constexpr):
    """A :func:`product` as ``[keys, queries]``."""
    if KEYS_FIRST:
        return b
    else:
        return tl.trans(b)


@triton.jit
def grad_kv_kernel(
    p_q, p_k, p_v, p_mask, p_bias, p_stats, p_grad,  # as above
    p_delta,  # fp32 [B S, H, N], as the kernel for q left it
    p_grad_k, p_grad_v,  # [B, S, M, H, D], written; as k and v lie (AS_OPERANDS) or contiguous
    stride_qb, stride_qs, stride_qn, stride_qh, stride_qd,
    stride_kb, stride_ks, stride_kn, stride_kh, stride_kd,
    stride_vb, stride_vs, stride_vn, stride_vh, stride_vd,
    stride_gb, stride_gs, stride_gn, stride_gh, stride_gd,
    stride_mb, stride_ms, stride_mk,
    stride_bb, stride_bh, stride_bq, stride_bk,
    scale, rows, rows_per_bias, stride_inverse, queries, keys, heads, width,
    STEP: tl.constexpr,  # see `tiles.at`
    HAS_MASK: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    EVEN_Q: tl.constexpr,
    EVEN_K: tl.constexpr,
    EVEN_D: tl.constexpr,
    PRECISION: tl.constexpr,
    EXACT: tl.constexpr,
    STORE_K: tl.constexpr,  # whether the gradient of k is asked for
    STORE_V: tl.constexpr,
    AS_OPERANDS: tl.constexpr,
    KEYS_FIRST: tl.constexpr,  # whether logits are held as [keys, queries]
    ROWS: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
    i_program=None,  # None: that of the grid
):  # fmt: skip
    """One program computes the gradients of BLOCK_K keys and values of one head in ROWS rows.

    Masked keys are not left out on the way: a key's gradient depends on no other key once the
    statistics are known, so it is set to zero at the end. (Its logit may exceed the maximum that
    was taken without it, and its weight overflow; that stays in its own row.)
    """
    if i_program is None:
        i_program = tl.program_id(0)
    blocks = tl.cdiv(keys, BLOCK_K)
    i_k = (i_program % blocks) * BLOCK_K
    i_head = (i_program // blocks) % heads
    i_group = i_program // (blocks * heads)
    o_q = tl.arange(0, BLOCK_Q)
    o_k = tl.arange(0, BLOCK_K)
    o_d = tl.arange(0, BLOCK_D)
    width = width // STEP * STEP
    FP32: tl.constexpr = p_q.dtype.element_ty == tl.float32

    p_qr = ()
    p_gr = ()
    i_stats = ()
    b_k = ()
    b_v = ()
    b_dk = ()
    b_dv = ()
    n_shift = ()
    n_inverse = ()
    n_delta = ()
    for r in tl.static_range(ROWS):
        i_row = row(i_group, r, rows_per_bias, ROWS)
        p_kr = at(p_k, i_row, i_head, rows, stride_kb, stride_ks, stride_kh, STEP)
        b_k = b_k + (
            load_tile(p_kr, i_k, o_k, o_d, stride_kn, stride_kd, keys, width, EVEN_K, EVEN_D),
        )
        p_vr = at(p_v, i_row, i_head, rows, stride_vb, stride_vs, stride_vh, STEP)
        b_v = b_v + (
            load_tile(p_vr, i_k, o_k, o_d, stride_vn, stride_vd, keys, width, EVEN_K, EVEN_D),
        )
        b_dk = b_dk + (tl.zeros([BLOCK_K, BLOCK_D], tl.float32),)
        b_dv = b_dv + (tl.zeros([BLOCK_K, BLOCK_D], tl.float32),)
        p_qr = p_qr + (at(p_q, i_row, i_head, rows, stride_qb, stride_qs, stride_qh, STEP),)
        p_gr = p_gr + (at(p_grad, i_row, i_head, rows, stride_gb, stride_gs, stride_gh, STEP),)
        i_stats = i_stats + ((i_row.to(tl.int64) * heads + i_head) * queries,)
        # Statistics are read a block ahead; a query beyond the end has no weights.
        p_r = p_stats + i_stats[r]
        n_shift = n_shift + (load_shift(p_r, 0, o_q, queries, EVEN_Q, EXACT, FP32),)
        n_inverse = n_inverse + (load_row(p_r + stride_inverse, 0, o_q, queries, EVEN_Q),)
        n_delta = n_delta + (load_row(p_delta + i_stats[r], 0, o_q, queries, EVEN_Q),)
    if HAS_BIAS:
        i_bias = (row(i_group, 0, rows_per_bias, ROWS) // rows_per_bias).to(tl.int64)
        p_bias += i_bias * stride_bb + i_head.to(tl.int64) * stride_bh + long(i_k) * stride_bk
    keys_left = keys - i_k

    for start in range(0, queries, BLOCK_Q):
        b_shift = n_shift
        b_inverse = n_inverse
        b_delta = n_delta
        i_next = ahead(start, BLOCK_Q, queries, EVEN_Q)
        n_shift = ()
        n_inverse = ()
        n_delta = ()
        n_dk = ()
        n_dv = ()
        b_bias = None
        if HAS_BIAS:  # [BLOCK_K, BLOCK_Q] or [BLOCK_Q, BLOCK_K]
            if KEYS_FIRST:
                b_bias = load_bias(
                    p_bias, start, o_k, o_q, stride_bk, stride_bq, keys_left, queries,
                    EVEN_K, EVEN_Q,
                )  # fmt: skip
            else:
                b_bias = load_bias(
                    p_bias + long(start) * stride_bq, 0, o_q, o_k, stride_bq, stride_bk,
                    queries - start, keys_left, EVEN_Q, EVEN_K,
                )  # fmt: skip
        for r in tl.static_range(ROWS):
            p_r = p_stats + i_stats[r]
            n_shift = n_shift + (load_shift(p_r, i_next, o_q, queries, EVEN_Q, EXACT, FP32),)
            n_inverse = n_inverse + (load_row(p_r + stride_inverse, i_next, o_q, queries, EVEN_Q),)
            n_delta = n_delta + (load_row(p_delta + i_stats[r], i_next, o_q, queries, EVEN_Q),)
            b_q = load_tile(
                p_qr[r], start, o_q, o_d, stride_qn, stride_qd, queries, width, EVEN_Q, EVEN_D
            )
            b_do = load_tile(
                p_gr[r], start, o_q, o_d, stride_gn, stride_gd, queries, width, EVEN_Q, EVEN_D
            )
            b_s = product(b_k[r], b_q, KEYS_FIRST, PRECISION)
            b_x = logits(b_s, b_bias, None, scale, HAS_BIAS, False)
            b_p = weights(b_x, of_query(b_shift[r], KEYS_FIRST), EXACT)
            b_i = of_query(b_inverse[r], KEYS_FIRST)
            b_a = b_dv[r]
            if STORE_V:
                b_w = of_keys((b_p * b_i).to(b_do.dtype), KEYS_FIRST)
                b_a = add_dot(b_w, b_do, b_a, PRECISION)
            n_dv = n_dv + (b_a,)
            b_a = b_dk[r]
            if STORE_K:
                b_dp = product(b_v[r], b_do, KEYS_FIRST, PRECISION)
                b_ds = grad_logits(b_p, b_dp, b_i, of_query(b_delta[r], KEYS_FIRST), EXACT)
                b_ds = of_keys(b_ds.to(b_q.dtype), KEYS_FIRST)
                b_a = add_dot(b_ds, b_q, b_a, PRECISION)
            n_dk = n_dk + (b_a,)
        b_dk = n_dk
        b_dv = n_dv

    EVEN: tl.constexpr = EVEN_K and EVEN_D
    for r in tl.static_range(ROWS):
        i_row = row(i_group, r, rows_per_bias, ROWS)
        b_a = b_dk[r] * scale
        b_b = b_dv[r]
        if HAS_MASK:
            p_mr = at(p_mask, i_row, i_head, rows, stride_mb, stride_ms, 0, 1)
            b_kept = load_kept(p_mr, i_k, o_k, stride_mk, keys, HAS_MASK, EVEN_K)
            b_a = tl.where(b_kept[:, None], b_a, 0.0)
            b_b = tl.where(b_kept[:, None], b_b, 0.0)
        if STORE_K:
            store_gradient(
                p_grad_k, b_a, i_row, i_head, i_k, o_k, o_d, stride_kb, stride_ks, stride_kn,
                stride_kh, rows, keys, heads, width, EVEN, AS_OPERANDS, STEP,
            )  # fmt: skip
        if STORE_V:
            store_gradient(
                p_grad_v, b_b, i_row, i_head, i_k, o_k, o_d, stride_vb, stride_vs, stride_vn,
                stride_vh, rows, keys, heads, width, EVEN, AS_OPERANDS, STEP,
            )  # fmt: skip


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
    STEP: tl.constexpr,  # see `tiles.at`
    HAS_MASK: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    EVEN_Q: tl.constexpr,
    EVEN_K: tl.constexpr,
    EVEN_D: tl.constexpr,
    PRECISION: tl.constexpr,
    EXACT: tl.constexpr,
    WRAP: tl.constexpr,  # whether rows of several batch entries share the bias
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
    i_program=None,  # None: that of the grid
):  # fmt: skip
    """One program sums one tile of the bias's gradient over the rows of one group.

    Bias and sum stay in registers while the rows pass by: neither is read or written again.
    """
    if i_program is None:
        i_program = tl.program_id(0)
    blocks_q, blocks_k = tl.cdiv(queries, BLOCK_Q), tl.cdiv(keys, BLOCK_K)
    i_tile = i_program % (blocks_q * blocks_k)
    i_head = (i_program // (blocks_q * blocks_k)) % heads
    i_rest = i_program // (blocks_q * blocks_k * heads)
    i_q = (i_tile // blocks_k) * BLOCK_Q
    i_k = (i_tile % blocks_k) * BLOCK_K
    o_q = tl.arange(0, BLOCK_Q)
    o_k = tl.arange(0, BLOCK_K)
    o_d = tl.arange(0, BLOCK_D)
    width = width // STEP * STEP
    FP32: tl.constexpr = p_q.dtype.element_ty == tl.float32
    SELECT: tl.constexpr = HAS_MASK or not EVEN_K

    i_bias = i_rest % biases
    first = (i_rest // biases) * rows_per_group
    last = tl.minimum(first + rows_per_group, rows_per_bias)
    b_bias = None
    if HAS_BIAS:
        p_bias += i_bias.to(tl.int64) * stride_bb + i_head.to(tl.int64) * stride_bh
        p_bias += long(i_q) * stride_bq
        b_bias = load_bias(
            p_bias, i_k, o_q, o_k, stride_bq, stride_bk, queries - i_q, keys, EVEN_Q, EVEN_K
        )
    b_sum = tl.zeros([BLOCK_Q, BLOCK_K], tl.float32)
    i_row = i_bias * rows_per_bias + first
    p_qr = at(p_q, i_row, i_head, rows, stride_qb, stride_qs, stride_qh, STEP)
    p_kr = at(p_k, i_row, i_head, rows, stride_kb, stride_ks, stride_kh, STEP)
    p_vr = at(p_v, i_row, i_head, rows, stride_vb, stride_vs, stride_vh, STEP)
    p_gr = at(p_grad, i_row, i_head, rows, stride_gb, stride_gs, stride_gh, STEP)
    p_sr = p_stats + (i_row.to(tl.int64) * heads + i_head) * queries + i_q
    p_dr = p_delta + (i_row.to(tl.int64) * heads + i_head) * queries + i_q
    p_mr = p_mask
    if HAS_MASK:
        p_mr = at(p_mask, i_row, i_head, rows, stride_mb, stride_ms, 0, 1)
    left = queries - i_q
    step_q, step_k, step_v, step_g = (
        long(stride_qs),
        long(stride_ks),
        long(stride_vs),
        long(stride_gs),
    )
    step_s, step_m = long(heads * queries), long(stride_ms)
    n_shift = load_shift(p_sr, 0, o_q, left, EVEN_Q, EXACT, FP32)
    n_inverse = load_row(p_sr + stride_inverse, 0, o_q, left, EVEN_Q)
    n_delta = load_row(p_dr, 0, o_q, left, EVEN_Q)
    n_kept = load_kept(p_mr, i_k, o_k, stride_mk, keys, HAS_MASK, EVEN_K)
    for i in range(first + 1, last + 1):
        b_q = load_tile(p_qr, i_q, o_q, o_d, stride_qn, stride_qd, queries, width, EVEN_Q, EVEN_D)
        b_k = load_tile(p_kr, i_k, o_k, o_d, stride_kn, stride_kd, keys, width, EVEN_K, EVEN_D)
        b_v = load_tile(p_vr, i_k, o_k, o_d, stride_vn, stride_vd, keys, width, EVEN_K, EVEN_D)
        b_do = load_tile(p_gr, i_q, o_q, o_d, stride_gn, stride_gd, queries, width, EVEN_Q, EVEN_D)
        b_shift = n_shift
        b_inverse = n_inverse
        b_delta = n_delta
        b_kept = n_kept
        # On to the next row, whose statistics and mask are read ahead (the last one's twice).
        if WRAP:
            i_next = i_bias * rows_per_bias + i
            p_qr = next_row(p_qr, i_next, rows, stride_qb, stride_qs)
            p_kr = next_row(p_kr, i_next, rows, stride_kb, stride_ks)
            p_vr = next_row(p_vr, i_next, rows, stride_vb, stride_vs)
            p_gr = next_row(p_gr, i_next, rows, stride_gb, stride_gs)
            if HAS_MASK and i < last:
                p_mr = next_row(p_mr, i_next, rows, stride_mb, stride_ms)
        else:
            p_qr += step_q
            p_kr += step_k
            p_vr += step_v
            p_gr += step_g
            if HAS_MASK:
                p_mr += tl.where(i < last, step_m, 0)
        more = tl.where(i < last, step_s, 0)
        p_sr += more
        p_dr += more
        n_shift = load_shift(p_sr, 0, o_q, left, EVEN_Q, EXACT, FP32)
        n_inverse = load_row(p_sr + stride_inverse, 0, o_q, left, EVEN_Q)
        n_delta = load_row(p_dr, 0, o_q, left, EVEN_Q)
        if HAS_MASK:
            n_kept = load_kept(p_mr, i_k, o_k, stride_mk, keys, HAS_MASK, EVEN_K)
        b_s = dot(b_q, tl.trans(b_k), PRECISION)
        b_x = logits(b_s, b_bias, b_kept, scale, HAS_BIAS, SELECT)
        b_p = weights(b_x, b_shift[:, None], EXACT)
        b_dp = dot(b_do, tl.trans(b_v), PRECISION)
        b_sum += grad_logits(b_p, b_dp, b_inverse[:, None], b_delta[:, None], EXACT)

    p = p_grad_bias + ((i_rest.to(tl.int64) * heads + i_head) * queries + i_q) * keys + i_k
    m = (o_q < left)[:, None] & (i_k + o_k < keys)[None, :]
    p_tile = p + (o_q.to(tl.int64)[:, None] * keys + o_k[None, :])
    tl.store(p_tile, b_sum.to(p_grad_bias.dtype.element_ty), mask=m)

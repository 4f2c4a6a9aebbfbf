"""EvoAttention's gradients of q, k and v in one pass, on Hopper's own instructions (Gluon).

One program takes one head of one row, or more of them one after another. Warps have roles. Groups
of four warps, one for each of ``GROUPS`` blocks of 64 keys, walk over the queries and hold their
keys' gradients in registers; one group adds up the gradient of the queries, from what the others
leave in shared memory; one warp fetches tiles by TMA. Nothing waits for all warps: each pair has
its barriers. Logits are held as ``[keys, queries]``, from products that have all in them that
belongs to one query or one key (see :mod:`~megafold.ops.evo_attention.folding`); left for each
logit are a multiplication and addition, an exponential and a multiplication.

Once the keys of a program's walk are more than its groups have, it walks again, and the gradient of
the queries is summed in its own part of ``p_sums``, always in one order. Where rows and heads are
fewer than multiprocessors, walks over ranges of keys are items of their own (``SPLIT``) and leave
their sums; a row that has a bias of its own (``ALONE``) gets its gradient on the way.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from megafold.ops.gluon import as_held, as_tile, following

LOG2E = gl.constexpr(1.4426950408889634)


@gluon.jit
def _place(
    item, rows, heads, at_once, walks, walks_each, TOGETHER: gl.constexpr, SPLIT: gl.constexpr
):
    """Row and head of an item, and its walks from and to.

    The heads whose channels share lines of the cache run together. Where rows and heads are few,
    an item is a range of keys of one, so a few walks.
    """
    walk = 0
    last = walks
    if SPLIT:
        walk = item // (rows * heads) * walks_each
        last = gl.minimum(walk + walks_each, walks)
        item = item % (rows * heads)
    if TOGETHER:  # all heads of a row; with fewer divisions
        i_row, i_head = item // heads, item % heads
    else:
        rest = item % (rows * at_once)
        i_row = rest // at_once
        i_head = item // (rows * at_once) * at_once + rest % at_once
    return i_row, i_head, walk, last


@gluon.jit
def _fetch(
    d_q, d_k, d_v, d_grad, d_beside, d_beside_k, d_bias,
    s_q, s_k, s_v, s_grad, s_beside, s_beside_k, s_bias, full, empty, full_keys, empty_keys,
    items, rows, heads, at_once, rows_per_bias, masks, blocks_q, walks, walks_each,
    ALONE: gl.constexpr, TOGETHER: gl.constexpr, SPLIT: gl.constexpr, GROUPS: gl.constexpr,
    EACH: gl.constexpr, WIDTH: gl.constexpr,
    STAGES: gl.constexpr, TILE: gl.constexpr,
):  # fmt: skip
    """The warp that fetches: keys and values of a walk, then the queries' tiles in their order."""
    BUFFERS: gl.constexpr = 3 - EACH  # of keys and values
    s, in_s = 0, 0
    j, in_j = 0, 0
    for item in range(gl.program_id(0), items, gl.num_programs(0)):
        i_row, i_head, walk, last = _place(
            item, rows, heads, at_once, walks, walks_each, TOGETHER, SPLIT
        )
        i_bias = (i_row // rows_per_bias) * heads + i_head
        for i_walk in range(walk, last):
            i_k = i_walk * (EACH * GROUPS * TILE)
            mbarrier.wait(empty_keys.index(j), in_j ^ 1)
            bar_keys = full_keys.index(j)
            mbarrier.expect(bar_keys, EACH * GROUPS * TILE * (WIDTH * 4 + 32))
            for g in gl.static_range(EACH * GROUPS):
                at_keys = [i_row, i_k + g * TILE, i_head, 0]
                at_columns = [i_row * masks, i_k // 4 + g * (TILE // 4), 0]
                i_s = j * (EACH * GROUPS) + g
                tma.async_copy_global_to_shared(d_k, at_keys, bar_keys, s_k.index(i_s))
                tma.async_copy_global_to_shared(d_v, at_keys, bar_keys, s_v.index(i_s))
                tma.async_copy_global_to_shared(
                    d_beside_k, at_columns, bar_keys, s_beside_k.index(i_s)
                )
            for i in range(0, blocks_q):
                for c in gl.static_range(EACH):
                    bar = full.index(s)
                    i_q = i * TILE
                    mbarrier.wait(empty.index(s), in_s ^ 1)
                    mbarrier.expect(bar, TILE * WIDTH * 4 + TILE * 32 + GROUPS * TILE * TILE * 4)
                    at = [i_row, i_q, i_head, 0]
                    tma.async_copy_global_to_shared(d_q, at, bar, s_q.index(s))
                    tma.async_copy_global_to_shared(d_grad, at, bar, s_grad.index(s))
                    tma.async_copy_global_to_shared(
                        d_beside, [i_row * heads + i_head, i_q // 4, 0], bar, s_beside.index(s)
                    )
                    for g in gl.static_range(GROUPS):
                        i_s = s * GROUPS + g
                        if ALONE:
                            at_bias = [i_bias, i_q, i_k + (c * GROUPS + g) * TILE]
                        else:
                            at_bias = [i_bias, i_k + (c * GROUPS + g) * TILE, i_q]
                        tma.async_copy_global_to_shared(d_bias, at_bias, bar, s_bias.index(i_s))
                    s, in_s = following(s, in_s, STAGES)
            j, in_j = following(j, in_j, BUFFERS)


@gluon.jit
def _leave(p, grad, i_q, stride, queries, width):
    """Store the gradient of a tile of queries of one head, which begins at ``i_q``."""
    o_q = gl.arange(0, grad.shape[0], gl.SliceLayout(1, grad.type.layout))
    o_d = gl.arange(0, grad.shape[1], gl.SliceLayout(0, grad.type.layout))
    m = (i_q + o_q < queries)[:, None] & (o_d < width)[None, :]
    p += i_q.to(gl.int64) * stride
    gl.store(p + (o_q[:, None] * stride + o_d[None, :]), grad.to(p.dtype.element_ty), mask=m)


@gluon.jit
def _of_queries(
    p_grad_q, p_sums, s_k, s_logits, full_keys, empty_keys, full_logits, empty_logits,
    items, rows, heads, at_once, width, stride_row, stride_query, stride_head, queries, blocks_q,
    walks, walks_each, scale,
    TOGETHER: gl.constexpr, SPLIT: gl.constexpr, AGAIN: gl.constexpr, GROUPS: gl.constexpr,
    EACH: gl.constexpr, WIDTH: gl.constexpr, TILE: gl.constexpr, KEYS: gl.constexpr,
):  # fmt: skip
    """The group that adds up the gradient of q."""
    ACC: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], instr_shape=[16, WIDTH, 16])
    BUFFERS: gl.constexpr = 3 - EACH
    dtype: gl.constexpr = s_k.dtype
    HELD: gl.constexpr = as_held(gl.zeros([TILE, WIDTH], gl.float32, ACC)).type.layout
    o_sum = gl.arange(0, TILE * WIDTH, HELD)
    tile = TILE * width  # without what fills up the width, which comes last
    p_item = p_sums + gl.program_id(0).to(gl.int64) * (blocks_q * tile)
    j, in_j = 0, 0
    b, in_b = 0, 0
    for item in range(gl.program_id(0), items, gl.num_programs(0)):
        i_row, i_head, walk, last = _place(
            item, rows, heads, at_once, walks, walks_each, TOGETHER, SPLIT
        )
        p_out = p_grad_q + i_row.to(gl.int64) * stride_row + i_head * stride_head
        if SPLIT:
            p_item = p_sums + item.to(gl.int64) * (blocks_q * tile)
        for i_walk in range(walk, last):
            mbarrier.wait(full_keys.index(b), in_b)
            for i in range(0, blocks_q):
                p_sum = p_item + i * tile + o_sum
                if AGAIN:
                    there = gl.where(i_walk > walk, tile, 0)
                    before = gl.load(p_sum, mask=o_sum < there, other=0.0)
                acc = gl.zeros([TILE, WIDTH], gl.float32, ACC)
                for c in gl.static_range(EACH):
                    mbarrier.wait(full_logits.index(j), in_j)
                    for g in gl.static_range(GROUPS):
                        i_s = (b * EACH + c) * GROUPS + g
                        k = s_k.index(i_s)._reinterpret(dtype, [TILE, WIDTH], KEYS)
                        ds = s_logits.index(j * GROUPS + g).permute((1, 0))
                        acc = warpgroup_mma(ds, k, acc, use_acc=c + g > 0, is_async=True)
                    acc = warpgroup_mma_wait(0, deps=(acc,))
                    mbarrier.arrive(empty_logits.index(j))
                    j, in_j = following(j, in_j, 2)
                total = as_held(acc)
                if AGAIN:
                    total += before
                if SPLIT:  # L2 holds them, beside the bias that passes through
                    gl.store(p_sum, total, mask=o_sum < tile, eviction_policy="evict_last")
                elif AGAIN:
                    if i_walk == walks - 1:
                        acc = gl.convert_layout(as_tile(total, TILE, WIDTH), ACC)
                        _leave(p_out, acc * scale, i * TILE, stride_query, queries, width)
                    else:
                        gl.store(p_sum, total, mask=o_sum < tile)
                else:
                    _leave(p_out, acc * scale, i * TILE, stride_query, queries, width)
            mbarrier.arrive(empty_keys.index(b))
            b, in_b = following(b, in_b, BUFFERS)


@gluon.jit
def _operands(
    s_k, s_v, s_beside_k, i_s, USED: gl.constexpr, WIDTH: gl.constexpr, TILE: gl.constexpr,
    LEFT: gl.constexpr, MIXED_KEYS: gl.constexpr, MIXED_COLUMNS: gl.constexpr,
):  # fmt: skip
    """Keys, values and the columns beside them, in registers; of 48 channels in two parts."""
    dtype: gl.constexpr = s_k.dtype
    FIRST: gl.constexpr = 32 if USED < WIDTH else WIDTH
    t_k = s_k.index(i_s)._reinterpret(dtype, [TILE, WIDTH], MIXED_KEYS)
    t_v = s_v.index(i_s)._reinterpret(dtype, [TILE, WIDTH], MIXED_KEYS)
    b_k = t_k.slice(0, FIRST, 1).load(LEFT)
    b_v = t_v.slice(0, FIRST, 1).load(LEFT)
    b_k_rest = b_k
    b_v_rest = b_v
    if USED < WIDTH:
        gl.static_assert(USED == 48)
        b_k_rest = t_k.slice(32, 16, 1).load(LEFT)
        b_v_rest = t_v.slice(32, 16, 1).load(LEFT)
    b_ke = s_beside_k.index(i_s)._reinterpret(dtype, [TILE, 16], MIXED_COLUMNS).load(LEFT)
    return b_k, b_v, b_k_rest, b_v_rest, b_ke


@gluon.jit
def _step(
    dk, dv, b_k, b_v, b_k_rest, b_v_rest, b_ke, b_c, t_q, t_do, t_e, t_bias, t_ds,
    bar_logits, full_logits, in_j, factor,
    ALONE: gl.constexpr, USED: gl.constexpr, SLICES: gl.constexpr, SLICE: gl.constexpr,
    TILE: gl.constexpr, LOGITS: gl.constexpr, LEFT_ACC: gl.constexpr,
):  # fmt: skip
    """What a tile of queries adds to the gradients of 64 keys and values, and its logits' own.

    The tile is taken in slices, so that fewer logits are in registers at once.
    """
    dtype: gl.constexpr = t_q.dtype
    FEWER: gl.constexpr = t_q.shape[1] > USED
    FIRST: gl.constexpr = 32 if FEWER else t_q.shape[1]
    for h in gl.static_range(SLICES):
        q = t_q.slice(h * SLICE, SLICE)
        do = t_do.slice(h * SLICE, SLICE)
        e = t_e.slice(h * SLICE, SLICE).permute((1, 0))
        zero = gl.zeros([TILE, SLICE], gl.float32, LOGITS)
        first = q.slice(0, FIRST, 1).permute((1, 0))
        x = warpgroup_mma(b_k, first, zero, use_acc=False, is_async=True)
        if FEWER:
            x = warpgroup_mma(b_k_rest, q.slice(32, 16, 1).permute((1, 0)), x, is_async=True)
        x = warpgroup_mma(b_ke, e, x, is_async=True)
        first = do.slice(0, FIRST, 1).permute((1, 0))
        dp = warpgroup_mma(b_v, first, zero, use_acc=False, is_async=True)
        if FEWER:
            dp = warpgroup_mma(b_v_rest, do.slice(32, 16, 1).permute((1, 0)), dp, is_async=True)
        dp = warpgroup_mma(b_c, e, dp, is_async=True)
        if ALONE:
            bias = t_bias.permute((1, 0)).slice(h * SLICE, SLICE, 1).load(LOGITS)
            bias = bias * LOG2E
        else:
            bias = t_bias.slice(h * SLICE, SLICE, 1).load(LOGITS)
        x = warpgroup_mma_wait(3 if FEWER else 2, deps=(x,))
        p_w = gl.exp2(x * factor + bias)
        w = gl.convert_layout(p_w.to(dtype), LEFT_ACC)
        dv = warpgroup_mma(w, do, dv, is_async=True)
        dp = warpgroup_mma_wait(1, deps=(dp,))
        ds = p_w * dp
        if ALONE:  # the gradient of the logits is that of the bias, and leaves from its place
            t_bias.permute((1, 0)).slice(h * SLICE, SLICE, 1).store(ds)
        ds = ds.to(dtype)
        if h == 0:
            mbarrier.wait(bar_logits, in_j ^ 1)
        t_ds.slice(h * SLICE, SLICE, 1).store(ds)
        ds = gl.convert_layout(ds, LEFT_ACC)
        dk = warpgroup_mma(ds, q, dk, is_async=True)
        if h == SLICES - 1:
            fence_async_shared()
            mbarrier.arrive(full_logits)
        dv, dk = warpgroup_mma_wait(0, deps=(dv, dk))
    return dk, dv


@gluon.jit
def _leave_keys(dk, dv, d_grad_k, d_grad_v, t_dk, t_dv, at, MIXED_KEYS: gl.constexpr):
    """Store gradients of 64 keys and values by TMA, through shared memory."""
    dtype: gl.constexpr = t_dk.dtype
    box: gl.constexpr = d_grad_v.block_shape
    shape: gl.constexpr = dk.type.shape
    t_dv._reinterpret(dtype, shape, MIXED_KEYS).store(dv.to(dtype))
    t_dk._reinterpret(dtype, shape, MIXED_KEYS).store(dk.to(dtype))
    fence_async_shared()
    tma.async_copy_shared_to_global(d_grad_v, at, t_dv._reinterpret(dtype, box, d_grad_v.layout))
    tma.async_copy_shared_to_global(d_grad_k, at, t_dk._reinterpret(dtype, box, d_grad_k.layout))


@gluon.jit
def _walk(
    g: gl.constexpr, d_grad_k, d_grad_v, d_grad_bias,
    s_q, s_k, s_v, s_grad, s_beside, s_beside_k, s_bias, s_logits,
    full, empty, empty_keys, full_logits, empty_logits, s, in_s, j, in_j, b,
    i_row, i_head, i_walk, heads, blocks_q, scale,
    ALONE: gl.constexpr, GROUPS: gl.constexpr, EACH: gl.constexpr, WIDTH: gl.constexpr,
    USED: gl.constexpr, STAGES: gl.constexpr, SLICES: gl.constexpr, SLICE: gl.constexpr,
    TILE: gl.constexpr, UNIT: gl.constexpr, KEYS: gl.constexpr, MIXED_KEYS: gl.constexpr,
    MIXED_COLUMNS: gl.constexpr, MIXED_BIAS: gl.constexpr, MIXED_LOGITS: gl.constexpr,
):  # fmt: skip
    """One walk over the queries, with a block of 64 keys or two; buffers are counted along."""
    LOGITS: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], instr_shape=[16, SLICE, 16])
    ACC: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], instr_shape=[16, WIDTH, 16])
    LEFT: gl.constexpr = gl.DotOperandLayout(0, LOGITS, k_width=2)
    LEFT_ACC: gl.constexpr = gl.DotOperandLayout(0, ACC, k_width=2)
    BESIDE: gl.constexpr = gl.NVMMASharedLayout(32, 16, rank=2)
    dtype: gl.constexpr = s_k.dtype
    o_c = gl.arange(0, 16, gl.SliceLayout(0, LEFT))[None, :]
    factor = scale * LOG2E
    none = gl.zeros([TILE, 16], gl.float32, LEFT)
    b_c = gl.where(
        o_c == 4, UNIT[0], gl.where(o_c == 5, UNIT[1], gl.where(o_c == 6, UNIT[2], none))
    )
    b_c = b_c.to(dtype)
    i_s = b * (EACH * GROUPS) + g
    i_k = (i_walk * (EACH * GROUPS) + g) * TILE
    b_k, b_v, b_k_rest, b_v_rest, b_ke = _operands(
        s_k, s_v, s_beside_k, i_s, USED, WIDTH, TILE, LEFT, MIXED_KEYS, MIXED_COLUMNS
    )
    tma.store_wait(0)  # of the walk before, from what logits go through next
    dk = gl.zeros([TILE, WIDTH], gl.float32, ACC)
    dv = gl.zeros([TILE, WIDTH], gl.float32, ACC)
    other_dk = dk
    other_dv = dv
    for i in range(0, blocks_q):
        for c in gl.static_range(EACH):
            mbarrier.wait(full.index(s), in_s)
            t_q = s_q.index(s)._reinterpret(dtype, [TILE, WIDTH], KEYS)
            t_do = s_grad.index(s)._reinterpret(dtype, [TILE, WIDTH], KEYS)
            t_e = s_beside.index(s)._reinterpret(dtype, [TILE, 16], BESIDE)
            t_bias = s_bias.index(s * GROUPS + g)._reinterpret(gl.float32, [TILE, TILE], MIXED_BIAS)
            t_ds = s_logits.index(j * GROUPS + g)._reinterpret(dtype, [TILE, TILE], MIXED_LOGITS)
            if EACH > 1:  # read again at each step: there are no registers for both blocks
                b_k, b_v, b_k_rest, b_v_rest, b_ke = _operands(
                    s_k, s_v, s_beside_k, i_s + c * GROUPS, USED, WIDTH, TILE, LEFT, MIXED_KEYS,
                    MIXED_COLUMNS,
                )  # fmt: skip
            if c == 0:
                dk, dv = _step(
                    dk, dv, b_k, b_v, b_k_rest, b_v_rest, b_ke, b_c, t_q, t_do, t_e, t_bias, t_ds,
                    empty_logits.index(j), full_logits.index(j), in_j, factor, ALONE, USED, SLICES,
                    SLICE, TILE, LOGITS, LEFT_ACC,
                )  # fmt: skip
            else:
                other_dk, other_dv = _step(
                    other_dk, other_dv, b_k, b_v, b_k_rest, b_v_rest, b_ke, b_c, t_q, t_do, t_e,
                    t_bias, t_ds, empty_logits.index(j), full_logits.index(j), in_j, factor, ALONE,
                    USED, SLICES, SLICE, TILE, LOGITS, LEFT_ACC,
                )  # fmt: skip
            if ALONE:  # what has left from the buffer before this one is waited for, not this
                at_bias = [i_row * heads + i_head, i * TILE, i_k + c * (GROUPS * TILE)]
                t_left = s_bias.index(s * GROUPS + g)
                tma.async_copy_shared_to_global(d_grad_bias, at_bias, t_left)
                tma.store_wait(1)
                before = gl.where(s == 0, STAGES - 1, s - 1)
                mbarrier.arrive(empty.index(before), pred=i + c > 0)
            else:
                mbarrier.arrive(empty.index(s))
            s, in_s = following(s, in_s, STAGES)
            j, in_j = following(j, in_j, 2)
    if ALONE:
        tma.store_wait(0)
        mbarrier.arrive(empty.index(gl.where(s == 0, STAGES - 1, s - 1)))
    mbarrier.arrive(empty_keys.index(b))
    # They leave from where the logits of the last two steps went through.
    mbarrier.wait(empty_logits.index(j), in_j ^ 1)
    n, in_n = following(j, in_j, 2)
    mbarrier.wait(empty_logits.index(n), in_n ^ 1)
    t_dv, t_dk = s_logits.index(j * GROUPS + g), s_logits.index(n * GROUPS + g)
    at = [i_row, i_k, i_head, 0]
    _leave_keys(dk * scale, dv, d_grad_k, d_grad_v, t_dk, t_dv, at, MIXED_KEYS)
    if EACH > 1:
        tma.store_wait(0)
        at = [i_row, i_k + GROUPS * TILE, i_head, 0]
        _leave_keys(other_dk * scale, other_dv, d_grad_k, d_grad_v, t_dk, t_dv, at, MIXED_KEYS)
    return s, in_s, j, in_j


@gluon.jit
def _pass(
    g: gl.constexpr, s_logits, full, empty, empty_keys, full_logits, empty_logits,
    s, in_s, j, in_j, b, blocks_q,
    GROUPS: gl.constexpr, STAGES: gl.constexpr, TILE: gl.constexpr,
):  # fmt: skip
    """A walk of a group that the last keys do not reach: it leaves zeros for logits."""
    LOGITS: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], instr_shape=[16, TILE, 16])
    mbarrier.arrive(empty_keys.index(b))
    for i in range(0, blocks_q):
        mbarrier.wait(full.index(s), in_s)
        mbarrier.arrive(empty.index(s))
        mbarrier.wait(empty_logits.index(j), in_j ^ 1)
        if i < 2:
            tma.store_wait(0)  # of the walk before, which has left by this way
            s_logits.index(j * GROUPS + g).store(gl.zeros([TILE, TILE], s_logits.dtype, LOGITS))
            fence_async_shared()
        mbarrier.arrive(full_logits.index(j))
        s, in_s = following(s, in_s, STAGES)
        j, in_j = following(j, in_j, 2)
    return s, in_s, j, in_j


@gluon.jit
def _of_keys(
    g: gl.constexpr, d_grad_k, d_grad_v, d_grad_bias,
    s_q, s_k, s_v, s_grad, s_beside, s_beside_k, s_bias, s_logits,
    full, empty, full_keys, empty_keys, full_logits, empty_logits,
    items, rows, heads, at_once, keys, blocks_q, walks, walks_each, scale,
    ALONE: gl.constexpr, TOGETHER: gl.constexpr, SPLIT: gl.constexpr, PARTIAL: gl.constexpr,
    GROUPS: gl.constexpr, EACH: gl.constexpr, WIDTH: gl.constexpr, USED: gl.constexpr,
    STAGES: gl.constexpr, SLICES: gl.constexpr, SLICE: gl.constexpr, TILE: gl.constexpr,
    UNIT: gl.constexpr, KEYS: gl.constexpr, MIXED_KEYS: gl.constexpr,
    MIXED_COLUMNS: gl.constexpr, MIXED_BIAS: gl.constexpr, MIXED_LOGITS: gl.constexpr,
):  # fmt: skip
    """One group of four warps, which has 64 keys and values in a walk, or twice as many."""
    BUFFERS: gl.constexpr = 3 - EACH
    s, in_s = 0, 0
    j, in_j = 0, 0
    b, in_b = 0, 0
    for item in range(gl.program_id(0), items, gl.num_programs(0)):
        i_row, i_head, walk, last = _place(
            item, rows, heads, at_once, walks, walks_each, TOGETHER, SPLIT
        )
        for i_walk in range(walk, last):
            mbarrier.wait(full_keys.index(b), in_b)
            if PARTIAL and (i_walk * GROUPS + g) * TILE >= keys:
                s, in_s, j, in_j = _pass(
                    g, s_logits, full, empty, empty_keys, full_logits, empty_logits,
                    s, in_s, j, in_j, b, blocks_q, GROUPS, STAGES, TILE,
                )  # fmt: skip
            else:
                s, in_s, j, in_j = _walk(
                    g, d_grad_k, d_grad_v, d_grad_bias, s_q, s_k, s_v, s_grad, s_beside, s_beside_k,
                    s_bias, s_logits, full, empty, empty_keys, full_logits, empty_logits,
                    s, in_s, j, in_j, b, i_row, i_head, i_walk, heads, blocks_q,
                    scale, ALONE, GROUPS, EACH, WIDTH, USED, STAGES, SLICES, SLICE, TILE, UNIT,
                    KEYS, MIXED_KEYS, MIXED_COLUMNS, MIXED_BIAS, MIXED_LOGITS,
                )  # fmt: skip
            b, in_b = following(b, in_b, BUFFERS)
    tma.store_wait(0)


@gluon.jit
def hopper_backward_kernel(
    d_q, d_k, d_v, d_grad,  # [B S, N or M, H, D], in boxes of 64 queries or keys of one head
    d_beside,  # [B S H, N / 4, 64], beside q, in lines of four rows: see `folding`
    d_beside_k,  # [B S or 1, M / 4, 64], beside k
    d_bias,  # fp32, in boxes of 64 by 64: [B or 1 times H, M, N], times log2 e; ALONE: the bias
    d_grad_k, d_grad_v,  # [B S, M, H, D], written
    d_grad_bias,  # as d_bias, written where ALONE; else not used
    p_beyond,  # int32: 0, or 1 where a shift is too large for folded products
    p_grad_q,  # [B S, N, H, D], neighbours along D, written
    p_sums,  # fp32 [programs, or SPLIT: items; N in tiles; 64 D as in `as_held`], written
    items,  # B S H, times the ranges of keys
    rows,  # B S
    heads,
    at_once,  # heads, a divisor of them, whose channels share lines of the cache
    width,
    stride_row, stride_query, stride_head,  # of p_grad_q
    rows_per_bias, queries, keys,
    masks,  # 1, or 0 where there is no mask: rows of d_beside_k in one row
    blocks_q, walks,
    walks_each,  # of a range of keys
    scale,
    ALONE: gl.constexpr,  # each row has its own bias, read as it lies
    TOGETHER: gl.constexpr,  # at_once is heads
    SPLIT: gl.constexpr,  # the keys are, in ranges: no gradient of q, but sums
    AGAIN: gl.constexpr,  # an item has more walks than one
    PARTIAL: gl.constexpr,  # the last walk has not keys for all groups
    GROUPS: gl.constexpr,  # of four warps: 2 or 3
    EACH: gl.constexpr,  # blocks of 64 keys of a group in a walk: 1; or 2, and then no PARTIAL
    STAGES: gl.constexpr,  # tiles of queries that are fetched ahead
    SLICES: gl.constexpr,
    REGISTERS: gl.constexpr,  # of a thread that has keys
    WIDTH: gl.constexpr,  # D to the next power of two
    USED: gl.constexpr,  # of its channels: all, or 48 of 64
    SLICE: gl.constexpr,
    TILE: gl.constexpr,
    UNIT: gl.constexpr,  # see `folding.Parts`
    KEYS: gl.constexpr, MIXED_KEYS: gl.constexpr, MIXED_COLUMNS: gl.constexpr,
    MIXED_BIAS: gl.constexpr, TILED: gl.constexpr,
    MIXED_LOGITS: gl.constexpr,  # layouts in shared memory: see `hopper`
):  # fmt: skip
    """All three gradients, unless a shift is too large; then nothing."""
    items = gl.where(gl.load(p_beyond) == 0, items, 0)
    BAR: gl.constexpr = mbarrier.MBarrierLayout()
    BUFFERS: gl.constexpr = 3 - EACH  # of keys and values
    dtype: gl.constexpr = d_q.dtype
    s_q = gl.allocate_shared_memory(dtype, [STAGES, 1, TILE, 1, WIDTH], d_q.layout)
    s_grad = gl.allocate_shared_memory(dtype, [STAGES, 1, TILE, 1, WIDTH], d_grad.layout)
    s_beside = gl.allocate_shared_memory(dtype, [STAGES, 1, TILE // 4, 64], d_beside.layout)
    OF_KEYS: gl.constexpr = BUFFERS * EACH * GROUPS
    s_beside_k = gl.allocate_shared_memory(dtype, [OF_KEYS, 1, TILE // 4, 64], d_beside_k.layout)
    s_bias = gl.allocate_shared_memory(gl.float32, [STAGES * GROUPS, 1, TILE, TILE], d_bias.layout)
    s_k = gl.allocate_shared_memory(dtype, [OF_KEYS, 1, TILE, 1, WIDTH], d_k.layout)
    s_v = gl.allocate_shared_memory(dtype, [OF_KEYS, 1, TILE, 1, WIDTH], d_v.layout)
    s_logits = gl.allocate_shared_memory(dtype, [2 * GROUPS, TILE, TILE], TILED)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BAR)
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BAR)
    full_keys = gl.allocate_shared_memory(gl.int64, [2, 1], BAR)
    empty_keys = gl.allocate_shared_memory(gl.int64, [2, 1], BAR)
    full_logits = gl.allocate_shared_memory(gl.int64, [2, 1], BAR)
    empty_logits = gl.allocate_shared_memory(gl.int64, [2, 1], BAR)
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), 1)
        mbarrier.init(empty.index(i), GROUPS)
    for i in gl.static_range(2):
        mbarrier.init(full_keys.index(i), 1)
        mbarrier.init(empty_keys.index(i), GROUPS + 1)
        mbarrier.init(full_logits.index(i), GROUPS)
        mbarrier.init(empty_logits.index(i), 1)
    # Arguments are written out for each role: a tuple kept under a name loses its constants.
    if GROUPS == 2:
        gl.warp_specialize(
            [
                (_of_queries, (
                    p_grad_q, p_sums, s_k, s_logits, full_keys, empty_keys, full_logits,
                    empty_logits, items, rows, heads, at_once, width, stride_row, stride_query,
                    stride_head, queries, blocks_q, walks, walks_each, scale, TOGETHER, SPLIT,
                    AGAIN, GROUPS, EACH, WIDTH, TILE, KEYS,
                )),
                (_of_keys, (
                    gl.constexpr(0), d_grad_k, d_grad_v, d_grad_bias, s_q, s_k, s_v, s_grad,
                    s_beside, s_beside_k, s_bias, s_logits, full, empty, full_keys, empty_keys,
                    full_logits, empty_logits, items, rows, heads, at_once, keys,
                    blocks_q, walks, walks_each, scale, ALONE, TOGETHER, SPLIT, PARTIAL, GROUPS,
                    EACH, WIDTH, USED, STAGES, SLICES, SLICE, TILE, UNIT, KEYS, MIXED_KEYS,
                    MIXED_COLUMNS, MIXED_BIAS, MIXED_LOGITS,
                )),
                (_of_keys, (
                    gl.constexpr(1), d_grad_k, d_grad_v, d_grad_bias, s_q, s_k, s_v, s_grad,
                    s_beside, s_beside_k, s_bias, s_logits, full, empty, full_keys, empty_keys,
                    full_logits, empty_logits, items, rows, heads, at_once, keys,
                    blocks_q, walks, walks_each, scale, ALONE, TOGETHER, SPLIT, PARTIAL, GROUPS,
                    EACH, WIDTH, USED, STAGES, SLICES, SLICE, TILE, UNIT, KEYS, MIXED_KEYS,
                    MIXED_COLUMNS, MIXED_BIAS, MIXED_LOGITS,
                )),
                (_fetch, (
                    d_q, d_k, d_v, d_grad, d_beside, d_beside_k, d_bias, s_q, s_k, s_v, s_grad,
                    s_beside, s_beside_k, s_bias, full, empty, full_keys, empty_keys, items, rows,
                    heads, at_once, rows_per_bias, masks, blocks_q, walks, walks_each, ALONE,
                    TOGETHER, SPLIT, GROUPS, EACH, WIDTH, STAGES, TILE,
                )),
            ],
            [4, 4, 1],
            [REGISTERS, REGISTERS, 24],
        )  # fmt: skip
    else:
        gl.warp_specialize(
            [
                (_of_queries, (
                    p_grad_q, p_sums, s_k, s_logits, full_keys, empty_keys, full_logits,
                    empty_logits, items, rows, heads, at_once, width, stride_row, stride_query,
                    stride_head, queries, blocks_q, walks, walks_each, scale, TOGETHER, SPLIT,
                    AGAIN, GROUPS, EACH, WIDTH, TILE, KEYS,
                )),
                (_of_keys, (
                    gl.constexpr(0), d_grad_k, d_grad_v, d_grad_bias, s_q, s_k, s_v, s_grad,
                    s_beside, s_beside_k, s_bias, s_logits, full, empty, full_keys, empty_keys,
                    full_logits, empty_logits, items, rows, heads, at_once, keys,
                    blocks_q, walks, walks_each, scale, ALONE, TOGETHER, SPLIT, PARTIAL, GROUPS,
                    EACH, WIDTH, USED, STAGES, SLICES, SLICE, TILE, UNIT, KEYS, MIXED_KEYS,
                    MIXED_COLUMNS, MIXED_BIAS, MIXED_LOGITS,
                )),
                (_of_keys, (
                    gl.constexpr(1), d_grad_k, d_grad_v, d_grad_bias, s_q, s_k, s_v, s_grad,
                    s_beside, s_beside_k, s_bias, s_logits, full, empty, full_keys, empty_keys,
                    full_logits, empty_logits, items, rows, heads, at_once, keys,
                    blocks_q, walks, walks_each, scale, ALONE, TOGETHER, SPLIT, PARTIAL, GROUPS,
                    EACH, WIDTH, USED, STAGES, SLICES, SLICE, TILE, UNIT, KEYS, MIXED_KEYS,
                    MIXED_COLUMNS, MIXED_BIAS, MIXED_LOGITS,
                )),
                (_of_keys, (
                    gl.constexpr(2), d_grad_k, d_grad_v, d_grad_bias, s_q, s_k, s_v, s_grad,
                    s_beside, s_beside_k, s_bias, s_logits, full, empty, full_keys, empty_keys,
                    full_logits, empty_logits, items, rows, heads, at_once, keys,
                    blocks_q, walks, walks_each, scale, ALONE, TOGETHER, SPLIT, PARTIAL, GROUPS,
                    EACH, WIDTH, USED, STAGES, SLICES, SLICE, TILE, UNIT, KEYS, MIXED_KEYS,
                    MIXED_COLUMNS, MIXED_BIAS, MIXED_LOGITS,
                )),
                (_fetch, (
                    d_q, d_k, d_v, d_grad, d_beside, d_beside_k, d_bias, s_q, s_k, s_v, s_grad,
                    s_beside, s_beside_k, s_bias, full, empty, full_keys, empty_keys, items, rows,
                    heads, at_once, rows_per_bias, masks, blocks_q, walks, walks_each, ALONE,
                    TOGETHER, SPLIT, GROUPS, EACH, WIDTH, STAGES, TILE,
                )),
            ],
            [4, 4, 4, 1],
            [REGISTERS, REGISTERS, REGISTERS, 24],
        )  # fmt: skip

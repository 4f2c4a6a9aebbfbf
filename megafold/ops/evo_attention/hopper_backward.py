"""EvoAttention's gradients of q, k and v in one pass, on Hopper's own instructions (Gluon).

One program takes one head of one row, or more of them one after another. Warps have roles. Groups
of four warps (:mod:`~megafold.ops.evo_attention.hopper_keys`), one for each of ``GROUPS`` blocks of
64 keys, walk over the queries and hold their keys' gradients in registers, those of one block or of
two that take turns (``EACH``); one group adds up the gradient of the queries, from what the others
leave in shared memory; one warp fetches tiles by TMA. Nothing waits for all warps: each pair has
its barriers. Logits are held as ``[keys, queries]``, from products that have all in them that
belongs to one query or one key (see :mod:`~megafold.ops.evo_attention.folding`); left for each
logit are a multiplication and addition, an exponential and a multiplication.

Once the keys of a program's walk are more than its groups have, it walks again, and the gradient of
the queries is summed in its own part of ``p_sums``, always in one order. Where rows and heads are
fewer than multiprocessors, walks over ranges of keys are items of their own (``SPLIT``) and leave
their sums; a row that has a bias of its own (``ALONE``) gets its gradient on the way, by TMA from
where a tile of the bias has come.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from megafold.ops.evo_attention.folding import OF_PROGRAMS
from megafold.ops.evo_attention.hopper_keys import of_keys, place
from megafold.ops.gluon import as_held, as_tile, following

_OF_PROGRAMS = gl.constexpr(OF_PROGRAMS)


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
        i_row, i_head, walk, last = place(
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
        i_row, i_head, walk, last = place(
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
def _beyond(p_beyond, flags):
    """Whether a program of ``folding`` found a shift too large; the first flag, for who comes next.

    All programs read all flags, so that none has to wait for another.
    """
    BLOCK: gl.constexpr = 4096
    o = gl.arange(0, BLOCK, gl.BlockedLayout([1], [32], [4], [0]))
    b = gl.zeros_like(o).to(gl.int8)
    for start in range(0, flags, BLOCK):
        p = p_beyond + _OF_PROGRAMS + start + o
        b |= gl.load(p, mask=start + o < flags, other=0)
    beyond = gl.max(b.to(gl.int32), 0)
    if gl.program_id(0) == 0:
        gl.store(p_beyond, beyond.to(gl.int8))
    return beyond


@gluon.jit
def hopper_backward_kernel(
    d_q, d_k, d_v, d_grad,  # [B S, N or M, H, D], in boxes of 64 queries or keys of one head
    d_beside,  # [B S H, N / 4, 64], beside q, in lines of four rows: see `folding`
    d_beside_k,  # [B S or 1, M / 4, 64], beside k
    d_bias,  # fp32, in boxes of 64 by 64: [B or 1 times H, M, N], times log2 e; ALONE: the bias
    d_grad_k, d_grad_v,  # [B S, M, H, D], written
    d_grad_bias,  # as d_bias, written where ALONE; else not used
    p_beyond,  # int8 [OF_PROGRAMS + flags], see `_beyond`
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
    flags,  # of programs that folded queries
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
    items = gl.where(_beyond(p_beyond, flags) == 0, items, 0)
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
                (of_keys, (
                    gl.constexpr(0), d_grad_k, d_grad_v, d_grad_bias, s_q, s_k, s_v, s_grad,
                    s_beside, s_beside_k, s_bias, s_logits, full, empty, full_keys, empty_keys,
                    full_logits, empty_logits, items, rows, heads, at_once, keys,
                    blocks_q, walks, walks_each, scale, ALONE, TOGETHER, SPLIT, PARTIAL, GROUPS,
                    EACH, WIDTH, USED, STAGES, SLICES, SLICE, TILE, UNIT, KEYS, MIXED_KEYS,
                    MIXED_COLUMNS, MIXED_BIAS, MIXED_LOGITS,
                )),
                (of_keys, (
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
                (of_keys, (
                    gl.constexpr(0), d_grad_k, d_grad_v, d_grad_bias, s_q, s_k, s_v, s_grad,
                    s_beside, s_beside_k, s_bias, s_logits, full, empty, full_keys, empty_keys,
                    full_logits, empty_logits, items, rows, heads, at_once, keys,
                    blocks_q, walks, walks_each, scale, ALONE, TOGETHER, SPLIT, PARTIAL, GROUPS,
                    EACH, WIDTH, USED, STAGES, SLICES, SLICE, TILE, UNIT, KEYS, MIXED_KEYS,
                    MIXED_COLUMNS, MIXED_BIAS, MIXED_LOGITS,
                )),
                (of_keys, (
                    gl.constexpr(1), d_grad_k, d_grad_v, d_grad_bias, s_q, s_k, s_v, s_grad,
                    s_beside, s_beside_k, s_bias, s_logits, full, empty, full_keys, empty_keys,
                    full_logits, empty_logits, items, rows, heads, at_once, keys,
                    blocks_q, walks, walks_each, scale, ALONE, TOGETHER, SPLIT, PARTIAL, GROUPS,
                    EACH, WIDTH, USED, STAGES, SLICES, SLICE, TILE, UNIT, KEYS, MIXED_KEYS,
                    MIXED_COLUMNS, MIXED_BIAS, MIXED_LOGITS,
                )),
                (of_keys, (
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

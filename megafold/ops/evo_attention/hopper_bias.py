"""EvoAttention's gradient of a bias that many rows share, on Hopper's own instructions (Gluon).

A program has tiles of the gradient in the registers of its groups of four warps, each of 64 queries
by ``EACH`` keys, while the rows that share it pass by: one more warp fetches their tiles by TMA.
Multiprocessors wait for what they fetch: the larger the tiles of a program, the less that is. For
narrow heads three groups have 64 by 64, counted on from one block of keys to the next, so that all
groups have one but at the very end; three tiles are of two blocks of keys at most. For wider ones
two groups have 64 by 128, and what they have of the bias waits in shared memory.

Products have all in them that belongs to one query or one key (see
:mod:`~megafold.ops.evo_attention.folding`); left for each logit are a multiplication and addition,
an exponential, and one more multiplication and addition.
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

from megafold.ops.gluon import as_held, as_tile

LOG2E = gl.constexpr(1.4426950408889634)


@gluon.jit
def _fetch(
    d_q, d_k, d_v, d_grad, d_beside, d_beside_k,
    s_q, s_k, s_v, s_grad, s_beside, s_beside_k, full, empty,
    i_tile, across, i_head, first, last, heads, masks,
    GROUPS: gl.constexpr, BLOCKS: gl.constexpr, EACH: gl.constexpr,
    WIDTH: gl.constexpr, STAGES: gl.constexpr, TILE: gl.constexpr,
):  # fmt: skip
    """The warp that fetches, row by row."""
    OF_ROW: gl.constexpr = WIDTH * 4 + 32  # bytes of a query or key
    i_block = i_tile // across
    one = (i_tile + GROUPS - 1) // across == i_block
    for i_row in range(first, last):
        step = i_row - first
        s = step % STAGES
        bar = full.index(s)
        mbarrier.wait(empty.index(s), ((step // STAGES) & 1) ^ 1)
        mbarrier.expect(bar, (GROUPS * TILE + EACH) * OF_ROW, pred=one)
        if BLOCKS > 1:
            mbarrier.expect(bar, (GROUPS * TILE + BLOCKS * EACH) * OF_ROW, pred=one == 0)
        for b in gl.static_range(BLOCKS):
            i = s * BLOCKS + b
            needed = (b == 0) | (one == 0)
            i_k = (i_block + b) * EACH
            at = [i_row, i_k, i_head, 0]
            tma.async_copy_global_to_shared(d_k, at, bar, s_k.index(i), needed)
            tma.async_copy_global_to_shared(d_v, at, bar, s_v.index(i), needed)
            at = [i_row * masks, i_k // 4, 0]
            tma.async_copy_global_to_shared(d_beside_k, at, bar, s_beside_k.index(i), needed)
        for g in gl.static_range(GROUPS):
            i = s * GROUPS + g
            i_q = (i_tile + g) % across * TILE
            at = [i_row, i_q, i_head, 0]
            tma.async_copy_global_to_shared(d_q, at, bar, s_q.index(i))
            tma.async_copy_global_to_shared(d_grad, at, bar, s_grad.index(i))
            at = [i_row * heads + i_head, i_q // 4, 0]
            tma.async_copy_global_to_shared(d_beside, at, bar, s_beside.index(i))


@gluon.jit
def _product(left, right, zero, USED: gl.constexpr):
    """Begin ``left right^T`` over the channels that there are."""
    FEWER: gl.constexpr = left.shape[1] != USED
    if FEWER:
        gl.static_assert(USED == 48)
        first, second = left.slice(0, 32, 1), right.slice(0, 32, 1).permute((1, 0))
        x = warpgroup_mma(first, second, zero, use_acc=False, is_async=True)
        first, second = left.slice(32, 16, 1), right.slice(32, 16, 1).permute((1, 0))
        x = warpgroup_mma(first, second, x, is_async=True)
    else:
        x = warpgroup_mma(left, right.permute((1, 0)), zero, use_acc=False, is_async=True)
    return x


@gluon.jit
def _of_tile(
    g: gl.constexpr, p_bias, p_sum, stride_bq, stride_bk,
    s_q, s_k, s_v, s_grad, s_beside, s_beside_k, s_parts, s_bias, full, empty,
    i_tile, across, first, last, queries, keys, scale,
    AGAIN: gl.constexpr, GROUPS: gl.constexpr, BLOCKS: gl.constexpr, EACH: gl.constexpr,
    WAITS: gl.constexpr, WIDTH: gl.constexpr, USED: gl.constexpr, STAGES: gl.constexpr,
    TILE: gl.constexpr,
):  # fmt: skip
    """One group of four warps, which has the gradient of 64 queries by EACH keys."""
    LOGITS: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], instr_shape=[16, EACH, 16])
    KEYS: gl.constexpr = gl.NVMMASharedLayout(WIDTH * 2, 16, rank=2)
    BESIDE: gl.constexpr = gl.NVMMASharedLayout(32, 16, rank=2)
    HELD: gl.constexpr = as_held(gl.zeros([TILE, EACH], gl.float32, LOGITS)).type.layout
    dtype: gl.constexpr = s_k.dtype
    block = (i_tile + g) // across - i_tile // across
    i_q = (i_tile + g) % across * TILE
    i_k = (i_tile + g) // across * EACH
    o_q = gl.arange(0, TILE, gl.SliceLayout(1, LOGITS))
    o_k = gl.arange(0, EACH, gl.SliceLayout(0, LOGITS))
    m = (i_q + o_q < queries)[:, None] & (i_k + o_k < keys)[None, :]
    p_bias += i_q.to(gl.int64) * stride_bq + i_k.to(gl.int64) * stride_bk
    o_bias = o_q[:, None] * stride_bq + o_k[None, :] * stride_bk
    bias = gl.load(p_bias + o_bias, mask=m, other=0.0).to(gl.float32) * LOG2E
    if WAITS:  # as threads hold it: each reads what it wrote
        s_bias.index(g).store(gl.convert_layout(as_held(bias), HELD))
    factor = scale * LOG2E
    total = gl.zeros([TILE, EACH], gl.float32, LOGITS)
    for step in range(0, last - first):
        s = step % STAGES
        mbarrier.wait(full.index(s), (step // STAGES) & 1)
        q = s_q.index(s * GROUPS + g)._reinterpret(dtype, [TILE, WIDTH], KEYS)
        do = s_grad.index(s * GROUPS + g)._reinterpret(dtype, [TILE, WIDTH], KEYS)
        e = s_beside.index(s * GROUPS + g)._reinterpret(dtype, [TILE, 16], BESIDE)
        k = s_k.index(s * BLOCKS + block)._reinterpret(dtype, [EACH, WIDTH], KEYS)
        v = s_v.index(s * BLOCKS + block)._reinterpret(dtype, [EACH, WIDTH], KEYS)
        ke = s_beside_k.index(s * BLOCKS + block)._reinterpret(dtype, [EACH, 16], BESIDE)
        zero = gl.zeros([TILE, EACH], gl.float32, LOGITS)
        x = _product(q, k, zero, USED)
        x = warpgroup_mma(e, ke.permute((1, 0)), x, is_async=True)
        dp = _product(do, v, zero, USED)
        dp = warpgroup_mma(e, s_parts.permute((1, 0)), dp, is_async=True)
        x = warpgroup_mma_wait(2 if USED == WIDTH else 3, deps=(x,))
        if WAITS:
            held = s_bias.index(g).load(HELD)
            b_x = gl.convert_layout(as_tile(held, TILE, EACH), LOGITS)
        else:
            b_x = bias
        w = gl.exp2(x * factor + b_x)
        dp = warpgroup_mma_wait(0, deps=(dp,))
        mbarrier.arrive(empty.index(s))
        total += w * dp
    p_sum += i_q.to(gl.int64) * keys + i_k
    o_sum = o_q[:, None] * keys + o_k[None, :]
    if AGAIN:
        total += gl.load(p_sum + o_sum, mask=m, other=0.0)
    gl.store(p_sum + o_sum, total, mask=m)


@gluon.jit
def hopper_bias_kernel(
    d_q, d_grad,  # [B S, N, H, D], in boxes of 64 queries of one head
    d_beside,  # [B S H, N / 4, 64], beside q, in lines of four rows: see `folding`
    d_k, d_v,  # [B S, M, H, D], in boxes of EACH keys of one head
    d_beside_k,  # [B S or 1, M / 4, 64], beside k
    p_bias,  # [B or 1, H, N, M], any strides
    p_beyond,  # int8: 0, or 1 where a shift is too large for folded products
    p_sums,  # fp32 [groups, B or 1, heads_here, N, M], written
    stride_bb, stride_bh, stride_bq, stride_bk,
    heads,
    first_head, heads_here,  # that this launch is for
    biases, rows_per_bias, rows_per_group,
    start, rows_at_once,  # of each group, those that this launch adds
    shares,  # programs of a head
    across,  # tiles of a block of keys: GROUPS divides them, or BLOCKS is 2 and they are 2 or more
    queries, keys,
    masks,  # 1, or 0 where there is no mask: rows of d_beside_k in one row
    scale,
    AGAIN: gl.constexpr,  # what other launches left is added to
    GROUPS: gl.constexpr,
    BLOCKS: gl.constexpr,  # of keys, that the tiles of a program have at most
    EACH: gl.constexpr,
    WAITS: gl.constexpr,  # the bias does, in shared memory; else it is in registers
    REGISTERS: gl.constexpr,  # of a thread of the groups but the first
    STAGES: gl.constexpr,
    WIDTH: gl.constexpr,
    USED: gl.constexpr,  # of its channels: all, or 48 of 64
    TILE: gl.constexpr,
    UNIT: gl.constexpr,
):  # fmt: skip
    """Sums over rows of one group, unless a shift is too large; then nothing."""
    i_tile = gl.program_id(0) % shares * GROUPS
    rest = gl.program_id(0) // shares
    i_head = first_head + rest % heads_here
    i_bias = rest // heads_here % biases
    i_group = rest // heads_here // biases
    first = i_bias * rows_per_bias + i_group * rows_per_group
    last = gl.minimum(first + rows_per_group, (i_bias + 1) * rows_per_bias)
    first += start
    last = gl.minimum(last, first + rows_at_once)
    p_bias += i_bias.to(gl.int64) * stride_bb + i_head.to(gl.int64) * stride_bh
    p_sums += rest.to(gl.int64) * queries * keys
    tame = gl.load(p_beyond) == 0
    last = gl.where(tame, last, first)
    queries = gl.where(tame, queries, 0)  # nothing is stored

    BAR: gl.constexpr = mbarrier.MBarrierLayout()
    BESIDE: gl.constexpr = gl.NVMMASharedLayout(32, 16, rank=2)
    LINES: gl.constexpr = TILE // 4
    OF_KEYS: gl.constexpr = EACH // 4
    dtype: gl.constexpr = d_q.dtype
    s_q = gl.allocate_shared_memory(dtype, [STAGES * GROUPS, 1, TILE, 1, WIDTH], d_q.layout)
    s_grad = gl.allocate_shared_memory(dtype, [STAGES * GROUPS, 1, TILE, 1, WIDTH], d_grad.layout)
    s_beside = gl.allocate_shared_memory(dtype, [STAGES * GROUPS, 1, LINES, 64], d_beside.layout)
    s_k = gl.allocate_shared_memory(dtype, [STAGES * BLOCKS, 1, EACH, 1, WIDTH], d_k.layout)
    s_v = gl.allocate_shared_memory(dtype, [STAGES * BLOCKS, 1, EACH, 1, WIDTH], d_v.layout)
    s_beside_k = gl.allocate_shared_memory(
        dtype, [STAGES * BLOCKS, 1, OF_KEYS, 64], d_beside_k.layout
    )
    PLAIN: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    s_bias = gl.allocate_shared_memory(gl.float32, [GROUPS, TILE * EACH if WAITS else 1], PLAIN)
    s_parts = gl.allocate_shared_memory(dtype, [EACH, 16], BESIDE)
    COLUMNS: gl.constexpr = gl.BlockedLayout([1, 8], [16, 2], [4, 1], [1, 0])
    o_c = gl.arange(0, 16, gl.SliceLayout(0, COLUMNS))[None, :]
    none = gl.zeros([EACH, 16], gl.float32, COLUMNS)
    b = gl.where(o_c == 4, UNIT[0], gl.where(o_c == 5, UNIT[1], gl.where(o_c == 6, UNIT[2], none)))
    s_parts.store(b.to(dtype))
    fence_async_shared()
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BAR)
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BAR)
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), 1)
        mbarrier.init(empty.index(i), GROUPS)
    # Arguments are written out for each role: a tuple kept under a name loses its constants.
    if GROUPS == 2:
        gl.warp_specialize(
            [
                (_of_tile, (
                    gl.constexpr(0), p_bias, p_sums, stride_bq, stride_bk, s_q, s_k, s_v, s_grad,
                    s_beside, s_beside_k, s_parts, s_bias, full, empty, i_tile, across, first, last,
                    queries, keys, scale, AGAIN, GROUPS, BLOCKS, EACH, WAITS, WIDTH, USED,
                    STAGES, TILE,
                )),
                (_of_tile, (
                    gl.constexpr(1), p_bias, p_sums, stride_bq, stride_bk, s_q, s_k, s_v, s_grad,
                    s_beside, s_beside_k, s_parts, s_bias, full, empty, i_tile, across, first, last,
                    queries, keys, scale, AGAIN, GROUPS, BLOCKS, EACH, WAITS, WIDTH, USED,
                    STAGES, TILE,
                )),
                (_fetch, (
                    d_q, d_k, d_v, d_grad, d_beside, d_beside_k, s_q, s_k, s_v, s_grad, s_beside,
                    s_beside_k, full, empty, i_tile, across, i_head, first, last, heads, masks,
                    GROUPS, BLOCKS, EACH, WIDTH, STAGES, TILE,
                )),
            ],
            [4, 1],
            [REGISTERS, 24],
        )  # fmt: skip
    else:
        gl.warp_specialize(
            [
                (_of_tile, (
                    gl.constexpr(0), p_bias, p_sums, stride_bq, stride_bk, s_q, s_k, s_v, s_grad,
                    s_beside, s_beside_k, s_parts, s_bias, full, empty, i_tile, across, first, last,
                    queries, keys, scale, AGAIN, GROUPS, BLOCKS, EACH, WAITS, WIDTH, USED,
                    STAGES, TILE,
                )),
                (_of_tile, (
                    gl.constexpr(1), p_bias, p_sums, stride_bq, stride_bk, s_q, s_k, s_v, s_grad,
                    s_beside, s_beside_k, s_parts, s_bias, full, empty, i_tile, across, first, last,
                    queries, keys, scale, AGAIN, GROUPS, BLOCKS, EACH, WAITS, WIDTH, USED,
                    STAGES, TILE,
                )),
                (_of_tile, (
                    gl.constexpr(2), p_bias, p_sums, stride_bq, stride_bk, s_q, s_k, s_v, s_grad,
                    s_beside, s_beside_k, s_parts, s_bias, full, empty, i_tile, across, first, last,
                    queries, keys, scale, AGAIN, GROUPS, BLOCKS, EACH, WAITS, WIDTH, USED,
                    STAGES, TILE,
                )),
                (_fetch, (
                    d_q, d_k, d_v, d_grad, d_beside, d_beside_k, s_q, s_k, s_v, s_grad, s_beside,
                    s_beside_k, full, empty, i_tile, across, i_head, first, last, heads, masks,
                    GROUPS, BLOCKS, EACH, WIDTH, STAGES, TILE,
                )),
            ],
            [4, 4, 1],
            [REGISTERS, REGISTERS, 40],
        )  # fmt: skip

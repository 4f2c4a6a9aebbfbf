"""EvoAttention's forward pass on Hopper's own instructions (Gluon).

As :mod:`~megafold.ops.evo_attention.forward`, one block of 64 queries at a time, but four warps do
nothing but compute and one nothing but fetch tiles by TMA; three such programs share a
multiprocessor and take one block after another. The mask is added to logits, as fp32.
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

LOG2E = gl.constexpr(1.4426950408889634)


@gluon.jit
def _place(item, blocks_q, heads, TILE: gl.constexpr):
    """First query, head and row of an item."""
    return (item % blocks_q) * TILE, (item // blocks_q) % heads, item // (blocks_q * heads)


@gluon.jit
def _fetch(
    d_q, d_k, d_v, d_mask, d_bias, s_q, s_k, s_v, s_mask, s_bias, full_q, empty_q, full, empty,
    items, blocks_q, heads, rows_per_bias, keys, masks,
    WIDTH: gl.constexpr, STAGES: gl.constexpr, TILE: gl.constexpr,
):  # fmt: skip
    """The warp that fetches."""
    step = 0
    turn = 0
    for item in range(gl.program_id(0), items, gl.num_programs(0)):
        i_q, i_head, i_row = _place(item, blocks_q, heads, TILE)
        i_bias = (i_row // rows_per_bias) * heads + i_head
        mbarrier.wait(empty_q, (turn & 1) ^ 1)
        mbarrier.expect(full_q, TILE * WIDTH * 2)
        tma.async_copy_global_to_shared(d_q, [i_row, i_q, i_head, 0], full_q, s_q)
        turn += 1  # noqa: SIM113 (a compiled loop)
        for i_k in range(0, keys, TILE):
            s = step % STAGES
            bar = full.index(s)
            mbarrier.wait(empty.index(s), ((step // STAGES) & 1) ^ 1)
            mbarrier.expect(bar, TILE * WIDTH * 4 + TILE * 4 + TILE * TILE * 4)
            at = [i_row, i_k, i_head, 0]
            tma.async_copy_global_to_shared(d_k, at, bar, s_k.index(s))
            tma.async_copy_global_to_shared(d_bias, [i_bias, i_q, i_k], bar, s_bias.index(s))
            tma.async_copy_global_to_shared(d_mask, [i_row * masks, i_k], bar, s_mask.index(s))
            tma.async_copy_global_to_shared(d_v, at, bar, s_v.index(s))
            step += 1


@gluon.jit
def _attend(
    p_out, p_stats, s_q, s_k, s_v, s_mask, s_bias, full_q, empty_q, full, empty,
    items, blocks_q, heads, width, stride_inverse, queries, keys, scale,
    WIDTH: gl.constexpr, STAGES: gl.constexpr, TILE: gl.constexpr, KEYS: gl.constexpr,
    MIXED_QUERIES: gl.constexpr, MIXED_BIAS: gl.constexpr,
):  # fmt: skip
    """The four warps that compute."""
    LOGITS: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], instr_shape=[16, TILE, 16])
    ACC: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], instr_shape=[16, WIDTH, 16])
    LEFT: gl.constexpr = gl.DotOperandLayout(0, LOGITS, k_width=2)
    LEFT_ACC: gl.constexpr = gl.DotOperandLayout(0, ACC, k_width=2)
    ROWS: gl.constexpr = gl.SliceLayout(1, LOGITS)
    ROWS_ACC: gl.constexpr = gl.SliceLayout(1, ACC)
    LINE: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    dtype: gl.constexpr = s_k.dtype
    # Threads hold queries in the order 0, 2, 4, 6, 1, 3, 5, 7 of every eight: so reads of the
    # bias by half a warp lie in different banks of shared memory.
    i_m = gl.arange(0, TILE, ROWS)
    i_n = gl.arange(0, TILE, ROWS_ACC)
    o_m = (i_m // 8) * 8 + (i_m % 4) * 2 + (i_m // 4) % 2
    o_n = (i_n // 8) * 8 + (i_n % 4) * 2 + (i_n // 4) % 2
    o_d = gl.arange(0, WIDTH, gl.SliceLayout(0, ACC))
    step = 0
    turn = 0
    for item in range(gl.program_id(0), items, gl.num_programs(0)):
        i_q, i_head, i_row = _place(item, blocks_q, heads, TILE)
        mbarrier.wait(full_q, turn & 1)
        q = s_q._reinterpret(dtype, [TILE, WIDTH], MIXED_QUERIES).load(LEFT)
        mbarrier.arrive(empty_q)
        turn += 1  # noqa: SIM113 (a compiled loop)
        acc = gl.zeros([TILE, WIDTH], gl.float32, ACC)
        top = gl.full([TILE], float("-inf"), gl.float32, ROWS)
        # Sums of every eighth key; threads add theirs up at the end.
        sums = gl.sum(
            gl.reshape(gl.zeros([TILE, TILE], gl.float32, LOGITS), (TILE, TILE // 8, 8)), 1
        )
        for _ in range(0, keys, TILE):
            s = step % STAGES
            mbarrier.wait(full.index(s), (step // STAGES) & 1)
            k = s_k.index(s)._reinterpret(dtype, [TILE, WIDTH], KEYS)
            v = s_v.index(s)._reinterpret(dtype, [TILE, WIDTH], KEYS)
            zero = gl.zeros([TILE, TILE], gl.float32, LOGITS)
            x = warpgroup_mma(q, k.permute((1, 0)), zero, use_acc=False, is_async=True)
            bias = s_bias.index(s)._reinterpret(gl.float32, [TILE, TILE], MIXED_BIAS).load(LOGITS)
            mask = s_mask.index(s)._reinterpret(gl.float32, [TILE], LINE)
            mask = mask.load(gl.SliceLayout(0, LOGITS))
            x = warpgroup_mma_wait(0, deps=(x,))
            x = x * scale + bias + mask[None, :]
            highest = gl.maximum(top, gl.max(x, 1))
            shift = gl.where(highest == float("-inf"), 0.0, highest * LOG2E)
            w = gl.exp2(x * LOG2E - shift[:, None])
            old = gl.exp2(top * LOG2E - shift)
            acc = acc * gl.convert_layout(old, ROWS_ACC)[:, None]
            left = gl.convert_layout(w.to(dtype), LEFT_ACC)
            more = warpgroup_mma(left, v, acc, is_async=True)
            added = gl.sum(gl.reshape(w, (TILE, TILE // 8, 8)), 1)
            SUMS: gl.constexpr = gl.SliceLayout(1, added.type.layout)
            sums = sums * gl.convert_layout(old, SUMS)[:, None] + added
            top = highest
            acc = warpgroup_mma_wait(0, deps=(more,))
            mbarrier.arrive(empty.index(s))
            step += 1
        total = gl.convert_layout(gl.sum(sums, 1), ROWS)
        some = total > 0.0
        inverse = gl.where(some, 1.0 / gl.where(some, total, 1.0), 0.0)
        shift = gl.where(top == float("-inf"), 0.0, top * LOG2E)
        p = p_stats + (i_row * heads + i_head).to(gl.int64) * queries + i_q + o_m
        gl.store(p, shift, mask=i_q + o_m < queries)
        gl.store(p + stride_inverse, inverse, mask=i_q + o_m < queries)
        acc = acc * gl.convert_layout(inverse, ROWS_ACC)[:, None]
        i_out = (i_row.to(gl.int64) * queries * heads + i_head) * width
        o_out = (i_q + o_n)[:, None] * (heads * width) + o_d[None, :]
        m = (i_q + o_n < queries)[:, None] & (o_d < width)[None, :]
        gl.store(p_out + i_out + o_out, acc.to(dtype), mask=m)


@gluon.jit
def hopper_forward_kernel(
    d_q, d_k, d_v,  # [B S, N or M, H, D], in boxes of 64 queries or keys of one head
    d_mask,  # fp32 [B S or 1, M to full tiles]: 0, or -inf where a key is left out
    d_bias,  # fp32 [B or 1 times H, N, M], in boxes of 64 by 64
    p_out,  # [B, S, N, H, D], contiguous, written
    p_stats,  # fp32 [2, B S, H, N], written
    items,  # blocks of queries of all heads and rows
    blocks_q, heads, width,
    stride_inverse,  # B S H N: between the two statistics
    rows_per_bias, queries, keys,
    masks,  # 1, or 0 where there is no mask: rows of d_mask in one row
    scale,
    STAGES: gl.constexpr,  # tiles of keys that are fetched ahead
    WIDTH: gl.constexpr,  # D to the next power of two
    TILE: gl.constexpr,
    KEYS: gl.constexpr, MIXED_QUERIES: gl.constexpr, MIXED_BIAS: gl.constexpr,
):  # fmt: skip
    """Output and statistics, as the kernel of ``forward`` leaves them."""
    BAR: gl.constexpr = mbarrier.MBarrierLayout()
    dtype: gl.constexpr = d_q.dtype
    s_q = gl.allocate_shared_memory(dtype, [1, TILE, 1, WIDTH], d_q.layout)
    s_k = gl.allocate_shared_memory(dtype, [STAGES, 1, TILE, 1, WIDTH], d_k.layout)
    s_v = gl.allocate_shared_memory(dtype, [STAGES, 1, TILE, 1, WIDTH], d_v.layout)
    s_bias = gl.allocate_shared_memory(gl.float32, [STAGES, 1, TILE, TILE], d_bias.layout)
    s_mask = gl.allocate_shared_memory(gl.float32, [STAGES, 1, TILE], d_mask.layout)
    full_q = gl.allocate_shared_memory(gl.int64, [1], BAR)
    empty_q = gl.allocate_shared_memory(gl.int64, [1], BAR)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BAR)
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BAR)
    mbarrier.init(full_q, 1)
    mbarrier.init(empty_q, 1)
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), 1)
        mbarrier.init(empty.index(i), 1)
    gl.warp_specialize(
        [
            (_attend, (
                p_out, p_stats, s_q, s_k, s_v, s_mask, s_bias, full_q, empty_q, full, empty, items,
                blocks_q, heads, width, stride_inverse, queries, keys, scale, WIDTH, STAGES, TILE,
                KEYS, MIXED_QUERIES, MIXED_BIAS,
            )),
            (_fetch, (
                d_q, d_k, d_v, d_mask, d_bias, s_q, s_k, s_v, s_mask, s_bias, full_q, empty_q,
                full, empty, items, blocks_q, heads, rows_per_bias, keys, masks, WIDTH, STAGES,
                TILE,
            )),
        ],
        [1],
        [24],
    )  # fmt: skip

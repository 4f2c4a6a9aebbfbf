"""EvoAttention's forward pass on Hopper's own instructions (Gluon).

As :mod:`~megafold.ops.evo_attention.forward`, one block of 64 queries at a time, but four warps do
nothing but compute and one nothing but fetch, tiles by TMA and the mask by itself; programs share a
multiprocessor and take one block after another. With two ``ROWS``, two groups of four warps take
the same queries and head of neighbouring rows, and share the tiles of the bias. The mask is added
to logits, as fp32.
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

from megafold.ops.gluon import following

LOG2E = gl.constexpr(1.4426950408889634)


@gluon.jit
def _place(
    item, blocks_q, heads, groups_per_bias, rows_per_bias, TILE: gl.constexpr, ROWS: gl.constexpr
):
    """First query, head, bias, first row, and how many rows there are from it on."""
    i_group = item // (blocks_q * heads)
    i_bias = i_group // groups_per_bias
    first = (i_group % groups_per_bias) * ROWS
    i_row = i_bias * rows_per_bias + first
    return (
        (item % blocks_q) * TILE,
        (item // blocks_q) % heads,
        i_bias,
        i_row,
        rows_per_bias - first,
    )


@gluon.jit
def _added(p_mask, o_rows, o_k, stride_mk, keys, HAS_MASK: gl.constexpr):
    """What is added to the logits of rows: 0, or -inf where a key is left out."""
    kept = (o_rows >= 0) & (o_k < keys)  # the first always: for every row
    if HAS_MASK:
        kept = gl.load(p_mask + (o_rows + o_k.to(gl.int64) * stride_mk), mask=kept, other=0) != 0
    return gl.where(kept, 0.0, float("-inf"))


@gluon.jit
def _fetch(
    d_q, d_k, d_v, d_bias, p_mask, s_q, s_k, s_v, s_mask, s_bias, full_q, empty_q, full, empty,
    stride_mb, stride_ms, stride_mk,
    items, blocks_q, heads, groups_per_bias, rows_per_bias, rows, keys,
    HAS_MASK: gl.constexpr,
    ROWS: gl.constexpr, WIDTH: gl.constexpr, STAGES: gl.constexpr, TILE: gl.constexpr,
):  # fmt: skip
    """The warp that fetches; where rows end before ROWS, some of the next bias or zeros.

    The mask it reads itself, a tile ahead, for what is added to the logits is in fp32.
    """
    LINES: gl.constexpr = gl.BlockedLayout([1, 2], [1, 32], [1, 1], [1, 0])
    o_r = gl.arange(0, ROWS, gl.SliceLayout(1, LINES))
    o_k = gl.arange(0, TILE, gl.SliceLayout(0, LINES))[None, :]
    s, in_s = 0, 0
    in_q = 0
    for item in range(gl.program_id(0), items, gl.num_programs(0)):
        i_q, i_head, i_bias, i_row, left_over = _place(
            item, blocks_q, heads, groups_per_bias, rows_per_bias, TILE, ROWS
        )
        i_rows = (i_row + gl.minimum(o_r, left_over - 1)).to(gl.int64)[:, None]
        o_rows = i_rows // rows * stride_mb + i_rows % rows * stride_ms
        added = _added(p_mask, o_rows, o_k, stride_mk, keys, HAS_MASK)
        mbarrier.wait(empty_q, in_q ^ 1)
        mbarrier.expect(full_q, ROWS * TILE * WIDTH * 2)
        for r in gl.static_range(ROWS):
            at = [i_row + r, i_q, i_head, 0]
            tma.async_copy_global_to_shared(d_q, at, full_q, s_q.index(r))
        in_q ^= 1
        for i_k in range(0, keys, TILE):
            bar = full.index(s)
            mbarrier.wait(empty.index(s), in_s ^ 1)
            mbarrier.expect(bar, ROWS * TILE * WIDTH * 4 + TILE * TILE * 4)
            at_bias = [i_bias * heads + i_head, i_q, i_k]
            for r in gl.static_range(ROWS):
                at = [i_row + r, i_k, i_head, 0]
                i_s = s * ROWS + r
                tma.async_copy_global_to_shared(d_k, at, bar, s_k.index(i_s))
                if r == 0:
                    tma.async_copy_global_to_shared(d_bias, at_bias, bar, s_bias.index(s))
                tma.async_copy_global_to_shared(d_v, at, bar, s_v.index(i_s))
            s_mask.index(s).store(added)
            mbarrier.arrive(bar)
            added = _added(p_mask, o_rows, i_k + TILE + o_k, stride_mk, keys, HAS_MASK)
            s, in_s = following(s, in_s, STAGES)


@gluon.jit
def _attend(
    r: gl.constexpr, d_out, p_stats, s_q, s_k, s_v, s_mask, s_bias, s_out,
    full_q, empty_q, full, empty,
    items, blocks_q, heads, groups_per_bias, rows_per_bias, stride_inverse, queries, keys, scale,
    ROWS: gl.constexpr, WIDTH: gl.constexpr, STAGES: gl.constexpr, TILE: gl.constexpr,
    KEYS: gl.constexpr, MIXED_QUERIES: gl.constexpr, MIXED_BIAS: gl.constexpr,
):  # fmt: skip
    """Four warps that compute, for one of the rows."""
    HALF: gl.constexpr = TILE // 2
    LOGITS: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], instr_shape=[16, HALF, 16])
    ACC: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], instr_shape=[16, WIDTH, 16])
    LEFT: gl.constexpr = gl.DotOperandLayout(0, LOGITS, k_width=2)
    LEFT_ACC: gl.constexpr = gl.DotOperandLayout(0, ACC, k_width=2)
    ROW: gl.constexpr = gl.SliceLayout(1, LOGITS)
    ROW_ACC: gl.constexpr = gl.SliceLayout(1, ACC)
    LINE: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    dtype: gl.constexpr = s_k.dtype
    # Threads hold queries in the order 0, 2, 4, 6, 1, 3, 5, 7 of every eight: so reads of the
    # bias by half a warp lie in different banks of shared memory.
    i_m = gl.arange(0, TILE, ROW)
    o_m = (i_m // 8) * 8 + (i_m % 4) * 2 + (i_m // 4) % 2
    s, in_s = 0, 0
    in_q = 0
    for item in range(gl.program_id(0), items, gl.num_programs(0)):
        mbarrier.wait(full_q, in_q)
        q = s_q.index(r)._reinterpret(dtype, [TILE, WIDTH], MIXED_QUERIES).load(LEFT)
        mbarrier.arrive(empty_q)
        in_q ^= 1
        acc = gl.zeros([TILE, WIDTH], gl.float32, ACC)
        top = gl.full([TILE], float("-inf"), gl.float32, ROW)
        # Sums of every eighth key; threads add theirs up at the end.
        sums = gl.sum(
            gl.reshape(gl.zeros([TILE, HALF], gl.float32, LOGITS), (TILE, HALF // 8, 8)), 1
        )
        for _ in range(0, keys, TILE):
            mbarrier.wait(full.index(s), in_s)
            k = s_k.index(s * ROWS + r)._reinterpret(dtype, [TILE, WIDTH], KEYS)
            v = s_v.index(s * ROWS + r)._reinterpret(dtype, [TILE, WIDTH], KEYS)
            t_bias = s_bias.index(s)._reinterpret(gl.float32, [TILE, TILE], MIXED_BIAS)
            t_mask = s_mask.index(s)._reinterpret(gl.float32, [ROWS * TILE], LINE)
            # The keys in halves, so that fewer numbers are in registers at once.
            zero = gl.zeros([TILE, HALF], gl.float32, LOGITS)
            k_0, k_1 = k.slice(0, HALF).permute((1, 0)), k.slice(HALF, HALF).permute((1, 0))
            x_0 = warpgroup_mma(q, k_0, zero, use_acc=False, is_async=True)
            x_1 = warpgroup_mma(q, k_1, zero, use_acc=False, is_async=True)
            mask = t_mask.slice(r * TILE, HALF).load(gl.SliceLayout(0, LOGITS))
            bias = t_bias.slice(0, HALF, 1).load(LOGITS)
            x_0 = warpgroup_mma_wait(1, deps=(x_0,))
            x_0 = x_0 * scale + bias + mask[None, :]
            mask = t_mask.slice(r * TILE + HALF, HALF).load(gl.SliceLayout(0, LOGITS))
            bias = t_bias.slice(HALF, HALF, 1).load(LOGITS)
            x_1 = warpgroup_mma_wait(0, deps=(x_1,))
            x_1 = x_1 * scale + bias + mask[None, :]
            highest = gl.maximum(top, gl.max(gl.maximum(x_0, x_1), 1))
            shift = gl.where(highest == float("-inf"), 0.0, highest * LOG2E)
            # Of logits, not of shifts: where the maximum stays it is one, whatever is rounded.
            old = gl.exp2((top - gl.where(highest == float("-inf"), 0.0, highest)) * LOG2E)
            acc = acc * gl.convert_layout(old, ROW_ACC)[:, None]
            w_0 = gl.exp2(x_0 * LOG2E - shift[:, None])
            left = gl.convert_layout(w_0.to(dtype), LEFT_ACC)
            more = warpgroup_mma(left, v.slice(0, HALF), acc, is_async=True)
            w_1 = gl.exp2(x_1 * LOG2E - shift[:, None])
            left = gl.convert_layout(w_1.to(dtype), LEFT_ACC)
            more = warpgroup_mma(left, v.slice(HALF, HALF), more, is_async=True)
            added = gl.sum(gl.reshape(w_0 + w_1, (TILE, HALF // 8, 8)), 1)
            SUMS: gl.constexpr = gl.SliceLayout(1, added.type.layout)
            sums = sums * gl.convert_layout(old, SUMS)[:, None] + added
            top = highest
            acc = warpgroup_mma_wait(0, deps=(more,))
            mbarrier.arrive(empty.index(s))
            s, in_s = following(s, in_s, STAGES)
        total = gl.convert_layout(gl.sum(sums, 1), ROW)
        none = total == 0.0
        inverse = gl.where(none, 0.0, 1.0 / gl.where(none, 1.0, total))
        shift = gl.where(top == float("-inf"), 0.0, top * LOG2E)
        acc = acc * gl.convert_layout(inverse, ROW_ACC)[:, None]
        tma.store_wait(0)
        t_out = s_out.index(r)
        t_out._reinterpret(dtype, [TILE, WIDTH], MIXED_QUERIES).store(acc.to(dtype))
        fence_async_shared()
        i_q, i_head, _, i_row, left_over = _place(
            item, blocks_q, heads, groups_per_bias, rows_per_bias, TILE, ROWS
        )
        if r < left_over:
            i_row += r
            p = p_stats + (i_row * heads + i_head).to(gl.int64) * queries + i_q + o_m
            gl.store(p, shift, mask=i_q + o_m < queries)
            gl.store(p + stride_inverse, inverse, mask=i_q + o_m < queries)
            tma.async_copy_shared_to_global(d_out, [i_row, i_q, i_head, 0], t_out)
    tma.store_wait(0)


@gluon.jit
def hopper_forward_kernel(
    d_q, d_k, d_v,  # [B S, N or M, H, D], in boxes of 64 queries or keys of one head
    d_bias,  # fp32 [B or 1 times H, N, M], in boxes of 64 by 64
    d_out,  # [B S, N, H, D], contiguous, written
    p_mask,  # bool [B, S, M], any strides, or None
    p_stats,  # fp32 [2, B S, H, N], written
    stride_mb, stride_ms, stride_mk,
    items,  # blocks of queries of all heads and groups of rows
    blocks_q, heads,
    groups_per_bias,  # groups of ROWS rows that share a bias
    rows_per_bias, rows,
    stride_inverse,  # B S H N: between the two statistics
    queries, keys, scale,
    HAS_MASK: gl.constexpr,
    ROWS: gl.constexpr,  # at a time: 1 or 2
    STAGES: gl.constexpr,  # tiles of keys that are fetched ahead
    REGISTERS: gl.constexpr,  # of a thread of the second row
    WIDTH: gl.constexpr,  # D to the next power of two
    TILE: gl.constexpr,
    KEYS: gl.constexpr, MIXED_QUERIES: gl.constexpr, MIXED_BIAS: gl.constexpr,
):  # fmt: skip
    """Output and statistics, as the kernel of ``forward`` leaves them."""
    BAR: gl.constexpr = mbarrier.MBarrierLayout()
    dtype: gl.constexpr = d_q.dtype
    s_q = gl.allocate_shared_memory(dtype, [ROWS, 1, TILE, 1, WIDTH], d_q.layout)
    s_k = gl.allocate_shared_memory(dtype, [STAGES * ROWS, 1, TILE, 1, WIDTH], d_k.layout)
    s_v = gl.allocate_shared_memory(dtype, [STAGES * ROWS, 1, TILE, 1, WIDTH], d_v.layout)
    s_bias = gl.allocate_shared_memory(gl.float32, [STAGES, 1, TILE, TILE], d_bias.layout)
    PLAIN: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [1, 0])
    s_mask = gl.allocate_shared_memory(gl.float32, [STAGES, ROWS, TILE], PLAIN)
    s_out = gl.allocate_shared_memory(dtype, [ROWS, 1, TILE, 1, WIDTH], d_out.layout)
    full_q = gl.allocate_shared_memory(gl.int64, [1], BAR)
    empty_q = gl.allocate_shared_memory(gl.int64, [1], BAR)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BAR)
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BAR)
    mbarrier.init(full_q, 1)
    mbarrier.init(empty_q, ROWS)
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), 2)
        mbarrier.init(empty.index(i), ROWS)
    # Arguments are written out for each role: a tuple kept under a name loses its constants.
    if ROWS == 1:
        gl.warp_specialize(
            [
                (_attend, (
                    gl.constexpr(0), d_out, p_stats, s_q, s_k, s_v, s_mask, s_bias, s_out, full_q,
                    empty_q, full, empty, items, blocks_q, heads, groups_per_bias, rows_per_bias,
                    stride_inverse, queries, keys, scale, ROWS, WIDTH, STAGES, TILE, KEYS,
                    MIXED_QUERIES, MIXED_BIAS,
                )),
                (_fetch, (
                    d_q, d_k, d_v, d_bias, p_mask, s_q, s_k, s_v, s_mask, s_bias, full_q, empty_q,
                    full, empty, stride_mb, stride_ms, stride_mk, items, blocks_q, heads,
                    groups_per_bias, rows_per_bias, rows, keys, HAS_MASK, ROWS, WIDTH, STAGES,
                    TILE,
                )),
            ],
            [1],
            [24],
        )  # fmt: skip
    else:
        gl.warp_specialize(
            [
                (_attend, (
                    gl.constexpr(0), d_out, p_stats, s_q, s_k, s_v, s_mask, s_bias, s_out, full_q,
                    empty_q, full, empty, items, blocks_q, heads, groups_per_bias, rows_per_bias,
                    stride_inverse, queries, keys, scale, ROWS, WIDTH, STAGES, TILE, KEYS,
                    MIXED_QUERIES, MIXED_BIAS,
                )),
                (_attend, (
                    gl.constexpr(1), d_out, p_stats, s_q, s_k, s_v, s_mask, s_bias, s_out, full_q,
                    empty_q, full, empty, items, blocks_q, heads, groups_per_bias, rows_per_bias,
                    stride_inverse, queries, keys, scale, ROWS, WIDTH, STAGES, TILE, KEYS,
                    MIXED_QUERIES, MIXED_BIAS,
                )),
                (_fetch, (
                    d_q, d_k, d_v, d_bias, p_mask, s_q, s_k, s_v, s_mask, s_bias, full_q, empty_q,
                    full, empty, stride_mb, stride_ms, stride_mk, items, blocks_q, heads,
                    groups_per_bias, rows_per_bias, rows, keys, HAS_MASK, ROWS, WIDTH, STAGES,
                    TILE,
                )),
            ],
            [4, 1],
            [REGISTERS, 24],
        )  # fmt: skip

"""The groups of warps that have keys and values, of EvoAttention's gradients on Hopper (Gluon).

See :mod:`~megafold.ops.evo_attention.hopper_backward`, whose kernel they are part of.
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
def place(
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
def step(
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
                dk, dv = step(
                    dk, dv, b_k, b_v, b_k_rest, b_v_rest, b_ke, b_c, t_q, t_do, t_e, t_bias, t_ds,
                    empty_logits.index(j), full_logits.index(j), in_j, factor, ALONE, USED, SLICES,
                    SLICE, TILE, LOGITS, LEFT_ACC,
                )  # fmt: skip
            else:
                other_dk, other_dv = step(
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
def of_keys(
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
        i_row, i_head, walk, last = place(
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

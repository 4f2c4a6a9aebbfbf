"""Gradients of LayerNorm + Linear in one pass, on Hopper's own instructions (Gluon).

More than 128 outputs leave no program room for S ``[O, C]`` and the weight at once (letters and
the two sums are those of :mod:`~megafold.ops.layer_norm_linear.kernels`). So programs are of two
kinds, which walk over the rows side by side: what one kind reads, the other finds in L2.

- The first hold the weight in shared memory: the gradient of x, and that of the norm's bias, a sum
  over rows of what they have anyway. Two groups of four warps take 64 rows in turn.
- The others hold ``S^T`` of 256 outputs in registers, 64 channels in each of two groups of four
  warps. Four more warps add up t.

In both one more warp fetches tiles by TMA. Shared memory is one pool of tiles of 64 by 128 numbers.
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

from megafold.ops.gluon import barrier, following

ROWS = gl.constexpr(64)  # of a tile
C = gl.constexpr(128)  # channels, columns of a tile
TILES = gl.constexpr(14)  # in shared memory
SLICE = gl.constexpr(256)  # outputs of a program of the second kind
STAGES = gl.constexpr(4)  # that it fetches ahead, each of three tiles
BYTES = gl.constexpr(64 * 128 * 2)  # of a tile
FETCHING = gl.constexpr(24)  # registers of a thread that fetches


@gluon.jit
def _place(for_x, groups):
    """Of a program of the second kind: its slice of outputs and its group of rows."""
    i_sum = gl.program_id(0) - for_x
    return i_sum // groups, i_sum % groups


@gluon.jit
def _fetch(
    d_x, d_grad, d_weight, p_stats, tiles, s_stats, full, empty, full_x, empty_x, full_weight,
    for_x, groups, rows, outs,
    WEIGHT: gl.constexpr, STEPS: gl.constexpr, RING: gl.constexpr,
):  # fmt: skip
    """The warp that fetches."""
    s, in_s = 0, 0
    if gl.program_id(0) < for_x:
        mbarrier.expect(full_weight, WEIGHT * BYTES)
        for o in gl.static_range(WEIGHT):
            tma.async_copy_global_to_shared(d_weight, [o * ROWS, 0], full_weight, tiles.index(o))
        w, in_x = 0, 1
        for first in range(gl.program_id(0) * ROWS, rows, for_x * ROWS):
            for i in range(STEPS):
                mbarrier.wait(empty.index(s), in_s ^ 1)
                bar = full.index(s)
                mbarrier.expect(bar, BYTES)
                tile = tiles.index(WEIGHT + 2 + s)
                tma.async_copy_global_to_shared(d_grad, [first, i * C], bar, tile)
                s, in_s = following(s, in_s, RING)
            # Last: by now those who had rows in its place are done with them.
            mbarrier.wait(empty_x.index(w), in_x)
            bar_x = full_x.index(w)
            mbarrier.expect(bar_x, BYTES)
            tma.async_copy_global_to_shared(d_x, [first, 0], bar_x, tiles.index(WEIGHT + w))
            w, in_x = following(w, in_x, 2)
    else:
        ROW: gl.constexpr = gl.BlockedLayout([2], [32], [1], [0])
        i_slice, i_group = _place(for_x, groups)
        i_m = i_group * ROWS + gl.arange(0, ROWS, ROW)
        mean = gl.load(p_stats + i_m, mask=i_m < rows, other=0.0)
        rstd = gl.load(p_stats + rows + i_m, mask=i_m < rows, other=0.0)
        for first in range(i_group * ROWS, rows, groups * ROWS):
            mbarrier.wait(empty.index(s), in_s ^ 1)
            bar = full.index(s)
            mbarrier.expect(bar, 3 * BYTES)
            tma.async_copy_global_to_shared(d_x, [first, 0], bar, tiles.index(3 * s))
            for h in gl.static_range(2):
                at = [first, i_slice * SLICE + h * C]
                tma.async_copy_global_to_shared(d_grad, at, bar, tiles.index(3 * s + 1 + h))
            s_stats.index(2 * s).store(mean)
            s_stats.index(2 * s + 1).store(rstd)
            mbarrier.arrive(bar)
            i_m += groups * ROWS
            mean = gl.load(p_stats + i_m, mask=i_m < rows, other=0.0)
            rstd = gl.load(p_stats + rows + i_m, mask=i_m < rows, other=0.0)
            s, in_s = following(s, in_s, STAGES)


@gluon.jit
def _totals(p_totals, tiles, full, empty, for_x, groups, rows, outs):
    """The group that adds up t, in programs of the second kind."""
    # Eight threads read four times 16 bytes of rows r and r + 4: all banks of shared memory.
    LINES: gl.constexpr = gl.DistributedLinearLayout(
        reg_bases=[[0, 1], [0, 2], [0, 4], [8, 0], [16, 0], [32, 0]],
        lane_bases=[[0, 8], [0, 16], [4, 0], [1, 0], [2, 0]],
        warp_bases=[[0, 32], [0, 64]],
        block_bases=[],
        shape=[64, 128],
    )
    if gl.program_id(0) >= for_x:
        i_slice, i_group = _place(for_x, groups)
        s, in_s = 0, 0
        zero = gl.zeros([ROWS, C], gl.float32, LINES)
        t_0 = gl.sum(gl.reshape(zero, (8, 8, C)), 0)
        t_1 = t_0
        for _ in range(i_group * ROWS, rows, groups * ROWS):
            mbarrier.wait(full.index(s), in_s)
            g_0 = tiles.index(3 * s + 1).load(LINES).to(gl.float32)
            t_0 += gl.sum(gl.reshape(g_0, (8, 8, C)), 0)
            g_1 = tiles.index(3 * s + 2).load(LINES).to(gl.float32)
            t_1 += gl.sum(gl.reshape(g_1, (8, 8, C)), 0)
            mbarrier.arrive(empty.index(s))
            s, in_s = following(s, in_s, STAGES)
        OUTS: gl.constexpr = gl.SliceLayout(0, t_0.type.layout)
        p = p_totals + i_group.to(gl.int64) * outs
        i_o = i_slice * SLICE + gl.arange(0, C, OUTS)
        gl.store(p + i_o, gl.sum(t_0, 0), mask=i_o < outs)
        gl.store(p + i_o + C, gl.sum(t_1, 0), mask=i_o + C < outs)


@gluon.jit
def _normal(tiles, s_stats, s, w: gl.constexpr, LEFT: gl.constexpr, HALVES: gl.constexpr):
    """``x^T`` of 64 channels and 64 rows, normalised: an operand in registers."""
    dtype: gl.constexpr = tiles.dtype
    t = tiles.index(3 * s)._reinterpret(dtype, [2, ROWS, C // 2], HALVES).index(w)
    mean = s_stats.index(2 * s).load(gl.SliceLayout(0, LEFT))
    rstd = s_stats.index(2 * s + 1).load(gl.SliceLayout(0, LEFT))
    x = t.permute((1, 0)).load(LEFT).to(gl.float32)
    return ((x - mean[None, :]) * rstd[None, :]).to(dtype)


@gluon.jit
def _add(t, p, first, stride, rows):
    """Add rows of a tensor to a tile of shared memory, whole lines a few at a time.

    (In the registers of the tile's accumulator there is no room for them.)
    """
    LINES: gl.constexpr = gl.BlockedLayout([1, 8], [2, 16], [4, 1], [1, 0])
    FEW: gl.constexpr = 16
    o_m = gl.arange(0, FEW, gl.SliceLayout(1, LINES))
    o_c = gl.arange(0, C, gl.SliceLayout(0, LINES))
    for i in gl.static_range(0, ROWS, FEW):
        o = o_m[:, None] * stride + o_c[None, :]
        there = (first + i + o_m < rows)[:, None]
        added = gl.load(p + (first + i).to(gl.int64) * stride + o, mask=there, other=0.0)
        few = t.slice(i, FEW)
        few.store((few.load(LINES).to(gl.float32) + added.to(gl.float32)).to(t.dtype))


@gluon.jit
def _gradient(
    w: gl.constexpr, d_grad_x, p_norm_weight, p_stats, p_added, p_of_bias, tiles,
    full, empty, full_x, empty_x, full_weight, turns, stride_a, for_x, rows,
    WEIGHT: gl.constexpr, STEPS: gl.constexpr, RING: gl.constexpr, HALVES: gl.constexpr,
):  # fmt: skip
    """The first kind: four warps for every other 64 rows; the others multiply while they end.

    They take turns: a buffer's barrier, of two phases, does not tell its data from that before.
    """
    dtype: gl.constexpr = tiles.dtype
    ACC: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], instr_shape=[16, C, 16])
    o_m = gl.arange(0, ROWS, gl.SliceLayout(1, ACC))
    o_c = gl.arange(0, C, gl.SliceLayout(0, ACC))
    # Of rows m and m + 8 a thread adds up its own; others it never meets until the end.
    of_bias = gl.sum(gl.reshape(gl.zeros([ROWS, C], gl.float32, ACC), (4, 2, 8, C)), 1)
    in_x = 0
    in_turn = 1 - w
    step = w * STEPS
    mbarrier.wait(full_weight, 0)
    for first in range((gl.program_id(0) + w * for_x) * ROWS, rows, 2 * for_x * ROWS):
        i_m = first + o_m
        mean = gl.load(p_stats + i_m, mask=i_m < rows, other=0.0)
        rstd = gl.load(p_stats + rows + i_m, mask=i_m < rows, other=0.0)
        acc = gl.zeros([ROWS, C], gl.float32, ACC)
        s, in_s = step % RING, step // RING % 2
        mbarrier.wait(turns.index(w), in_turn)
        in_turn ^= 1
        for i in range(WEIGHT // 2):
            mbarrier.wait(full.index(s), in_s)
            grad = tiles.index(WEIGHT + 2 + s)._reinterpret(dtype, [2, ROWS, C // 2], HALVES)
            acc = warpgroup_mma(grad.index(0), tiles.index(2 * i), acc, is_async=True)
            acc = warpgroup_mma(grad.index(1), tiles.index(2 * i + 1), acc, is_async=True)
            acc = warpgroup_mma_wait(2, deps=(acc,))
            if i > 0:
                mbarrier.arrive(empty.index(gl.where(s == 0, RING - 1, s - 1)))
            s, in_s = following(s, in_s, RING)
        if WEIGHT % 2:
            mbarrier.wait(full.index(s), in_s)
            grad = tiles.index(WEIGHT + 2 + s)._reinterpret(dtype, [2, ROWS, C // 2], HALVES)
            acc = warpgroup_mma(grad.index(0), tiles.index(WEIGHT - 1), acc, is_async=True)
            acc = warpgroup_mma_wait(1, deps=(acc,))
            mbarrier.arrive(empty.index(gl.where(s == 0, RING - 1, s - 1)))
            s, in_s = following(s, in_s, RING)
        mbarrier.arrive(turns.index(1 - w))
        acc = warpgroup_mma_wait(0, deps=(acc,))
        mbarrier.arrive(empty.index(gl.where(s == 0, RING - 1, s - 1)))
        step += 2 * STEPS
        mbarrier.wait(full_x.index(w), in_x)
        t_x = tiles.index(WEIGHT + w)
        normal = (t_x.load(ACC).to(gl.float32) - mean[:, None]) * rstd[:, None]
        of_bias += gl.sum(gl.reshape(acc, (4, 2, 8, C)), 1)
        if p_norm_weight is not None:
            acc = acc * gl.load(p_norm_weight + o_c).to(gl.float32)[None, :]
        of_mean = gl.sum(acc, 1) * (1.0 / C)
        of_scale = gl.sum(acc * normal, 1) * (1.0 / C)
        grad_x = (acc - of_mean[:, None] - normal * of_scale[:, None]) * rstd[:, None]
        t_x.store(grad_x.to(dtype))
        if p_added is not None:
            _add(t_x, p_added, first, stride_a, rows)
        fence_async_shared()
        tma.async_copy_shared_to_global(d_grad_x, [first, 0], t_x)
        tma.store_wait(0)
        mbarrier.arrive(empty_x.index(w))
        in_x ^= 1
    WARPS: gl.constexpr = gl.SliceLayout(1, of_bias.type.layout)
    i_w = (gl.program_id(0) * 2 + w) * 4 + gl.arange(0, 4, gl.SliceLayout(1, WARPS))
    i_c = gl.arange(0, C, gl.SliceLayout(0, WARPS))
    gl.store(p_of_bias + i_w[:, None] * C + i_c[None, :], gl.sum(of_bias, 1))


@gluon.jit
def _sums(
    w: gl.constexpr, p_weight, p_products, p_of_weight, tiles, s_stats, full, empty,
    stride_w, for_x, groups, rows, outs, HALVES: gl.constexpr,
):  # fmt: skip
    """The second kind: four warps for 64 of 128 channels."""
    i_slice, i_group = _place(for_x, groups)
    s, in_s = 0, 0
    SUM: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], instr_shape=[16, C, 16])
    LEFT: gl.constexpr = gl.DotOperandLayout(0, SUM, k_width=2)
    sum_0 = gl.zeros([C // 2, C], gl.float32, SUM)
    sum_1 = gl.zeros([C // 2, C], gl.float32, SUM)
    step = groups * ROWS
    if i_group * ROWS < rows:
        mbarrier.wait(full.index(0), 0)
        x = _normal(tiles, s_stats, 0, w, LEFT, HALVES)
        for _ in range(i_group * ROWS, rows - step, step):
            sum_0 = warpgroup_mma(x, tiles.index(3 * s + 1), sum_0, is_async=True)
            sum_1 = warpgroup_mma(x, tiles.index(3 * s + 2), sum_1, is_async=True)
            n, in_n = following(s, in_s, STAGES)
            mbarrier.wait(full.index(n), in_n)
            new = _normal(tiles, s_stats, n, w, LEFT, HALVES)
            sum_0, sum_1, x = warpgroup_mma_wait(0, deps=(sum_0, sum_1, x))
            mbarrier.arrive(empty.index(s))
            x = new
            s, in_s = n, in_n
        sum_0 = warpgroup_mma(x, tiles.index(3 * s + 1), sum_0, is_async=True)
        sum_1 = warpgroup_mma(x, tiles.index(3 * s + 2), sum_1, is_async=True)
        sum_0, sum_1 = warpgroup_mma_wait(0, deps=(sum_0, sum_1))
    i_c = w * (C // 2) + gl.arange(0, C // 2, gl.SliceLayout(1, SUM))
    i_o = i_slice * SLICE + gl.arange(0, C, gl.SliceLayout(0, SUM))
    p = p_products + i_group.to(gl.int64) * outs * C
    p += i_o[None, :] * C + i_c[:, None]
    m_c = (i_c < C)[:, None]
    gl.store(p, sum_0, mask=(i_o < outs)[None, :] & m_c)
    gl.store(p + C * C, sum_1, mask=(i_o + C < outs)[None, :] & m_c)
    # Read again as all four warps wrote it: beside the sums there is no room for the weight.
    barrier()
    LINES: gl.constexpr = gl.BlockedLayout([1, 4], [2, 16], [4, 1], [1, 0])
    o_o = gl.arange(0, ROWS, gl.SliceLayout(1, LINES))
    o_c = w * (C // 2) + gl.arange(0, C // 2, gl.SliceLayout(0, LINES))
    of_weight = gl.zeros([8, C // 2], gl.float32, LINES)
    p = p_products + i_group.to(gl.int64) * outs * C + o_c[None, :]
    for h in gl.static_range(4):
        i_o = (i_slice * SLICE + h * ROWS + o_o)[:, None]
        m = (i_o < outs) & (o_c < C)[None, :]
        found = gl.load(p + i_o * C, mask=m, other=0.0)
        weight = gl.load(p_weight + i_o * stride_w + o_c[None, :], mask=m, other=0.0)
        found = gl.sum(gl.reshape(found * weight.to(gl.float32), (8, 8, C // 2)), 0)
        of_weight += gl.convert_layout(found, LINES)
    i_part = (gl.program_id(0) - for_x) * 8 + gl.arange(0, 8, gl.SliceLayout(1, LINES))
    gl.store(p_of_weight + i_part[:, None] * C + o_c[None, :], of_weight)


@gluon.jit
def _multiply(
    w: gl.constexpr, d_grad_x, p_norm_weight, p_weight, p_stats, p_added, p_products, p_of_weight,
    p_of_bias, tiles, s_stats, full, empty, full_x, empty_x, full_weight, turns,
    stride_w, stride_a, for_x, groups, rows, outs,
    WEIGHT: gl.constexpr, STEPS: gl.constexpr, RING: gl.constexpr, HALVES: gl.constexpr,
):  # fmt: skip
    """One of the two groups of four warps that multiply."""
    if gl.program_id(0) < for_x:
        _gradient(
            w, d_grad_x, p_norm_weight, p_stats, p_added, p_of_bias, tiles, full, empty, full_x,
            empty_x, full_weight, turns, stride_a, for_x, rows, WEIGHT, STEPS, RING, HALVES,
        )  # fmt: skip
    else:
        _sums(
            w, p_weight, p_products, p_of_weight, tiles, s_stats, full, empty,
            stride_w, for_x, groups, rows, outs, HALVES,
        )  # fmt: skip


@gluon.jit
def hopper_backward_kernel(
    d_x,  # [M, C], in boxes of 64 by 128
    d_grad,  # [M, O], in boxes of 64 by 128
    d_weight,  # [O, C], in boxes of 64 by 128
    d_grad_x,  # [M, C], contiguous, in boxes of 64 by 128, written
    p_norm_weight,  # [C] or None
    p_weight,  # [O, C], neighbours along C
    p_stats,  # fp32 [2, M]
    p_added,  # [M, C], neighbours along C, what is added to the gradient of x; or None
    p_products,  # fp32 [groups, O, C], written: S of each group of rows
    p_totals,  # fp32 [groups, O], written: t of each
    p_of_weight,  # fp32 [8 (programs - for_x), C], written: what sums to the norm's gradients
    p_of_bias,  # fp32 [8 for_x, C], written
    stride_w,  # of a row
    stride_a,  # of a row of p_added
    for_x,  # programs of the first kind
    groups,  # of rows: each a program of the second kind for 256 outputs
    rows,
    outs,
    WEIGHT: gl.constexpr,  # tiles of the weight
    STEPS: gl.constexpr,  # tiles of the gradient for 64 rows
    RING: gl.constexpr,  # of those that are fetched ahead, in the first kind
    REGISTERS: gl.constexpr,
    HALVES: gl.constexpr,  # layout in shared memory of 64 by 64
    LINE: gl.constexpr,  # and of 64 numbers
):  # fmt: skip
    """All gradients, or what sums to them."""
    BAR: gl.constexpr = mbarrier.MBarrierLayout()
    tiles = gl.allocate_shared_memory(d_x.dtype, [TILES, ROWS, C], d_x.layout)
    s_stats = gl.allocate_shared_memory(gl.float32, [2 * STAGES, ROWS], LINE)
    full = gl.allocate_shared_memory(gl.int64, [TILES, 1], BAR)
    empty = gl.allocate_shared_memory(gl.int64, [TILES, 1], BAR)
    full_x = gl.allocate_shared_memory(gl.int64, [2, 1], BAR)
    empty_x = gl.allocate_shared_memory(gl.int64, [2, 1], BAR)
    full_weight = gl.allocate_shared_memory(gl.int64, [1], BAR)
    turns = gl.allocate_shared_memory(gl.int64, [2, 1], BAR)
    for i in gl.static_range(TILES):
        if gl.program_id(0) < for_x:
            mbarrier.init(full.index(i), 1)
            mbarrier.init(empty.index(i), 1)
        else:
            mbarrier.init(full.index(i), 2)
            mbarrier.init(empty.index(i), 3)
    for i in gl.static_range(2):
        mbarrier.init(full_x.index(i), 1)
        mbarrier.init(empty_x.index(i), 1)
        mbarrier.init(turns.index(i), 1)
    mbarrier.init(full_weight, 1)
    # Arguments are written out for each role: a tuple kept under a name loses its constants.
    gl.warp_specialize(
        [
            (_totals, (p_totals, tiles, full, empty, for_x, groups, rows, outs)),
            (_multiply, (
                gl.constexpr(0), d_grad_x, p_norm_weight, p_weight, p_stats, p_added,
                p_products, p_of_weight, p_of_bias, tiles, s_stats, full, empty, full_x, empty_x,
                full_weight, turns, stride_w, stride_a, for_x, groups, rows, outs, WEIGHT, STEPS,
                RING, HALVES,
            )),
            (_multiply, (
                gl.constexpr(1), d_grad_x, p_norm_weight, p_weight, p_stats, p_added,
                p_products, p_of_weight, p_of_bias, tiles, s_stats, full, empty, full_x, empty_x,
                full_weight, turns, stride_w, stride_a, for_x, groups, rows, outs, WEIGHT, STEPS,
                RING, HALVES,
            )),
            (_fetch, (
                d_x, d_grad, d_weight, p_stats, tiles, s_stats, full, empty, full_x, empty_x,
                full_weight, for_x, groups, rows, outs, WEIGHT, STEPS, RING,
            )),
        ],
        [4, 4, 1],
        [REGISTERS, REGISTERS, FETCHING],
    )  # fmt: skip

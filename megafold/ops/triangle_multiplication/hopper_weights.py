"""Gradients of triangle multiplication's weights on Hopper's own instructions (Gluon).

What :mod:`~megafold.ops.triangle_multiplication.weights` leaves, letters and names as there: a
program has 128 rows of two weights, p and g, and adds up their gradients over a share of the pairs,
64 at a time. Warps have roles. One warp fetches tiles by TMA, and puts the pairs' statistics beside
them; four warps normalise tiles in their place; and each of two groups of four warps has 64 of the
rows, whose sums it holds in registers. The groups take turns: while one multiplies, the other has
its gates to compute.
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

from megafold.ops.gluon import barrier, following, sigmoid

C = gl.constexpr(128)  # channels, and a program's rows of each weight
PAIRS = gl.constexpr(64)  # of a tile
OUTS = gl.constexpr(64)  # rows of the weights that a group has
BYTES = gl.constexpr(64 * 128 * 2)  # of a tile
SLICE = gl.constexpr(16)  # pairs that are normalised at once; or channels, where they come first
FETCHING = gl.constexpr(24)  # registers of a thread that fetches


@gluon.jit
def _share(pairs, BLOCKS: gl.constexpr):
    """The first pair of a program, and the step to its next ones: neighbours share pairs."""
    i_split = gl.program_id(0) // BLOCKS
    return i_split * PAIRS, gl.num_programs(0) // BLOCKS * PAIRS


@gluon.jit
def _fetch(
    d_grad, d_z, d_x, d_p, d_g, p_mask, p_stats, p_stats_x, s_p, s_g, s_z, s_x, s_grad, s_stats,
    full, empty, full_weights, pairs, gap, BLOCKS: gl.constexpr, SLOTS: gl.constexpr,
):  # fmt: skip
    """The warp that fetches."""
    LANES: gl.constexpr = gl.BlockedLayout([2], [32], [1], [0])
    LINES: gl.constexpr = 4 if d_x is not None else 2  # of statistics
    TILES: gl.constexpr = 3 if d_x is not None else 2
    i_o = gl.program_id(0) % BLOCKS * C
    mbarrier.expect(full_weights, 4 * BYTES)
    for w in gl.static_range(2):
        at_w = [i_o + w * OUTS, 0]
        tma.async_copy_global_to_shared(d_p, at_w, full_weights, s_p.index(w))
        tma.async_copy_global_to_shared(d_g, at_w, full_weights, s_g.index(w))
    i_edge = i_o + gl.where(i_o == 0, 0, gap)
    start, step = _share(pairs, BLOCKS)
    s, in_s = 0, 0
    i_m = start + gl.arange(0, PAIRS, LANES)
    for first in range(start, pairs, step):
        # Loaded before there is a place for them.
        mean = gl.load(p_stats + i_m, mask=i_m < pairs, other=0.0)
        rstd = gl.load(p_stats + pairs + i_m, mask=i_m < pairs, other=0.0)
        if p_mask is not None:
            there = gl.load(p_mask + i_m, mask=i_m < pairs, other=0)
        if d_x is not None:
            mean_x = gl.load(p_stats_x + i_m, mask=i_m < pairs, other=0.0)
            rstd_x = gl.load(p_stats_x + pairs + i_m, mask=i_m < pairs, other=0.0)
        i_m += step
        mbarrier.wait(empty.index(s), in_s ^ 1)
        bar = full.index(s)
        mbarrier.expect(bar, TILES * BYTES)
        tma.async_copy_global_to_shared(d_z, [first, 0], bar, s_z.index(s))
        if d_x is not None:
            tma.async_copy_global_to_shared(d_x, [0, first], bar, s_x.index(s))
            tma.async_copy_global_to_shared(d_grad, [first, 0], bar, s_grad.index(s))
            s_stats.index(LINES * s + 2).store(mean_x)
            s_stats.index(LINES * s + 3).store(rstd_x)
        else:
            tma.async_copy_global_to_shared(d_grad, [i_edge, first], bar, s_grad.index(s))
        s_stats.index(LINES * s).store(mean)
        if p_mask is not None:  # no deviation is infinite: so zero says that a pair is masked
            s_stats.index(LINES * s + 1).store(gl.where(there != 0, rstd, 0.0))
        else:
            s_stats.index(LINES * s + 1).store(rstd)
        mbarrier.arrive(bar)
        s, in_s = following(s, in_s, SLOTS)


@gluon.jit
def _normalise_rows(t, s_mean, s_rstd, p_weight, p_bias, MASKED: gl.constexpr):
    """Normalise a tile ``[pairs, channels]`` in its place; zeros where a pair is masked.

    What is summed for a pair is a product with its row: masked so, it needs no mask of its own.
    """
    # Eight threads read a line of 64 channels: all banks of shared memory.
    ROWS: gl.constexpr = gl.DistributedLinearLayout(
        reg_bases=[[0, 1], [0, 2], [4, 0], [8, 0]],
        lane_bases=[[0, 4], [0, 8], [0, 16], [0, 32], [0, 64]],
        warp_bases=[[1, 0], [2, 0]],
        block_bases=[],
        shape=[16, 128],
    )
    o_c = gl.arange(0, C, gl.SliceLayout(0, ROWS))
    if p_weight is not None:
        weight = gl.load(p_weight + o_c).to(gl.float32)
    if p_bias is not None:
        bias = gl.load(p_bias + o_c).to(gl.float32)
    for h in gl.static_range(PAIRS // SLICE):
        t_h = t.slice(h * SLICE, SLICE)
        mean = s_mean.slice(h * SLICE, SLICE).load(gl.SliceLayout(1, ROWS))
        rstd = s_rstd.slice(h * SLICE, SLICE).load(gl.SliceLayout(1, ROWS))
        n = (t_h.load(ROWS).to(gl.float32) - mean[:, None]) * rstd[:, None]
        if p_weight is not None:
            n = n * weight[None, :]
        if p_bias is not None:
            n = n + bias[None, :]
        if MASKED:
            n = gl.where(rstd[:, None] != 0.0, n, 0.0)
        t_h.store(n.to(t.dtype))


@gluon.jit
def _normalise_first(t, s_mean, s_rstd, p_weight, p_bias):
    """Normalise a tile ``[channels, pairs]`` in its place."""
    FIRST: gl.constexpr = gl.DistributedLinearLayout(
        reg_bases=[[0, 1], [0, 2], [8, 0]],
        lane_bases=[[0, 4], [0, 8], [0, 16], [0, 32], [1, 0]],
        warp_bases=[[2, 0], [4, 0]],
        block_bases=[],
        shape=[16, 64],
    )
    mean = s_mean.load(gl.SliceLayout(0, FIRST))
    rstd = s_rstd.load(gl.SliceLayout(0, FIRST))
    o_c = gl.arange(0, SLICE, gl.SliceLayout(1, FIRST))
    for h in gl.static_range(C // SLICE):
        t_h = t.slice(h * SLICE, SLICE)
        y = (t_h.load(FIRST).to(gl.float32) - mean[None, :]) * rstd[None, :]
        if p_weight is not None:
            y = y * gl.load(p_weight + h * SLICE + o_c).to(gl.float32)[:, None]
        if p_bias is not None:
            y = y + gl.load(p_bias + h * SLICE + o_c).to(gl.float32)[:, None]
        t_h.store(y.to(t.dtype))


@gluon.jit
def _normalise(
    p_weight, p_bias, p_weight_x, p_bias_x, s_z, s_x, s_stats, full, ready, pairs,
    MASKED: gl.constexpr, BLOCKS: gl.constexpr, SLOTS: gl.constexpr,
):  # fmt: skip
    """The four warps that normalise."""
    LINES: gl.constexpr = 4 if s_x is not None else 2
    start, step = _share(pairs, BLOCKS)
    s, in_s = 0, 0
    for _ in range(start, pairs, step):
        mbarrier.wait(full.index(s), in_s)
        i = LINES * s
        _normalise_rows(
            s_z.index(s), s_stats.index(i), s_stats.index(i + 1), p_weight, p_bias, MASKED
        )
        if s_x is not None:
            _normalise_first(
                s_x.index(s), s_stats.index(i + 2), s_stats.index(i + 3), p_weight_x, p_bias_x
            )
        fence_async_shared()
        barrier()
        mbarrier.arrive(ready.index(s))
        s, in_s = following(s, in_s, SLOTS)


@gluon.jit
def _sum(
    w: gl.constexpr, p_sums, s_p, s_g, s_z, s_x, s_grad, full, ready, empty, full_weights, turns,
    pairs, BLOCKS: gl.constexpr, SLOTS: gl.constexpr, HALVES: gl.constexpr,
):  # fmt: skip
    """One of the two groups of four warps that multiply."""
    SUM: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], instr_shape=[16, C, 16])
    GATE: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], instr_shape=[16, PAIRS, 16])
    LEFT: gl.constexpr = gl.DotOperandLayout(0, SUM, k_width=2)
    dtype: gl.constexpr = s_z.dtype
    of_wp = gl.zeros([OUTS, C], gl.float32, SUM)
    of_wg = gl.zeros([OUTS, C], gl.float32, SUM)
    start, step = _share(pairs, BLOCKS)
    s, in_s = 0, 0
    in_turn = 0
    mbarrier.wait(full_weights, 0)
    if w == 1:
        mbarrier.wait(turns.index(1), 0)
        in_turn = 1
    for _ in range(start, pairs, step):
        mbarrier.wait(full.index(s), in_s)
        mbarrier.wait(ready.index(s), in_s)
        zero = gl.zeros([OUTS, PAIRS], gl.float32, GATE)
        n = s_z.index(s)
        y = s_x.index(s).permute((1, 0)) if s_x is not None else n
        gate = warpgroup_mma(
            s_g.index(w), n.permute((1, 0)), zero, use_acc=False, is_async=True
        )  # fmt: skip
        u = warpgroup_mma(s_p.index(w), y.permute((1, 0)), zero, use_acc=False, is_async=True)
        mbarrier.arrive(turns.index(1 - w))
        gate, u = warpgroup_mma_wait(0, deps=(gate, u))
        if s_x is not None:
            t_grad = s_grad.index(s)._reinterpret(dtype, [2, PAIRS, OUTS], HALVES).index(w)
            t_grad = t_grad.permute((1, 0))
        else:
            t_grad = s_grad.index(s).slice(w * OUTS, OUTS)
        gate = sigmoid(gate)
        of_u = t_grad.load(GATE).to(gl.float32) * gate
        of_g = gl.convert_layout((of_u * u * (1.0 - gate)).to(dtype), LEFT)
        of_u = gl.convert_layout(of_u.to(dtype), LEFT)
        mbarrier.wait(turns.index(w), in_turn)
        in_turn ^= 1
        of_wp = warpgroup_mma(of_u, y, of_wp, is_async=True)
        of_wg = warpgroup_mma(of_g, n, of_wg, is_async=True)
        of_wp, of_wg, of_u, of_g = warpgroup_mma_wait(0, deps=(of_wp, of_wg, of_u, of_g))
        mbarrier.arrive(empty.index(s))
        s, in_s = following(s, in_s, SLOTS)
    if w == 0:
        mbarrier.arrive(turns.index(1))
    i_split = gl.program_id(0) // BLOCKS
    o_o = gl.program_id(0) % BLOCKS * C + w * OUTS + gl.arange(0, OUTS, gl.SliceLayout(1, SUM))
    o_c = gl.arange(0, C, gl.SliceLayout(0, SUM))
    SIZE: gl.constexpr = BLOCKS * C * C
    p = p_sums + i_split.to(gl.int64) * (2 * SIZE) + o_o[:, None] * C + o_c[None, :]
    gl.store(p, of_wp)
    gl.store(p + SIZE, of_wg)


@gluon.jit
def hopper_weights_out_kernel(
    d_grad,  # [M, C], in boxes of 64 by 128: gradient of the output
    d_x,  # [C, M], in boxes of 128 by 64: the product over triangles
    d_z,  # [M, C], in boxes of 64 by 128
    d_p, d_g,  # [C, C], in boxes of 64 by 128
    p_norm_in_weight,  # [C] or None, as the norms' other parameters are
    p_norm_in_bias,
    p_norm_out_weight,
    p_norm_out_bias,
    p_stats_in,  # fp32 [2, M]: of z
    p_stats_out,  # fp32 [2, M]: of x
    p_sums,  # fp32 [splits, 2 (p, g), C, C], written
    pairs,
    SLOTS: gl.constexpr,  # for tiles of as many blocks of pairs
    REGISTERS: gl.constexpr,  # of a thread that multiplies
    HALVES: gl.constexpr,  # layout in shared memory of 64 by 64
    LINE: gl.constexpr,  # and of 64 numbers
):  # fmt: skip
    """As ``weights_out_kernel``; one program for each split."""
    BAR: gl.constexpr = mbarrier.MBarrierLayout()
    dtype: gl.constexpr = d_z.dtype
    s_p = gl.allocate_shared_memory(dtype, [2, OUTS, C], d_p.layout)
    s_g = gl.allocate_shared_memory(dtype, [2, OUTS, C], d_g.layout)
    s_z = gl.allocate_shared_memory(dtype, [SLOTS, PAIRS, C], d_z.layout)
    s_x = gl.allocate_shared_memory(dtype, [SLOTS, C, PAIRS], d_x.layout)
    s_grad = gl.allocate_shared_memory(dtype, [SLOTS, PAIRS, C], d_grad.layout)
    s_stats = gl.allocate_shared_memory(gl.float32, [4 * SLOTS, PAIRS], LINE)
    full = gl.allocate_shared_memory(gl.int64, [SLOTS, 1], BAR)
    ready = gl.allocate_shared_memory(gl.int64, [SLOTS, 1], BAR)
    empty = gl.allocate_shared_memory(gl.int64, [SLOTS, 1], BAR)
    full_weights = gl.allocate_shared_memory(gl.int64, [1], BAR)
    turns = gl.allocate_shared_memory(gl.int64, [2, 1], BAR)
    for i in gl.static_range(SLOTS):
        mbarrier.init(full.index(i), 2)
        mbarrier.init(ready.index(i), 1)
        mbarrier.init(empty.index(i), 2)
    for i in gl.static_range(2):
        mbarrier.init(turns.index(i), 1)
    mbarrier.init(full_weights, 1)
    # Arguments are written out for each role: a tuple kept under a name loses its constants.
    gl.warp_specialize(
        [
            (_normalise, (
                p_norm_in_weight, p_norm_in_bias, p_norm_out_weight, p_norm_out_bias, s_z, s_x,
                s_stats, full, ready, pairs, gl.constexpr(False), gl.constexpr(1), SLOTS,
            )),
            (_sum, (
                gl.constexpr(0), p_sums, s_p, s_g, s_z, s_x, s_grad, full, ready, empty,
                full_weights, turns, pairs, gl.constexpr(1), SLOTS, HALVES,
            )),
            (_sum, (
                gl.constexpr(1), p_sums, s_p, s_g, s_z, s_x, s_grad, full, ready, empty,
                full_weights, turns, pairs, gl.constexpr(1), SLOTS, HALVES,
            )),
            (_fetch, (
                d_grad, d_z, d_x, d_p, d_g, None, p_stats_in, p_stats_out, s_p, s_g, s_z, s_x,
                s_grad, s_stats, full, empty, full_weights, pairs, 0, gl.constexpr(1), SLOTS,
            )),
        ],
        [4, 4, 1],
        [REGISTERS, REGISTERS, FETCHING],
    )  # fmt: skip


@gluon.jit
def hopper_weights_in_kernel(
    d_edges,  # [2 C + gap, M], in boxes of 128 by 64: gradients of a, then, behind a gap, of b
    d_z,  # [M, C], in boxes of 64 by 128
    d_p, d_g,  # [2 C, C], in boxes of 64 by 128
    p_mask,  # bool [M] or None
    p_norm_weight,  # [C] or None
    p_norm_bias,  # [C] or None
    p_stats,  # fp32 [2, M]: of z
    p_sums,  # fp32 [splits, 2 (p, g), 2 C, C], written
    pairs,
    gap,
    SLOTS: gl.constexpr,  # for tiles of as many blocks of pairs
    REGISTERS: gl.constexpr,  # of a thread that multiplies
    HALVES: gl.constexpr,  # layout in shared memory of 64 by 64
    LINE: gl.constexpr,  # and of 64 numbers
):  # fmt: skip
    """As ``weights_in_kernel``; two programs for each split, side by side."""
    BAR: gl.constexpr = mbarrier.MBarrierLayout()
    dtype: gl.constexpr = d_z.dtype
    s_p = gl.allocate_shared_memory(dtype, [2, OUTS, C], d_p.layout)
    s_g = gl.allocate_shared_memory(dtype, [2, OUTS, C], d_g.layout)
    s_z = gl.allocate_shared_memory(dtype, [SLOTS, PAIRS, C], d_z.layout)
    s_grad = gl.allocate_shared_memory(dtype, [SLOTS, C, PAIRS], d_edges.layout)
    s_stats = gl.allocate_shared_memory(gl.float32, [2 * SLOTS, PAIRS], LINE)
    full = gl.allocate_shared_memory(gl.int64, [SLOTS, 1], BAR)
    ready = gl.allocate_shared_memory(gl.int64, [SLOTS, 1], BAR)
    empty = gl.allocate_shared_memory(gl.int64, [SLOTS, 1], BAR)
    full_weights = gl.allocate_shared_memory(gl.int64, [1], BAR)
    turns = gl.allocate_shared_memory(gl.int64, [2, 1], BAR)
    for i in gl.static_range(SLOTS):
        mbarrier.init(full.index(i), 2)
        mbarrier.init(ready.index(i), 1)
        mbarrier.init(empty.index(i), 2)
    for i in gl.static_range(2):
        mbarrier.init(turns.index(i), 1)
    mbarrier.init(full_weights, 1)
    gl.warp_specialize(
        [
            (_normalise, (
                p_norm_weight, p_norm_bias, None, None, s_z, None, s_stats, full, ready, pairs,
                gl.constexpr(p_mask is not None), gl.constexpr(2), SLOTS,
            )),
            (_sum, (
                gl.constexpr(0), p_sums, s_p, s_g, s_z, None, s_grad, full, ready, empty,
                full_weights, turns, pairs, gl.constexpr(2), SLOTS, HALVES,
            )),
            (_sum, (
                gl.constexpr(1), p_sums, s_p, s_g, s_z, None, s_grad, full, ready, empty,
                full_weights, turns, pairs, gl.constexpr(2), SLOTS, HALVES,
            )),
            (_fetch, (
                d_edges, d_z, None, d_p, d_g, p_mask, p_stats, None, s_p, s_g, s_z, None,
                s_grad, s_stats, full, empty, full_weights, pairs, gap, gl.constexpr(2), SLOTS,
            )),
        ],
        [4, 4, 1],
        [REGISTERS, REGISTERS, FETCHING],
    )  # fmt: skip

"""The gradients of the transition's weights on Hopper's own instructions (Gluon).

What :mod:`~megafold.ops.transition.weights` leaves, of rows alone: nothing hidden is read, each
program computes its own again. It has a block of hidden units, whose weights stay in shared memory,
and adds up over a share of the rows, 64 at a time. One warp fetches rows by TMA; two groups of four
warps take them in turn. A group computes the gradients of gate and value of its own rows, and the
activation, and puts them into shared memory; there both groups multiply them with the rows: one has
the sums for gate, the other those for value, and each those for half of the output's channels.

Groups issue products in turn, each of them in one go: of the other's rows, of its own, and the
first ones of its next rows, in whose time the other has its activation to compute.
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

from megafold.ops.gluon import barrier, following, halves, sigmoid
from megafold.ops.transition.hopper_forward import BYTES, FETCHING, ROWS, C

GROUPS = gl.constexpr(2)
UNITS = gl.constexpr(64)  # hidden units of a program


@gluon.jit
def _fetch(
    d_normalised, d_grad, d_gate, d_value, d_out, s_n, s_grad, s_pair, s_out, full, empty,
    full_weights, unit, first, last, STAGES: gl.constexpr,
):  # fmt: skip
    """The warp that fetches: weights once, then rows of one group and of the other."""
    box: gl.constexpr = d_gate.block_shape
    boxes = s_pair.index(0)._reinterpret(s_pair.dtype, [4, box[0], box[1]], d_gate.layout)
    mbarrier.expect(full_weights, 3 * UNITS * C * 2)
    for half in gl.static_range(2):  # of the channels
        at = [unit, half * (C // 2)]
        tma.async_copy_global_to_shared(d_gate, at, full_weights, boxes.index(2 * half))
        tma.async_copy_global_to_shared(d_value, at, full_weights, boxes.index(2 * half + 1))
    tma.async_copy_global_to_shared(d_out, [0, unit], full_weights, s_out.index(0))
    s, in_s = 0, 0
    for tile in range(first, last):
        for g in gl.static_range(GROUPS):
            i = s * GROUPS + g
            i_row = (tile * GROUPS + g) * ROWS  # past the last row zeros are read
            mbarrier.wait(empty.index(i), in_s ^ 1)
            bar = full.index(i)
            mbarrier.expect(bar, 2 * BYTES)
            tma.async_copy_global_to_shared(d_normalised, [i_row, 0], bar, s_n.index(i))
            tma.async_copy_global_to_shared(d_grad, [i_row, 0], bar, s_grad.index(i))
        s, in_s = following(s, in_s, STAGES)


@gluon.jit
def _sum(
    g: gl.constexpr, d_half, p_partial, s_n, s_grad, s_pair, s_out, s_dg, s_dv, s_h,
    full, empty, full_weights, turns, count, hidden, STAGES: gl.constexpr,
):  # fmt: skip
    """One group of four warps."""
    ACC: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], instr_shape=[16, C, 16])
    HALF: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], instr_shape=[16, UNITS, 16])
    OTHER: gl.constexpr = 1 - g
    dtype: gl.constexpr = s_n.dtype
    s_left = s_dg if g == 0 else s_dv
    of_own = gl.zeros([UNITS, C], gl.float32, ACC)  # the weight of gate, or of value
    of_out = gl.zeros([UNITS, C // 2], gl.float32, HALF)  # the output's, transposed
    zero = gl.zeros([ROWS, 2 * UNITS], gl.float32, ACC)
    zero_h = gl.zeros([ROWS, UNITS], gl.float32, HALF)
    s, in_s = 0, 0
    mbarrier.wait(full_weights, 0)
    mbarrier.wait(full.index(g), 0, count > 0)
    both = s_pair.index(0).permute((1, 0))
    pair = warpgroup_mma(s_n.index(g), both, zero, use_acc=False, is_async=True)
    dh = warpgroup_mma(s_grad.index(g), s_out.index(0), zero_h, use_acc=False, is_async=True)
    pair, dh = warpgroup_mma_wait(0, deps=(pair, dh))
    for tile in range(0, count):
        before = gl.where(s == 0, STAGES - 1, s - 1)
        in_before = gl.where(s == 0, in_s ^ 1, in_s)
        gate, value = halves(pair)
        gate, value = gl.convert_layout(gate, HALF), gl.convert_layout(value, HALF)
        sig = sigmoid(gate)
        silu = gate * sig
        h = (silu * value).to(dtype)
        # d silu(g) / dg = sigmoid(g) (1 + g (1 - sigmoid(g)))
        d_g = (dh * value * (sig + silu * (1.0 - sig))).to(dtype)
        d_v = (dh * silu).to(dtype)
        # Both have multiplied what was there: the gradients of the group's rows before.
        mbarrier.wait(empty.index(before * GROUPS + g), in_before)
        s_dg.index(g).store(d_g)
        s_dv.index(g).store(d_v)
        s_h.index(g).store(h)
        fence_async_shared()
        barrier()
        # What the first group multiplies at first, when the other has no rows yet, is dropped.
        if g == 0:
            mbarrier.wait(turns.index(0), (tile & 1) ^ 1)
            i_other = before * GROUPS + 1
            in_other = in_before
            release = tile > 0
        else:
            mbarrier.wait(turns.index(1), tile & 1)
            i_other = s * GROUPS
            in_other = in_s
            release = True
        mbarrier.wait(full.index(i_other), in_other, release)
        i = s * GROUPS + g
        t_grad = s_grad.index(i_other)._reinterpret(dtype, [2, ROWS, C // 2], d_half.layout)
        of_own = warpgroup_mma(
            s_left.index(OTHER).permute((1, 0)), s_n.index(i_other), of_own, is_async=True
        )  # fmt: skip
        of_out = warpgroup_mma(
            s_h.index(OTHER).permute((1, 0)), t_grad.index(g), of_out, is_async=True
        )  # fmt: skip
        t_grad = s_grad.index(i)._reinterpret(dtype, [2, ROWS, C // 2], d_half.layout)
        of_own = warpgroup_mma(
            s_left.index(g).permute((1, 0)), s_n.index(i), of_own, use_acc=release, is_async=True
        )  # fmt: skip
        of_out = warpgroup_mma(
            s_h.index(g).permute((1, 0)), t_grad.index(g), of_out, use_acc=release, is_async=True
        )  # fmt: skip
        s, in_s = following(s, in_s, STAGES)
        i_next = s * GROUPS + g
        mbarrier.wait(full.index(i_next), in_s, tile + 1 < count)  # after the last: not used
        none = s // STAGES  # 0, which the compiler must not know: what it knows it keeps, or spills
        t_pair = s_pair.index(none).permute((1, 0))
        t_out = s_out.index(none)
        pair = warpgroup_mma(s_n.index(i_next), t_pair, zero, use_acc=False, is_async=True)
        dh = warpgroup_mma(s_grad.index(i_next), t_out, zero_h, use_acc=False, is_async=True)
        mbarrier.arrive(turns.index(OTHER))
        of_own, of_out, pair, dh = warpgroup_mma_wait(4, deps=(of_own, of_out, pair, dh))
        mbarrier.arrive(empty.index(i_other), pred=release)
        of_own, of_out, pair, dh = warpgroup_mma_wait(2, deps=(of_own, of_out, pair, dh))
        mbarrier.arrive(empty.index(i))
        of_own, of_out, pair, dh = warpgroup_mma_wait(0, deps=(of_own, of_out, pair, dh))
    if g == 0 and count > 0:  # the other's last rows
        mbarrier.wait(turns.index(0), (count & 1) ^ 1)
        i_other = gl.where(s == 0, STAGES - 1, s - 1) * GROUPS + 1
        mbarrier.wait(full.index(i_other), gl.where(s == 0, in_s ^ 1, in_s))
        t_grad = s_grad.index(i_other)._reinterpret(dtype, [2, ROWS, C // 2], d_half.layout)
        of_own = warpgroup_mma(
            s_left.index(1).permute((1, 0)), s_n.index(i_other), of_own, is_async=True
        )  # fmt: skip
        of_out = warpgroup_mma(
            s_h.index(1).permute((1, 0)), t_grad.index(0), of_out, is_async=True
        )  # fmt: skip
        of_own, of_out = warpgroup_mma_wait(0, deps=(of_own, of_out))
    o_u = gl.arange(0, UNITS, gl.SliceLayout(1, ACC))
    o_c = gl.arange(0, C, gl.SliceLayout(0, ACC))
    gl.store(p_partial + g * hidden * C + o_u[:, None] * C + o_c[None, :], of_own)
    o_u = gl.arange(0, UNITS, gl.SliceLayout(1, HALF))
    o_c = g * (C // 2) + gl.arange(0, C // 2, gl.SliceLayout(0, HALF))
    gl.store(p_partial + 2 * hidden * C + o_u[:, None] * C + o_c[None, :], of_out)


@gluon.jit
def hopper_grad_weights_kernel(
    d_normalised,  # [M, C], in boxes of 64 by 128
    d_grad,  # [M, C], in boxes of 64 by 128: of the output
    d_gate, d_value,  # [H, C], in boxes of 64 by 64
    d_out,  # [C, H], in boxes of 128 by 64
    p_partial,  # fp32 [splits, 3 H, C], written: for gate, value, and output
    tiles,  # of 128 rows
    splits,  # that share them, each of H / 64 programs
    hidden,
    STAGES: gl.constexpr,  # tiles that there is room for: two or more
    REGISTERS: gl.constexpr,  # of a thread that computes
    PAIR: gl.constexpr,  # layout in shared memory of a tile of gate and value, 128 by 128
):  # fmt: skip
    """What ``grad_weights_kernel`` leaves, of what the kernel by rows would have written for it."""
    blocks = hidden // UNITS
    i_split = gl.program_id(0) // blocks  # neighbours share rows
    unit = gl.program_id(0) % blocks * UNITS
    first = i_split * tiles // splits
    last = (i_split + 1) * tiles // splits
    p_partial += (i_split.to(gl.int64) * (3 * hidden) + unit) * C

    BAR: gl.constexpr = mbarrier.MBarrierLayout()
    dtype: gl.constexpr = d_normalised.dtype
    SLOTS: gl.constexpr = STAGES * GROUPS
    s_n = gl.allocate_shared_memory(dtype, [SLOTS, ROWS, C], d_normalised.layout)
    s_grad = gl.allocate_shared_memory(dtype, [SLOTS, ROWS, C], d_grad.layout)
    s_pair = gl.allocate_shared_memory(dtype, [1, 2 * UNITS, C], PAIR)
    s_out = gl.allocate_shared_memory(dtype, [1, C, UNITS], d_out.layout)
    s_dg = gl.allocate_shared_memory(dtype, [GROUPS, ROWS, UNITS], d_gate.layout)
    s_dv = gl.allocate_shared_memory(dtype, [GROUPS, ROWS, UNITS], d_gate.layout)
    s_h = gl.allocate_shared_memory(dtype, [GROUPS, ROWS, UNITS], d_gate.layout)
    full = gl.allocate_shared_memory(gl.int64, [SLOTS, 1], BAR)
    empty = gl.allocate_shared_memory(gl.int64, [SLOTS, 1], BAR)
    full_weights = gl.allocate_shared_memory(gl.int64, [1], BAR)
    turns = gl.allocate_shared_memory(gl.int64, [GROUPS, 1], BAR)
    for i in gl.static_range(SLOTS):
        mbarrier.init(full.index(i), 1)
        mbarrier.init(empty.index(i), GROUPS)
    for i in gl.static_range(GROUPS):
        mbarrier.init(turns.index(i), 1)
    mbarrier.init(full_weights, 1)
    # Arguments are written out for each role: a tuple kept under a name loses its constants.
    gl.warp_specialize(
        [
            (_sum, (
                gl.constexpr(0), d_gate, p_partial, s_n, s_grad, s_pair, s_out, s_dg, s_dv, s_h,
                full, empty, full_weights, turns, last - first, hidden, STAGES,
            )),
            (_sum, (
                gl.constexpr(1), d_gate, p_partial, s_n, s_grad, s_pair, s_out, s_dg, s_dv, s_h,
                full, empty, full_weights, turns, last - first, hidden, STAGES,
            )),
            (_fetch, (
                d_normalised, d_grad, d_gate, d_value, d_out, s_n, s_grad, s_pair, s_out, full,
                empty, full_weights, unit, first, last, STAGES,
            )),
        ],
        [4, 1],
        [REGISTERS, FETCHING],
    )  # fmt: skip

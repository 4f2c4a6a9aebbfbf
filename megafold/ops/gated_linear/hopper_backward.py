"""Gradients of a gated linear layer in one pass, on Hopper's own instructions (Gluon).

The kernel moves bytes: what counts is that tiles are always on their way, in and out. Programs
stay, one for each multiprocessor, with the weight in shared memory, and take 64 rows at a time.
Warps have roles. One warp fetches tiles of the gradient of the output, x and gate by TMA, STAGES
at a time. Where there is dropout four warps multiply the gradient by it in its place. And each of
two groups of four warps has 64 of the channels: the gradients of its part of x and gate, which take
the places of x and gate and leave from there by TMA; and its part of the weight's gradient, which
it holds in registers.

A group has everything as ``[channels, rows]``. So the gated x is an operand of the product that is
summed for the weight as it lies in registers, and groups exchange nothing.
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

C = gl.constexpr(128)  # channels, and outputs
PART = gl.constexpr(64)  # channels of a group
ROWS = gl.constexpr(64)  # of a tile
BYTES = gl.constexpr(64 * 128 * 2)  # of a tile
FETCHING = gl.constexpr(24)  # registers of a thread that fetches


@gluon.jit
def _place(tile, across, SIDE_I: gl.constexpr, SIDE_J: gl.constexpr):
    """Where a tile begins: i and j."""
    return tile // across * SIDE_I, tile % across * SIDE_J


@gluon.jit
def _fetch(
    d_grad, d_x, d_gate, d_weight, s_grad, s_x, s_gate, s_weight, full, empty, full_weight,
    tiles, across, SIDE_I: gl.constexpr, SIDE_J: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """The warp that fetches."""
    mbarrier.expect(full_weight, 2 * BYTES)
    for w in gl.static_range(2):
        at_w = [0, w * PART]
        tma.async_copy_global_to_shared(d_weight, at_w, full_weight, s_weight.index(w))
    s, in_s = 0, 0
    for tile in range(gl.program_id(0), tiles, gl.num_programs(0)):
        i, j = _place(tile, across, SIDE_I, SIDE_J)
        bar = full.index(s)
        mbarrier.wait(empty.index(s), in_s ^ 1)
        mbarrier.expect(bar, 3 * BYTES)
        tma.async_copy_global_to_shared(d_grad, [i, j, 0], bar, s_grad.index(s))
        tma.async_copy_global_to_shared(d_gate, [i, j, 0], bar, s_gate.index(s))
        tma.async_copy_global_to_shared(d_x, [i, j, 0], bar, s_x.index(s))
        s, in_s = following(s, in_s, STAGES)


@gluon.jit
def _drop(
    p_dropout, s_grad, full, ready, dropout_i, dropout_j, outer, inner, tiles, across,
    SIDE_I: gl.constexpr, SIDE_J: gl.constexpr, STAGES: gl.constexpr, HALVES: gl.constexpr,
):  # fmt: skip
    """The four warps that multiply the gradient of the output by what dropout multiplies by."""
    if p_dropout is not None:
        # Eight threads read a line of 64 numbers: all banks of shared memory.
        LINES: gl.constexpr = gl.BlockedLayout([1, 8], [2, 16], [4, 1], [1, 0])
        dtype: gl.constexpr = s_grad.dtype
        o_m = gl.arange(0, ROWS, gl.SliceLayout(1, LINES))
        o_o = gl.arange(0, C, gl.SliceLayout(0, LINES))
        s, in_s = 0, 0
        for tile in range(gl.program_id(0), tiles, gl.num_programs(0)):
            i, j = _place(tile, across, SIDE_I, SIDE_J)
            o_i, o_j = i + o_m // SIDE_J, j + o_m % SIDE_J
            o = o_i.to(gl.int64) * dropout_i + o_j.to(gl.int64) * dropout_j
            there = (o_i < outer) & (o_j < inner)
            # Asked for before the gradient is there.
            p = p_dropout + (o[:, None] + o_o[None, :])
            by = gl.load(p, mask=there[:, None], other=0.0)
            mbarrier.wait(full.index(s), in_s)
            t = s_grad.index(s)._reinterpret(dtype, [ROWS, C], HALVES)
            t.store((t.load(LINES).to(gl.float32) * by.to(gl.float32)).to(dtype))
            fence_async_shared()
            barrier()
            mbarrier.arrive(ready.index(s))
            s, in_s = following(s, in_s, STAGES)


@gluon.jit
def _multiply(
    w: gl.constexpr, d_grad_x, d_grad_gate, p_products, s_grad, s_x, s_gate, s_weight, full, ready,
    empty, full_weight, tiles, across, DROPOUT: gl.constexpr, SIDE_I: gl.constexpr,
    SIDE_J: gl.constexpr, STAGES: gl.constexpr, HALVES: gl.constexpr,
):  # fmt: skip
    """One of the two groups of four warps that multiply: 64 of the channels."""
    OF: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], instr_shape=[16, ROWS, 16])
    SUM: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], instr_shape=[16, C, 16])
    LEFT: gl.constexpr = gl.DotOperandLayout(0, SUM, k_width=2)
    dtype: gl.constexpr = s_grad.dtype
    weight = s_weight.index(w).permute((1, 0))
    total = gl.zeros([PART, C], gl.float32, SUM)
    s, in_s = 0, 0
    mbarrier.wait(full_weight, 0)
    for tile in range(gl.program_id(0), tiles, gl.num_programs(0)):
        i, j = _place(tile, across, SIDE_I, SIDE_J)
        parts_x = s_x.index(s)._reinterpret(dtype, [2, ROWS, PART], HALVES)
        parts_gate = s_gate.index(s)._reinterpret(dtype, [2, ROWS, PART], HALVES)
        t_x = parts_x.index(w).permute((1, 0))
        t_gate = parts_gate.index(w).permute((1, 0))
        grad = s_grad.index(s)._reinterpret(dtype, [ROWS, C], HALVES)
        mbarrier.wait(full.index(s), in_s)
        if DROPOUT:
            mbarrier.wait(ready.index(s), in_s)
        of_gated = gl.zeros([PART, ROWS], gl.float32, OF)
        of_gated = warpgroup_mma(
            weight, grad.permute((1, 0)), of_gated, use_acc=False, is_async=True
        )
        gate = sigmoid(t_gate.load(OF).to(gl.float32))
        gated = (t_x.load(OF).to(gl.float32) * gate).to(dtype)
        left = gl.convert_layout(gated, LEFT)
        total = warpgroup_mma(left, grad, total, is_async=True)
        # The place of the rows before, from where by now TMA has taken what was left there.
        tma.store_wait(0)
        last = gl.where(s == 0, STAGES - 1, s - 1)
        mbarrier.arrive(empty.index(last), pred=tile >= gl.num_programs(0))
        of_gated = warpgroup_mma_wait(1, deps=(of_gated,))
        t_x.store((of_gated * gate).to(dtype))
        t_gate.store((of_gated * (gated.to(gl.float32) * (1.0 - gate))).to(dtype))
        fence_async_shared()
        barrier()
        box_x = s_x.index(s)._reinterpret(dtype, [2, SIDE_I, SIDE_J, PART], d_grad_x.layout)
        tma.async_copy_shared_to_global(d_grad_x, [i, j, w * PART], box_x.index(w))
        box_gate = s_gate.index(s)._reinterpret(dtype, [2, SIDE_I, SIDE_J, PART], d_grad_x.layout)
        tma.async_copy_shared_to_global(d_grad_gate, [i, j, w * PART], box_gate.index(w))
        total, left = warpgroup_mma_wait(0, deps=(total, left))
        s, in_s = following(s, in_s, STAGES)
    tma.store_wait(0)
    o_c = w * PART + gl.arange(0, PART, gl.SliceLayout(1, SUM))
    o_o = gl.arange(0, C, gl.SliceLayout(0, SUM))
    p = p_products + gl.program_id(0).to(gl.int64) * (C * C)
    gl.store(p + (o_o[None, :] * C + o_c[:, None]), total)


@gluon.jit
def hopper_backward_kernel(
    d_grad,  # [I, J, O], in boxes of SIDE_I by SIDE_J by 128
    d_x,  # [I, J, C], in boxes of SIDE_I by SIDE_J by 128
    d_gate,  # [I, J, C], in boxes of SIDE_I by SIDE_J by 128: before its sigmoid
    d_weight,  # [O, C], in boxes of 128 by 64
    d_grad_x,  # [I, J, C], in boxes of SIDE_I by SIDE_J by 64, written
    d_grad_gate,  # [I, J, C], in boxes of SIDE_I by SIDE_J by 64, written
    p_dropout,  # [I, J, O], neighbours along O; or None
    p_products,  # fp32 [programs, O, C], written: the weight's gradient by each
    dropout_i,  # strides
    dropout_j,
    outer,  # I
    inner,  # J
    tiles,
    across,  # of which along J
    SIDE_I: gl.constexpr,
    SIDE_J: gl.constexpr,
    STAGES: gl.constexpr,  # tiles of each kind that are in shared memory
    REGISTERS: gl.constexpr,  # of a thread that multiplies
    HALVES: gl.constexpr,  # layout in shared memory of rows by 64
):
    """As ``backward_kernel``, all gradients; programs stay, and take one tile after another."""
    BAR: gl.constexpr = mbarrier.MBarrierLayout()
    dtype: gl.constexpr = d_x.dtype
    s_weight = gl.allocate_shared_memory(dtype, [2, C, PART], d_weight.layout)
    s_grad = gl.allocate_shared_memory(dtype, [STAGES, SIDE_I, SIDE_J, C], d_grad.layout)
    s_x = gl.allocate_shared_memory(dtype, [STAGES, SIDE_I, SIDE_J, C], d_x.layout)
    s_gate = gl.allocate_shared_memory(dtype, [STAGES, SIDE_I, SIDE_J, C], d_gate.layout)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BAR)
    ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BAR)
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BAR)
    full_weight = gl.allocate_shared_memory(gl.int64, [1], BAR)
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), 1)
        mbarrier.init(ready.index(i), 1)
        mbarrier.init(empty.index(i), 2)
    mbarrier.init(full_weight, 1)
    # Arguments are written out for each role: a tuple kept under a name loses its constants.
    gl.warp_specialize(
        [
            (_drop, (
                p_dropout, s_grad, full, ready, dropout_i, dropout_j, outer, inner, tiles, across,
                SIDE_I, SIDE_J, STAGES, HALVES,
            )),
            (_multiply, (
                gl.constexpr(0), d_grad_x, d_grad_gate, p_products, s_grad, s_x, s_gate, s_weight,
                full, ready, empty, full_weight, tiles, across,
                gl.constexpr(p_dropout is not None), SIDE_I, SIDE_J, STAGES, HALVES,
            )),
            (_multiply, (
                gl.constexpr(1), d_grad_x, d_grad_gate, p_products, s_grad, s_x, s_gate, s_weight,
                full, ready, empty, full_weight, tiles, across,
                gl.constexpr(p_dropout is not None), SIDE_I, SIDE_J, STAGES, HALVES,
            )),
            (_fetch, (
                d_grad, d_x, d_gate, d_weight, s_grad, s_x, s_gate, s_weight, full, empty,
                full_weight, tiles, across, SIDE_I, SIDE_J, STAGES,
            )),
        ],
        [4, 4, 1],
        [REGISTERS, REGISTERS, FETCHING],
    )  # fmt: skip

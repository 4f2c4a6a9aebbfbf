"""The transition backward by rows on Hopper's own instructions (Gluon).

The gradient of x and sums for the norm's parameters, in the roles of
:mod:`~megafold.ops.transition.hopper_forward`: one warp fetches weights, and each of two groups of
four warps has 64 rows of its own, whose normalised x and gradient are operands in shared memory.
The gradients of gate and value are an operand in registers; nothing hidden reaches memory. Where a
group's operands are no longer needed it fetches x again, for the gradient through the norm, and its
next rows; with the residual x has a place of its own, and the gradient of the output stays to be
added to that of x. Normalised rows are left for :mod:`~megafold.ops.transition.hopper_weights`.
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
from megafold.ops.transition.hopper_forward import BYTES, FETCHING, ROWS, C, fetch

GROUPS = gl.constexpr(2)
UNITS = gl.constexpr(64)  # hidden units of a block
# Sums of rows, four of a warp's lanes' each, and the channel that a thread adds them up for.
CHANNEL = gl.constexpr(gl.BlockedLayout([32, 1], [1, 32], [1, 4], [1, 0]))
SPREAD = gl.constexpr(gl.SwizzledSharedLayout(8, 1, 8, order=[1, 0]))


@gluon.jit
def _normalise(
    t_n, p_norm_weight, p_norm_bias, p_stats, i_row, rows, stride_stats, LINES: gl.constexpr
):
    """Put normalised rows in the place of x."""
    i_m = i_row + gl.arange(0, ROWS, gl.SliceLayout(1, LINES))
    o_c = gl.arange(0, C, gl.SliceLayout(0, LINES))
    mean = gl.load(p_stats + i_m, mask=i_m < rows, other=0.0)
    inverse = gl.load(p_stats + stride_stats + i_m, mask=i_m < rows, other=0.0)
    x = (t_n.load(LINES).to(gl.float32) - mean[:, None]) * inverse[:, None]
    if p_norm_weight is not None:
        x = x * gl.load(p_norm_weight + o_c).to(gl.float32)[None, :]
    if p_norm_bias is not None:
        x = x + gl.load(p_norm_bias + o_c).to(gl.float32)[None, :]
    t_n.store(x.to(t_n.dtype))


@gluon.jit
def _by_channel(rows, t_sum):
    """Sum of all rows: of a thread its own two, then 32 by the thread that has the channel."""
    part = gl.reshape(gl.sum(gl.reshape(rows, (4, 2, 8, C)), 1), (32, C))
    barrier()  # what was there is read
    t_sum.store(part)
    barrier()
    return gl.sum(t_sum.load(CHANNEL), 0)


@gluon.jit
def _through_norm(
    dn, t_x, t_grad, p_norm_weight, p_stats, of_weight, of_bias, i_row, rows, stride_stats,
    SUMS: gl.constexpr, RESIDUAL: gl.constexpr, ACC: gl.constexpr,
):  # fmt: skip
    """Leave the gradient of x in its place; the sums for the norm's parameters and these rows'."""
    i_m = i_row + gl.arange(0, ROWS, gl.SliceLayout(1, ACC))
    o_c = gl.arange(0, C, gl.SliceLayout(0, ACC))
    mean = gl.load(p_stats + i_m, mask=i_m < rows, other=0.0)
    inverse = gl.load(p_stats + stride_stats + i_m, mask=i_m < rows, other=0.0)
    x = t_x.load(ACC)  # in 16 bits: so registers suffice
    if SUMS:
        t_sum = t_x._reinterpret(gl.float32, [32, C], SPREAD)
        of_bias += _by_channel(dn, t_sum)
        hat = (x.to(gl.float32) - mean[:, None]) * inverse[:, None]
        of_weight += _by_channel(dn * hat, t_sum)
        barrier()
    hat = (x.to(gl.float32) - mean[:, None]) * inverse[:, None]
    if p_norm_weight is not None:
        dn = dn * gl.load(p_norm_weight + o_c).to(gl.float32)[None, :]
    of_mean = gl.sum(dn, 1) * (1.0 / C)
    along = gl.sum(dn * hat, 1) * (1.0 / C)
    grad_x = (dn - of_mean[:, None] - hat * along[:, None]) * inverse[:, None]
    if RESIDUAL:
        grad_x += t_grad.load(ACC).to(gl.float32)
    t_x.store(grad_x.to(t_x.dtype))
    return of_weight, of_bias


@gluon.jit
def _gradients(
    g: gl.constexpr, d_x, d_grad, d_grad_x, d_normalised, p_norm_weight, p_norm_bias,
    p_stats, p_sums, s_n, s_grad, s_x, s_pair, s_out,
    full_n, full_grad, full_pair, empty_pair, full_out, empty_out, rows, hidden, stride_stats,
    PAIRS: gl.constexpr, OUTS: gl.constexpr, RESIDUAL: gl.constexpr, LINES: gl.constexpr,
):  # fmt: skip
    """One group of four warps."""
    ACC: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], instr_shape=[16, C, 16])
    HALF: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], instr_shape=[16, UNITS, 16])
    LEFT: gl.constexpr = gl.DotOperandLayout(0, ACC, k_width=2)
    dtype: gl.constexpr = s_n.dtype
    t_n = s_n.index(g)
    t_grad = s_grad.index(g)
    t_x = s_x.index(g)  # x again, then its gradient
    bar_n = full_n.index(g)
    bar_grad = full_grad.index(g)
    in_n, in_grad = 0, 0
    p, in_p = 0, 0
    o, in_o = 0, 0
    of_weight = gl.zeros([C], gl.float32, gl.SliceLayout(0, CHANNEL))
    of_bias = gl.zeros([C], gl.float32, gl.SliceLayout(0, CHANNEL))
    step = gl.num_programs(0) * (GROUPS * ROWS)
    start = gl.program_id(0) * (GROUPS * ROWS)
    mbarrier.expect(bar_n, BYTES)
    tma.async_copy_global_to_shared(d_x, [start + g * ROWS, 0], bar_n, t_n)
    mbarrier.expect(bar_grad, BYTES)
    tma.async_copy_global_to_shared(d_grad, [start + g * ROWS, 0], bar_grad, t_grad)
    for first in range(start, rows, step):
        i_row = first + g * ROWS  # past the last row zeros are read, and nothing is stored
        more = first + step < rows
        mbarrier.wait(bar_n, in_n)
        in_n ^= 1
        if p_stats is not None:
            _normalise(t_n, p_norm_weight, p_norm_bias, p_stats, i_row, rows, stride_stats, LINES)
            fence_async_shared()
            barrier()
            tma.async_copy_shared_to_global(d_normalised, [i_row, 0], t_n)
        mbarrier.wait(bar_grad, in_grad)
        in_grad ^= 1
        dn = gl.zeros([ROWS, C], gl.float32, ACC)
        for unit in range(0, hidden, UNITS):
            zero = gl.zeros([ROWS, 2 * UNITS], gl.float32, ACC)
            zero_h = gl.zeros([ROWS, UNITS], gl.float32, HALF)
            t_pair = s_pair.index(p)
            mbarrier.wait(full_pair.index(p), in_p)
            pair = warpgroup_mma(t_n, t_pair.permute((1, 0)), zero, use_acc=False, is_async=True)
            mbarrier.wait(full_out.index(o), in_o)
            dh = warpgroup_mma(t_grad, s_out.index(o), zero_h, use_acc=False, is_async=True)
            pair, dh = warpgroup_mma_wait(0, deps=(pair, dh))
            mbarrier.arrive(empty_out.index(o))
            o, in_o = following(o, in_o, OUTS)
            if unit + UNITS >= hidden:  # both operands have been multiplied for the last time
                tma.store_wait(0)
                barrier()
                if p_stats is not None:
                    mbarrier.expect(bar_grad, BYTES)
                    tma.async_copy_global_to_shared(d_x, [i_row, 0], bar_grad, t_x)
                mbarrier.expect(bar_n, BYTES, pred=more)
                tma.async_copy_global_to_shared(d_x, [i_row + step, 0], bar_n, t_n, pred=more)
            gate, value = halves(pair)
            gate, value = gl.convert_layout(gate, HALF), gl.convert_layout(value, HALF)
            s = sigmoid(gate)
            silu = gate * s
            # d silu(g) / dg = sigmoid(g) (1 + g (1 - sigmoid(g)))
            d_g = (dh * value * (s + silu * (1.0 - s))).to(dtype)
            d_v = (dh * silu).to(dtype)
            both = gl.reshape(gl.permute(gl.join(d_g, d_v), (0, 2, 1)), (ROWS, 2 * UNITS))
            left = gl.convert_layout(both, LEFT)
            dn = warpgroup_mma(left, t_pair, dn, is_async=True)
            dn, left = warpgroup_mma_wait(0, deps=(dn, left))
            mbarrier.arrive(empty_pair.index(p))
            p, in_p = following(p, in_p, PAIRS)
        if p_stats is not None:
            mbarrier.wait(bar_grad, in_grad)
            in_grad ^= 1
            of_weight, of_bias = _through_norm(
                dn, t_x, t_grad, p_norm_weight, p_stats, of_weight, of_bias, i_row, rows,
                stride_stats, p_sums is not None, RESIDUAL, ACC,
            )  # fmt: skip
        else:
            if RESIDUAL:
                dn += t_grad.load(ACC).to(gl.float32)
            t_x.store(dn.to(dtype))
        fence_async_shared()
        tma.async_copy_shared_to_global(d_grad_x, [i_row, 0], t_x)
        if not RESIDUAL:  # or the gradient has a place of its own, and need not be gone
            tma.store_wait(0)
        barrier()
        mbarrier.expect(bar_grad, BYTES, pred=more)
        tma.async_copy_global_to_shared(d_grad, [i_row + step, 0], bar_grad, t_grad, pred=more)
    if RESIDUAL:
        tma.store_wait(0)
    if p_sums is not None:
        o_c = gl.arange(0, C, gl.SliceLayout(0, CHANNEL))
        p_own = p_sums + (gl.program_id(0) * GROUPS + g) * (2 * C) + o_c
        gl.store(p_own, of_weight)
        gl.store(p_own + C, of_bias)


@gluon.jit
def hopper_grad_rows_kernel(
    d_x,  # [M, C], in boxes of 64 by 128
    d_gate, d_value,  # [H, C], in boxes of 64 by 64
    d_out,  # [C, H], in boxes of 128 by 64
    d_grad,  # [M, C], in boxes of 64 by 128, as all that follow: of the output
    d_grad_x,  # written
    d_normalised,  # written; None without a norm
    p_norm_weight,  # [C] or None
    p_norm_bias,  # [C] or None
    p_stats,  # fp32 [2, M]: mean, and one over the standard deviation; None: no norm
    p_sums,  # fp32 [2 programs, 2, C], written: for the norm's weight and bias; or None
    rows,
    hidden,
    stride_stats,  # from a row's mean to its inverse deviation
    PAIRS: gl.constexpr,  # tiles of gate and value that are fetched ahead
    OUTS: gl.constexpr,  # and of the output
    REGISTERS: gl.constexpr,  # of a thread that computes
    RESIDUAL: gl.constexpr,  # whether the gradient of the output is added
    PAIR: gl.constexpr,  # layout in shared memory of a tile of gate and value, 128 by 128
    LINES: gl.constexpr,  # layout in registers of rows to be normalised
):  # fmt: skip
    """What the kernel of ``backward`` leaves, but what is hidden."""
    BAR: gl.constexpr = mbarrier.MBarrierLayout()
    dtype: gl.constexpr = d_x.dtype
    s_n = gl.allocate_shared_memory(dtype, [GROUPS, ROWS, C], d_x.layout)
    s_grad = gl.allocate_shared_memory(dtype, [GROUPS, ROWS, C], d_x.layout)
    s_x = s_grad  # one place for what is not needed at once
    if RESIDUAL:
        s_x = gl.allocate_shared_memory(dtype, [GROUPS, ROWS, C], d_x.layout)
    s_pair = gl.allocate_shared_memory(dtype, [PAIRS, 2 * UNITS, C], PAIR)
    s_out = gl.allocate_shared_memory(dtype, [OUTS, C, UNITS], d_out.layout)
    full_n = gl.allocate_shared_memory(gl.int64, [GROUPS, 1], BAR)
    full_grad = gl.allocate_shared_memory(gl.int64, [GROUPS, 1], BAR)
    full_pair = gl.allocate_shared_memory(gl.int64, [PAIRS, 1], BAR)
    empty_pair = gl.allocate_shared_memory(gl.int64, [PAIRS, 1], BAR)
    full_out = gl.allocate_shared_memory(gl.int64, [OUTS, 1], BAR)
    empty_out = gl.allocate_shared_memory(gl.int64, [OUTS, 1], BAR)
    for i in gl.static_range(GROUPS):
        mbarrier.init(full_n.index(i), 1)
        mbarrier.init(full_grad.index(i), 1)
    for i in gl.static_range(PAIRS):
        mbarrier.init(full_pair.index(i), 1)
        mbarrier.init(empty_pair.index(i), GROUPS)
    for i in gl.static_range(OUTS):
        mbarrier.init(full_out.index(i), 1)
        mbarrier.init(empty_out.index(i), GROUPS)
    # Arguments are written out for each role: a tuple kept under a name loses its constants.
    gl.warp_specialize(
        [
            (_gradients, (
                gl.constexpr(0), d_x, d_grad, d_grad_x, d_normalised, p_norm_weight,
                p_norm_bias, p_stats, p_sums, s_n, s_grad, s_x, s_pair, s_out, full_n, full_grad,
                full_pair, empty_pair, full_out, empty_out, rows, hidden, stride_stats, PAIRS,
                OUTS, RESIDUAL, LINES,
            )),
            (_gradients, (
                gl.constexpr(1), d_x, d_grad, d_grad_x, d_normalised, p_norm_weight,
                p_norm_bias, p_stats, p_sums, s_n, s_grad, s_x, s_pair, s_out, full_n, full_grad,
                full_pair, empty_pair, full_out, empty_out, rows, hidden, stride_stats, PAIRS,
                OUTS, RESIDUAL, LINES,
            )),
            (fetch, (
                d_gate, d_value, d_out, s_pair, s_out, full_pair, empty_pair, full_out,
                empty_out, rows, hidden, GROUPS, UNITS, PAIRS, OUTS,
            )),
        ],
        [4, 1],
        [REGISTERS, FETCHING],
    )  # fmt: skip

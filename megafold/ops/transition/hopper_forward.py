"""The transition's forward pass on Hopper's own instructions (Gluon).

As :mod:`~megafold.ops.transition.forward`, nothing hidden reaches memory, but warps have roles.
One warp fetches the weights by TMA, a block of hidden units at a time: rows of gate and value into
one tile, so that both are one product, and columns of the output. Each of three groups of four
warps has 64 rows of its own. They share the weights, and while one computes SwiGLU, others
multiply. Programs stay, and take rows after rows. For the residual a group fetches its x again,
from L2, where its normalised rows have been multiplied for the last time.
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

C = gl.constexpr(128)  # channels
ROWS = gl.constexpr(64)  # of a group
GROUPS = gl.constexpr(3)
UNITS = gl.constexpr(64)  # hidden units of a block
BYTES = gl.constexpr(64 * 128 * 2)  # of rows of a group
FETCHING = gl.constexpr(24)  # registers of a thread that fetches


@gluon.jit
def fetch(
    d_gate, d_value, d_out, s_pair, s_out, full_pair, empty_pair, full_out, empty_out,
    rows, hidden,
    GROUPS: gl.constexpr, UNITS: gl.constexpr, PAIRS: gl.constexpr, OUTS: gl.constexpr,
):  # fmt: skip
    """The warp that fetches weights: as often as there are rows for the program's groups."""
    p, in_p = 0, 0
    o, in_o = 0, 0
    box: gl.constexpr = d_gate.block_shape
    for _ in range(gl.program_id(0) * GROUPS * ROWS, rows, gl.num_programs(0) * GROUPS * ROWS):
        for unit in range(0, hidden, UNITS):
            mbarrier.wait(empty_pair.index(p), in_p ^ 1)
            bar = full_pair.index(p)
            mbarrier.expect(bar, UNITS * C * 4)
            boxes = s_pair.index(p)._reinterpret(s_pair.dtype, [4, box[0], box[1]], d_gate.layout)
            for half in gl.static_range(2):  # of the channels
                at = [unit, half * (C // 2)]
                tma.async_copy_global_to_shared(d_gate, at, bar, boxes.index(2 * half))
                tma.async_copy_global_to_shared(d_value, at, bar, boxes.index(2 * half + 1))
            p, in_p = following(p, in_p, PAIRS)
            mbarrier.wait(empty_out.index(o), in_o ^ 1)
            bar_out = full_out.index(o)
            mbarrier.expect(bar_out, UNITS * C * 2)
            tma.async_copy_global_to_shared(d_out, [0, unit], bar_out, s_out.index(o))
            o, in_o = following(o, in_o, OUTS)


@gluon.jit
def _activation(pair, dtype: gl.constexpr, LEFT: gl.constexpr):
    """SwiGLU of a block: an operand in registers."""
    gate, value = halves(pair)
    return gl.convert_layout((gate * sigmoid(gate) * value).to(dtype), LEFT)


@gluon.jit
def _transition(
    g: gl.constexpr, d_x, d_y, p_norm_weight, p_norm_bias, p_stats, s_x, s_n, s_pair, s_out,
    full_x, full_again, full_pair, empty_pair, full_out, empty_out, rows, hidden, eps,
    PAIRS: gl.constexpr, OUTS: gl.constexpr, RESIDUAL: gl.constexpr, LINES: gl.constexpr,
):  # fmt: skip
    """One group of four warps."""
    ACC: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], instr_shape=[16, C, 16])
    PAIR: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], instr_shape=[16, 2 * UNITS, 16])
    LEFT: gl.constexpr = gl.DotOperandLayout(0, ACC, k_width=2)
    dtype: gl.constexpr = s_n.dtype
    o_m = gl.arange(0, ROWS, gl.SliceLayout(1, LINES))
    o_c = gl.arange(0, C, gl.SliceLayout(0, LINES))
    t_x = s_x.index(g)
    t_n = s_n.index(g)
    bar_x = full_x.index(g)
    bar_again = full_again.index(g)
    in_x, in_again = 0, 0
    p, in_p = 0, 0
    o, in_o = 0, 0
    step = gl.num_programs(0) * (GROUPS * ROWS)
    start = gl.program_id(0) * (GROUPS * ROWS)
    mbarrier.expect(bar_x, BYTES)
    tma.async_copy_global_to_shared(d_x, [start + g * ROWS, 0], bar_x, t_x)
    for first in range(start, rows, step):
        i_row = first + g * ROWS  # past the last row zeros are read, and nothing is stored
        mbarrier.wait(bar_x, in_x)
        in_x ^= 1
        x = t_x.load(LINES)
        if p_stats is not None:
            x = x.to(gl.float32)
            mean = gl.sum(x, 1) * (1.0 / C)
            x = x - mean[:, None]
            variance = gl.sum(x * x, 1) * (1.0 / C)
            inverse = gl.div_rn(1.0, gl.sqrt_rn(variance + eps))
            gl.store(p_stats + i_row + o_m, mean, mask=i_row + o_m < rows)
            gl.store(p_stats + rows + i_row + o_m, inverse, mask=i_row + o_m < rows)
            x = x * inverse[:, None]
            if p_norm_weight is not None:
                x = x * gl.load(p_norm_weight + o_c).to(gl.float32)[None, :]
            if p_norm_bias is not None:
                x = x + gl.load(p_norm_bias + o_c).to(gl.float32)[None, :]
        tma.store_wait(0)  # of the output of the rows before, from the same place
        t_n.store(x.to(dtype))
        fence_async_shared()
        barrier()  # all have read x, and all have written
        more = first + step < rows
        mbarrier.expect(bar_x, BYTES, pred=more)
        tma.async_copy_global_to_shared(d_x, [i_row + step, 0], bar_x, t_x, pred=more)

        acc = gl.zeros([ROWS, C], gl.float32, ACC)
        zero = gl.zeros([ROWS, 2 * UNITS], gl.float32, PAIR)
        for unit in range(0, hidden, UNITS):
            mbarrier.wait(full_pair.index(p), in_p)
            both = s_pair.index(p).permute((1, 0))
            pair = warpgroup_mma(t_n, both, zero, use_acc=False, is_async=True)
            pair = warpgroup_mma_wait(0, deps=(pair,))
            mbarrier.arrive(empty_pair.index(p))
            p, in_p = following(p, in_p, PAIRS)
            if RESIDUAL:  # noqa: SIM102, which is known when this is compiled
                if unit + UNITS >= hidden:  # the operand has been multiplied for the last time
                    barrier()
                    mbarrier.expect(bar_again, BYTES)
                    tma.async_copy_global_to_shared(d_x, [i_row, 0], bar_again, t_n)
            h = _activation(pair, dtype, LEFT)
            mbarrier.wait(full_out.index(o), in_o)
            acc = warpgroup_mma(h, s_out.index(o).permute((1, 0)), acc, is_async=True)
            acc, h = warpgroup_mma_wait(0, deps=(acc, h))
            mbarrier.arrive(empty_out.index(o))
            o, in_o = following(o, in_o, OUTS)
        if RESIDUAL:
            mbarrier.wait(bar_again, in_again)
            in_again ^= 1
            acc += t_n.load(ACC).to(gl.float32)
        t_n.store(acc.to(dtype))
        fence_async_shared()
        tma.async_copy_shared_to_global(d_y, [i_row, 0], t_n)
    tma.store_wait(0)


@gluon.jit
def hopper_forward_kernel(
    d_x,  # [M, C], in boxes of 64 by 128
    d_gate, d_value,  # [H, C], in boxes of UNITS by 64
    d_out,  # [C, H], in boxes of 128 by UNITS
    d_y,  # [M, C], in boxes of 64 by 128, written
    p_norm_weight,  # [C] or None
    p_norm_bias,  # [C] or None
    p_stats,  # fp32 [2, M], written: mean, and one over the standard deviation; None: no norm
    rows,
    hidden,
    eps,
    PAIRS: gl.constexpr,  # tiles of gate and value that are fetched ahead
    OUTS: gl.constexpr,  # and of the output
    REGISTERS: gl.constexpr,  # of a thread that computes
    RESIDUAL: gl.constexpr,  # whether x is added
    PAIR: gl.constexpr,  # layout in shared memory of a tile of gate and value, 2 UNITS by 128
    LINES: gl.constexpr,  # layout in registers of rows to be normalised
):  # fmt: skip
    """Output and statistics, as the kernel of ``forward`` leaves them."""
    BAR: gl.constexpr = mbarrier.MBarrierLayout()
    dtype: gl.constexpr = d_x.dtype
    s_x = gl.allocate_shared_memory(dtype, [GROUPS, ROWS, C], d_x.layout)
    s_n = gl.allocate_shared_memory(dtype, [GROUPS, ROWS, C], d_x.layout)
    s_pair = gl.allocate_shared_memory(dtype, [PAIRS, 2 * UNITS, C], PAIR)
    s_out = gl.allocate_shared_memory(dtype, [OUTS, C, UNITS], d_out.layout)
    full_x = gl.allocate_shared_memory(gl.int64, [GROUPS, 1], BAR)
    full_pair = gl.allocate_shared_memory(gl.int64, [PAIRS, 1], BAR)
    empty_pair = gl.allocate_shared_memory(gl.int64, [PAIRS, 1], BAR)
    full_out = gl.allocate_shared_memory(gl.int64, [OUTS, 1], BAR)
    empty_out = gl.allocate_shared_memory(gl.int64, [OUTS, 1], BAR)
    for i in gl.static_range(GROUPS):
        mbarrier.init(full_x.index(i), 1)
    full_again = full_x
    if RESIDUAL:
        full_again = gl.allocate_shared_memory(gl.int64, [GROUPS, 1], BAR)
        for i in gl.static_range(GROUPS):
            mbarrier.init(full_again.index(i), 1)
    for i in gl.static_range(PAIRS):
        mbarrier.init(full_pair.index(i), 1)
        mbarrier.init(empty_pair.index(i), GROUPS)
    for i in gl.static_range(OUTS):
        mbarrier.init(full_out.index(i), 1)
        mbarrier.init(empty_out.index(i), GROUPS)
    # Arguments are written out for each role: a tuple kept under a name loses its constants.
    gl.warp_specialize(
        [
            (_transition, (
                gl.constexpr(0), d_x, d_y, p_norm_weight, p_norm_bias, p_stats, s_x, s_n,
                s_pair, s_out, full_x, full_again, full_pair, empty_pair, full_out, empty_out,
                rows, hidden, eps, PAIRS, OUTS, RESIDUAL, LINES,
            )),
            (_transition, (
                gl.constexpr(1), d_x, d_y, p_norm_weight, p_norm_bias, p_stats, s_x, s_n,
                s_pair, s_out, full_x, full_again, full_pair, empty_pair, full_out, empty_out,
                rows, hidden, eps, PAIRS, OUTS, RESIDUAL, LINES,
            )),
            (_transition, (
                gl.constexpr(2), d_x, d_y, p_norm_weight, p_norm_bias, p_stats, s_x, s_n,
                s_pair, s_out, full_x, full_again, full_pair, empty_pair, full_out, empty_out,
                rows, hidden, eps, PAIRS, OUTS, RESIDUAL, LINES,
            )),
            (fetch, (
                d_gate, d_value, d_out, s_pair, s_out, full_pair, empty_pair, full_out,
                empty_out, rows, hidden, GROUPS, UNITS, PAIRS, OUTS,
            )),
        ],
        [4, 4, 1],
        [REGISTERS, REGISTERS, FETCHING],
    )  # fmt: skip

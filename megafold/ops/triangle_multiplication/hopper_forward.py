"""Triangle multiplication forward on Hopper's own instructions (Gluon).

What :mod:`~megafold.ops.triangle_multiplication.forward` leaves, letters as there. Weights lie in
shared memory as long as a program runs. Each of its groups of four warps takes 64 pairs at a time
by itself, so that while one computes norms and gates, others multiply: it reads a tile by TMA,
normalises it in the layout of operands in registers, where a pair's channels are in four
neighbouring threads, and at once fetches the next tile, into the same place or (of z behind the
product) another. Results reach memory by way of shared memory, from where TMA takes whole lines.
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

from megafold.ops.gluon import barrier, halves, sigmoid

C = gl.constexpr(128)  # channels
PAIRS = gl.constexpr(64)  # of a group
OUTS = gl.constexpr(64)  # rows of a weight, of one product
PROJECTING = gl.constexpr(3)  # groups of four warps, before the product
LEAVING = gl.constexpr(2)  # and behind it
BLOCKS = gl.constexpr(4)  # of as many outputs: a and b
BYTES = gl.constexpr(64 * 128 * 2)  # of a tile


@gluon.jit
def _centred(x, eps):
    """Rows without their mean, their mean, and one over their deviation."""
    mean = gl.sum(x, 1) * (1.0 / C)
    x = x - mean[:, None]
    variance = gl.sum(x * x, 1) * (1.0 / C)
    return x, mean, gl.div_rn(1.0, gl.sqrt_rn(variance + eps))


@gluon.jit
def _keep(p, t):
    """Keep numbers of each channel, or None, in shared memory, as fp32."""
    o_c = gl.arange(0, C, gl.BlockedLayout([1], [32], [4], [0]))
    if p is not None:
        t.store(gl.load(p + o_c).to(gl.float32))


@gluon.jit
def _scaled(
    x, t_weight, t_bias, WEIGHT: gl.constexpr, BIAS: gl.constexpr, dtype: gl.constexpr,
    LEFT: gl.constexpr,
):  # fmt: skip
    """Rows of unit variance with a norm's scale and offset: an operand in registers.

    These come from shared memory: pointers to them take registers for each, not for all.
    """
    if WEIGHT:
        x = x * t_weight.load(gl.SliceLayout(0, x.type.layout))[None, :]
    if BIAS:
        x = x + t_bias.load(gl.SliceLayout(0, x.type.layout))[None, :]
    x = gl.convert_layout(x.to(dtype), LEFT)
    # Does nothing but say where: else the compiler keeps fp32, and rounds where x is of use.
    return gl.inline_asm_elementwise(
        "mov.b32 $0, $1;", "=r,r", [x], dtype=x.dtype, is_pure=False, pack=2
    )


@gluon.jit
def _store_edges(pair, there, d_edges, t_out, i_row, i_out, GATE: gl.constexpr):
    """Gate a block of outputs, and send it off, channels first."""
    value, gate = halves(pair)
    edges = gl.convert_layout(value * sigmoid(gate), GATE)
    if there is not None:
        edges = gl.where(there[:, None], edges, 0.0)
    tma.store_wait(1)  # of the block that left this place; the one before is another's
    t_out.permute((1, 0)).store(edges.to(t_out.dtype))
    fence_async_shared()
    tma.async_copy_shared_to_global(d_edges, [i_out, i_row], t_out)


@gluon.jit
def _project(
    w: gl.constexpr, d_z, d_p, d_g, d_edges, p_mask, p_stats, s_norm,
    s_weights, s_z, s_out, full_weights, full_z, pairs, outs, eps,
    WEIGHT: gl.constexpr, BIAS: gl.constexpr,
):  # fmt: skip
    """One group of four warps."""
    ACC: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], instr_shape=[16, C, 16])
    GATE: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], instr_shape=[16, OUTS, 16])
    LEFT: gl.constexpr = gl.DotOperandLayout(0, ACC, k_width=2)
    dtype: gl.constexpr = s_z.dtype
    o_m = gl.arange(0, PAIRS, gl.SliceLayout(1, ACC))
    o_gate = gl.arange(0, PAIRS, gl.SliceLayout(1, GATE))
    t_z = s_z.index(w)
    bar = full_z.index(w)
    in_z = 0
    step = gl.num_programs(0) * (PROJECTING * PAIRS)
    start = gl.program_id(0) * (PROJECTING * PAIRS)
    mbarrier.expect(bar, BYTES)
    tma.async_copy_global_to_shared(d_z, [start + w * PAIRS, 0], bar, t_z)
    if w == 0:
        mbarrier.expect(full_weights, 2 * BLOCKS * BYTES)
        for b in gl.static_range(BLOCKS):
            # Rows of p and of g in one tile, so that both are one product.
            boxes = s_weights.index(b)._reinterpret(dtype, [4, OUTS, C // 2], d_p.layout)
            for half in gl.static_range(2):  # of the channels
                at = [b * OUTS, half * (C // 2)]
                tma.async_copy_global_to_shared(d_p, at, full_weights, boxes.index(2 * half))
                tma.async_copy_global_to_shared(d_g, at, full_weights, boxes.index(2 * half + 1))
    for first in range(start, pairs, step):
        i_row = first + w * PAIRS  # past the last pair zeros are read, and nothing is stored
        if p_mask is not None:
            i_gate = i_row + o_gate
            there = gl.load(p_mask + i_gate, mask=i_gate < pairs, other=0) != 0
        else:
            there = None
        mbarrier.wait(bar, in_z)
        in_z ^= 1
        x = t_z.load(ACC)
        barrier()  # all have read
        more = first + step < pairs
        mbarrier.expect(bar, BYTES, pred=more)
        tma.async_copy_global_to_shared(d_z, [i_row + step, 0], bar, t_z, pred=more)
        x, mean, inverse = _centred(x.to(gl.float32), eps)
        i_m = i_row + o_m
        gl.store(p_stats + i_m, mean, mask=i_m < pairs)
        gl.store(p_stats + pairs + i_m, inverse, mask=i_m < pairs)
        x = x * inverse[:, None]
        n = _scaled(x, s_norm.index(0), s_norm.index(1), WEIGHT, BIAS, dtype, LEFT)
        mbarrier.wait(full_weights, 0)
        zero = gl.zeros([PAIRS, 2 * OUTS], gl.float32, ACC)
        for i_out in range(0, outs, OUTS):
            t_weights = s_weights.index(i_out // OUTS).permute((1, 0))
            t_out = s_out.index(2 * w + i_out // OUTS % 2)
            pair = warpgroup_mma(n, t_weights, zero, use_acc=False, is_async=True)
            pair = warpgroup_mma_wait(0, deps=(pair,))
            _store_edges(pair, there, d_edges, t_out, i_row, i_out, GATE)
    tma.store_wait(0)


@gluon.jit
def hopper_project_kernel(
    d_z,  # [M, C], in boxes of 64 by 128
    d_p, d_g,  # [2 C, C], in boxes of 64 by 64
    d_edges,  # [2 C, M], in boxes of 64 by 64, written: a, then b
    p_mask,  # bool [M] or None
    p_norm_weight,  # [C] or None
    p_norm_bias,  # [C] or None
    p_stats,  # fp32 [2, M], written: of z
    pairs,
    outs,  # 2 C; not a constant, for loops over them that stay loops
    eps,
    REGISTERS: gl.constexpr,  # of a thread
    TILE: gl.constexpr,  # layout in shared memory of 128 by 128
    LINE: gl.constexpr,  # and of 128 numbers
):  # fmt: skip
    """As ``project_kernel``; programs stay, and take pairs after pairs."""
    BAR: gl.constexpr = mbarrier.MBarrierLayout()
    dtype: gl.constexpr = d_z.dtype
    s_weights = gl.allocate_shared_memory(dtype, [BLOCKS, 2 * OUTS, C], TILE)
    s_z = gl.allocate_shared_memory(dtype, [PROJECTING, PAIRS, C], d_z.layout)
    s_out = gl.allocate_shared_memory(dtype, [2 * PROJECTING, OUTS, PAIRS], d_edges.layout)
    s_norm = gl.allocate_shared_memory(gl.float32, [2, C], LINE)
    full_weights = gl.allocate_shared_memory(gl.int64, [1], BAR)
    full_z = gl.allocate_shared_memory(gl.int64, [PROJECTING, 1], BAR)
    mbarrier.init(full_weights, 1)
    for i in gl.static_range(PROJECTING):
        mbarrier.init(full_z.index(i), 1)
    _keep(p_norm_weight, s_norm.index(0))
    _keep(p_norm_bias, s_norm.index(1))
    # Arguments are written out for each role: a tuple kept under a name loses its constants.
    gl.warp_specialize(
        [
            (_project, (
                gl.constexpr(0), d_z, d_p, d_g, d_edges, p_mask, p_stats, s_norm, s_weights,
                s_z, s_out, full_weights, full_z, pairs, outs, eps,
                gl.constexpr(p_norm_weight is not None),
                gl.constexpr(p_norm_bias is not None),
            )),
            (_project, (
                gl.constexpr(1), d_z, d_p, d_g, d_edges, p_mask, p_stats, s_norm, s_weights,
                s_z, s_out, full_weights, full_z, pairs, outs, eps,
                gl.constexpr(p_norm_weight is not None),
                gl.constexpr(p_norm_bias is not None),
            )),
            (_project, (
                gl.constexpr(2), d_z, d_p, d_g, d_edges, p_mask, p_stats, s_norm, s_weights,
                s_z, s_out, full_weights, full_z, pairs, outs, eps,
                gl.constexpr(p_norm_weight is not None),
                gl.constexpr(p_norm_bias is not None),
            )),
        ],
        [4, 4],
        [REGISTERS, REGISTERS],
    )  # fmt: skip


@gluon.jit
def _fetch_weight(d_weight, s_weight, bar):
    """Fetch a weight ``[C, C]``, one tile of all outputs."""
    boxes = s_weight._reinterpret(s_weight.dtype, [4, OUTS, C // 2], d_weight.layout)
    for part in gl.static_range(2):  # of the channels
        for half in gl.static_range(2):  # of the outputs
            at = [half * OUTS, part * (C // 2)]
            tma.async_copy_global_to_shared(d_weight, at, bar, boxes.index(2 * part + half))


@gluon.jit
def _dropout(
    p, i_m, pairs, tokens, stride_b, stride_i, stride_j, CHANNEL: gl.constexpr, ACC: gl.constexpr
):  # fmt: skip
    """What dropout multiplies pairs ``i_m`` by, ``[pairs, channels or 1]``; as ``load_dropout``.

    Past the last pair that of the last, for nothing is stored there: no masks of loads.
    """
    i_m = gl.minimum(i_m, pairs - 1)
    i = i_m // tokens
    start = (i // tokens).to(gl.int64) * stride_b + (i % tokens).to(gl.int64) * stride_i
    start += (i_m % tokens).to(gl.int64) * stride_j
    if CHANNEL == 0:  # one number for all, and one register
        return gl.load(p + start)[:, None]
    else:
        return gl.load((p + start)[:, None] + gl.arange(0, C, gl.SliceLayout(0, ACC))[None, :])


@gluon.jit
def _output(
    w: gl.constexpr, d_x, d_z, d_p, d_g, d_out, p_stats_in, p_dropout, p_stats_out, s_norm,
    s_p, s_g, s_x, s_z, full_weights, full_x, full_z, pairs, tokens, dropout_b, dropout_i,
    dropout_j, eps, IN_WEIGHT: gl.constexpr, IN_BIAS: gl.constexpr, OUT_WEIGHT: gl.constexpr,
    OUT_BIAS: gl.constexpr, CHANNEL: gl.constexpr, RESIDUAL: gl.constexpr, HALVES: gl.constexpr,
):  # fmt: skip
    """One group of four warps. Of its two tiles of z one has this, then the output; into the other
    come the next pairs'.
    """
    ACC: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], instr_shape=[16, C, 16])
    LEFT: gl.constexpr = gl.DotOperandLayout(0, ACC, k_width=2)
    dtype: gl.constexpr = s_z.dtype
    o_m = gl.arange(0, PAIRS, gl.SliceLayout(1, ACC))
    t_x = s_x.index(w)
    i_z = 2 * w
    bar_x = full_x.index(w)
    bar_z = full_z.index(w)
    phase = 0
    step = gl.num_programs(0) * (LEAVING * PAIRS)
    start = gl.program_id(0) * (LEAVING * PAIRS)
    mbarrier.expect(bar_x, BYTES)
    tma.async_copy_global_to_shared(d_x, [0, start + w * PAIRS], bar_x, t_x)
    mbarrier.expect(bar_z, BYTES)
    tma.async_copy_global_to_shared(d_z, [start + w * PAIRS, 0], bar_z, s_z.index(i_z))
    if w == 0:
        mbarrier.expect(full_weights, 4 * BYTES)
        _fetch_weight(d_p, s_p, full_weights)
        _fetch_weight(d_g, s_g, full_weights)
    for first in range(start, pairs, step):
        i_row = first + w * PAIRS  # past the last pair zeros are read, and nothing is stored
        more = first + step < pairs
        i_m = i_row + o_m
        # Loaded long before they are of use.
        mean_in = gl.load(p_stats_in + i_m, mask=i_m < pairs, other=0.0)
        inverse_in = gl.load(p_stats_in + pairs + i_m, mask=i_m < pairs, other=0.0)
        mbarrier.wait(bar_x, phase)
        x = t_x.permute((1, 0)).load(ACC)
        barrier()  # all have read
        mbarrier.expect(bar_x, BYTES, pred=more)
        tma.async_copy_global_to_shared(d_x, [0, i_row + step], bar_x, t_x, pred=more)
        x, mean, inverse = _centred(x.to(gl.float32), eps)
        gl.store(p_stats_out + i_m, mean, mask=i_m < pairs)
        gl.store(p_stats_out + pairs + i_m, inverse, mask=i_m < pairs)
        x = x * inverse[:, None]
        y = _scaled(x, s_norm.index(2), s_norm.index(3), OUT_WEIGHT, OUT_BIAS, dtype, LEFT)
        mbarrier.wait(full_weights, 0)
        t_p = s_p._reinterpret(dtype, [C, C], HALVES).permute((1, 0))
        zero = gl.zeros([PAIRS, C], gl.float32, ACC)
        u = warpgroup_mma(y, t_p, zero, use_acc=False, is_async=True)
        mbarrier.wait(bar_z, phase)
        phase ^= 1
        t_z = s_z.index(i_z)
        z = t_z.load(ACC)
        i_z = 4 * w + 1 - i_z
        tma.store_wait(0)  # of the pairs before, from where the next come
        barrier()
        mbarrier.expect(bar_z, BYTES, pred=more)
        tma.async_copy_global_to_shared(
            d_z, [i_row + step, 0], bar_z, s_z.index(i_z), pred=more
        )  # fmt: skip
        z = (z.to(gl.float32) - mean_in[:, None]) * inverse_in[:, None]
        n = _scaled(z, s_norm.index(0), s_norm.index(1), IN_WEIGHT, IN_BIAS, dtype, LEFT)
        t_g = s_g._reinterpret(dtype, [C, C], HALVES).permute((1, 0))
        gate = warpgroup_mma(n, t_g, zero, use_acc=False, is_async=True)
        if p_dropout is not None:
            dropout = _dropout(
                p_dropout, i_m, pairs, tokens, dropout_b, dropout_i, dropout_j, CHANNEL, ACC
            )  # fmt: skip
        gate, u, y, n = warpgroup_mma_wait(0, deps=(gate, u, y, n))
        out = u * sigmoid(gate)
        if p_dropout is not None:
            out = out * dropout.to(gl.float32)
        if RESIDUAL:
            out = out + t_z.load(ACC).to(gl.float32)
        t_z.store(out.to(dtype))
        fence_async_shared()
        barrier()  # all have written
        tma.async_copy_shared_to_global(d_out, [i_row, 0], t_z)
    tma.store_wait(0)


@gluon.jit
def hopper_output_kernel(
    d_x,  # [C, M], in boxes of 128 by 64: the product over triangles
    d_z,  # [M, C], in boxes of 64 by 128
    d_p, d_g,  # [C, C], in boxes of 64 by 64
    d_out,  # [M, C], in boxes of 64 by 128, written
    p_norm_in_weight,  # [C] or None, as the norms' other parameters are
    p_norm_in_bias,
    p_norm_out_weight,
    p_norm_out_bias,
    p_stats_in,  # fp32 [2, M]: of z
    p_dropout,  # [B, N, N, C], what the update is multiplied by; or None
    p_stats_out,  # fp32 [2, M], written: of x
    pairs,
    tokens,  # N
    dropout_b, dropout_i, dropout_j,  # strides, 0 where it repeats
    eps,
    CHANNEL: gl.constexpr,  # that of a channel, 1 or 0
    RESIDUAL: gl.constexpr,  # z is added
    REGISTERS: gl.constexpr,  # of a thread
    HALVES: gl.constexpr,  # layout in shared memory of 64 by 64, and of 128 by 128
    LINE: gl.constexpr,  # and of 128 numbers
):  # fmt: skip
    """As ``output_kernel``; programs stay, and take pairs after pairs."""
    BAR: gl.constexpr = mbarrier.MBarrierLayout()
    dtype: gl.constexpr = d_z.dtype
    s_p = gl.allocate_shared_memory(dtype, [2, OUTS, C], d_p.layout)
    s_g = gl.allocate_shared_memory(dtype, [2, OUTS, C], d_g.layout)
    s_x = gl.allocate_shared_memory(dtype, [LEAVING, C, PAIRS], d_x.layout)
    s_z = gl.allocate_shared_memory(dtype, [2 * LEAVING, PAIRS, C], d_z.layout)
    s_norm = gl.allocate_shared_memory(gl.float32, [4, C], LINE)
    full_weights = gl.allocate_shared_memory(gl.int64, [1], BAR)
    full_x = gl.allocate_shared_memory(gl.int64, [LEAVING, 1], BAR)
    full_z = gl.allocate_shared_memory(gl.int64, [LEAVING, 1], BAR)
    mbarrier.init(full_weights, 1)
    for i in gl.static_range(LEAVING):
        mbarrier.init(full_x.index(i), 1)
        mbarrier.init(full_z.index(i), 1)
    _keep(p_norm_in_weight, s_norm.index(0))
    _keep(p_norm_in_bias, s_norm.index(1))
    _keep(p_norm_out_weight, s_norm.index(2))
    _keep(p_norm_out_bias, s_norm.index(3))
    gl.warp_specialize(
        [
            (_output, (
                gl.constexpr(0), d_x, d_z, d_p, d_g, d_out, p_stats_in, p_dropout, p_stats_out,
                s_norm, s_p, s_g, s_x, s_z, full_weights, full_x, full_z, pairs, tokens, dropout_b,
                dropout_i, dropout_j, eps, gl.constexpr(p_norm_in_weight is not None),
                gl.constexpr(p_norm_in_bias is not None),
                gl.constexpr(p_norm_out_weight is not None),
                gl.constexpr(p_norm_out_bias is not None), CHANNEL, RESIDUAL, HALVES,
            )),
            (_output, (
                gl.constexpr(1), d_x, d_z, d_p, d_g, d_out, p_stats_in, p_dropout, p_stats_out,
                s_norm, s_p, s_g, s_x, s_z, full_weights, full_x, full_z, pairs, tokens, dropout_b,
                dropout_i, dropout_j, eps, gl.constexpr(p_norm_in_weight is not None),
                gl.constexpr(p_norm_in_bias is not None),
                gl.constexpr(p_norm_out_weight is not None),
                gl.constexpr(p_norm_out_bias is not None), CHANNEL, RESIDUAL, HALVES,
            )),
        ],
        [4],
        [REGISTERS],
    )  # fmt: skip

"""Triangle multiplication backward on Hopper's own instructions (Gluon).

What :mod:`~megafold.ops.triangle_multiplication.backward` leaves, letters and names as there, where
all gradients are asked for. A program stays on its multiprocessor, with all weights in shared
memory, and has two groups of four warps, each with 64 pairs of its own at a time: while one
computes gates, the other multiplies. Rows that are normalised are operands in registers, as are
the gradients that come of a product; so z and x stay in shared memory as they came, for the
gradient through the norm, whose result takes their place. Every group fetches its own tiles by TMA,
but for the gradient of z that comes past the update: for this no shared memory is left.

The norms' parameters have a sum for every group: a warp's own pairs are added up along its way.
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

from megafold.ops.gluon import barrier, halves, sigmoid, store_sums, warp_sums

C = gl.constexpr(128)  # channels
PAIRS = gl.constexpr(64)  # of a group
OUTS = gl.constexpr(64)  # rows of a weight that are multiplied at a time
GROUPS = gl.constexpr(2)
BYTES = gl.constexpr(64 * 128 * 2)  # of a tile of pairs
FETCHING = gl.constexpr(24)  # registers of a thread that fetches


@gluon.jit
def _numbers(p, first, pairs, LAYOUT: gl.constexpr):
    """A number of each of 64 pairs, in the layout of rows; zeros outside."""
    i_m = first + gl.arange(0, PAIRS, gl.SliceLayout(1, LAYOUT))
    return gl.load(p + i_m, mask=i_m < pairs, other=0)


@gluon.jit
def _normalised(t, mean, rstd, p_weight, p_bias, LEFT: gl.constexpr):
    """Rows of a tile ``[pairs, channels]``, normalised: an operand in registers."""
    o_c = gl.arange(0, C, gl.SliceLayout(0, LEFT))
    n = (t.load(LEFT).to(gl.float32) - mean[:, None]) * rstd[:, None]
    if p_weight is not None:
        n = n * gl.load(p_weight + o_c).to(gl.float32)[None, :]
    if p_bias is not None:
        n = n + gl.load(p_bias + o_c).to(gl.float32)[None, :]
    return n.to(t.dtype)


@gluon.jit
def _through_norm(grad, normal, rstd, p_weight, ACC: gl.constexpr):
    """The gradient of what was normalised, of that behind the norm."""
    if p_weight is not None:
        o_c = gl.arange(0, C, gl.SliceLayout(0, ACC))
        grad = grad * gl.load(p_weight + o_c).to(gl.float32)[None, :]
    of_mean = gl.sum(grad, 1) * (1.0 / C)
    of_scale = gl.sum(grad * normal, 1) * (1.0 / C)
    return rstd[:, None] * (grad - of_mean[:, None] - normal * of_scale[:, None])


@gluon.jit
def _past(p, stride, first, pairs, ACC: gl.constexpr):
    """The gradient of 64 pairs' z that comes past the update, as the result is added to it.

    Past the last pair that of the last, for nothing is stored there: no masks of loads.
    """
    i_m = gl.minimum(first + gl.arange(0, PAIRS, gl.SliceLayout(1, ACC)), pairs - 1)
    o_c = gl.arange(0, C, gl.SliceLayout(0, ACC))
    return gl.load((p + i_m.to(gl.int64) * stride)[:, None] + o_c[None, :])


@gluon.jit
def _fetch_in(d_p, d_g, d_g_out, s_in, s_out, full_weights, HALVES: gl.constexpr):
    """The warp that fetches the weights of ``grad_z``, once: 64 rows of p, and of g, in a tile."""
    mbarrier.expect(full_weights, 10 * BYTES)
    for b in gl.static_range(4):
        boxes = s_in.index(b)._reinterpret(s_in.dtype, [4, OUTS, C // 2], HALVES)
        for h in gl.static_range(2):  # of the channels
            at = [b * OUTS, h * (C // 2)]
            tma.async_copy_global_to_shared(d_p, at, full_weights, boxes.index(2 * h))
            tma.async_copy_global_to_shared(d_g, at, full_weights, boxes.index(2 * h + 1))
    for h in gl.static_range(2):
        tma.async_copy_global_to_shared(d_g_out, [h * OUTS, 0], full_weights, s_out.index(h))


@gluon.jit
def _operand(grad, both, there, HALF: gl.constexpr, LEFT: gl.constexpr):
    """Gradients of a block's p, and of what its gate is the sigmoid of, side by side."""
    p, gate = halves(both)
    gate = sigmoid(gl.convert_layout(gate, HALF))
    of_p = grad.to(gl.float32) * gate
    if there is not None:
        of_p = gl.where(there[:, None], of_p, 0.0)
    of_g = of_p * gl.convert_layout(p, HALF) * (1.0 - gate)
    left = gl.join(of_p.to(grad.dtype), of_g.to(grad.dtype))
    left = gl.reshape(gl.permute(left, (0, 2, 1)), (PAIRS, 2 * OUTS))
    return gl.convert_layout(left, LEFT)


@gluon.jit
def _grad_z(
    g: gl.constexpr, d_edges, d_grad_gate, d_z, d_grad_z, p_mask, p_norm_weight, p_norm_bias,
    p_stats, p_residual, p_sums, s_tiles, s_in, s_out, full_z, full_ring, full_weights,
    stride_residual, pairs, gap, HALVES: gl.constexpr,
):  # fmt: skip
    """One group of four warps. Of its two tiles one has z, then the gradient of z. Through the
    other go, half by half, the gradients of edges, 64 channels at a time, and of the gates; last
    the next pairs' z.
    """
    ACC: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], instr_shape=[16, C, 16])
    HALF: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], instr_shape=[16, OUTS, 16])
    LEFT: gl.constexpr = gl.DotOperandLayout(0, ACC, k_width=2)
    dtype: gl.constexpr = s_tiles.dtype
    bar_z = full_z.index(g)
    step = gl.num_programs(0) * (GROUPS * PAIRS)
    start = gl.program_id(0) * (GROUPS * PAIRS) + g * PAIRS
    turn = 0
    i_z = 2 * g
    in_z, in_ring = 0, 0
    mbarrier.expect(bar_z, BYTES, pred=start < pairs)
    tma.async_copy_global_to_shared(
        d_z, [start, 0], bar_z, s_tiles.index(i_z), pred=start < pairs
    )  # fmt: skip
    mean = _numbers(p_stats, start, pairs, LEFT)
    rstd = _numbers(p_stats + pairs, start, pairs, LEFT)
    of_bias = warp_sums(gl.zeros([PAIRS, C], gl.float32, ACC))
    of_weight = of_bias
    mbarrier.wait(full_weights, 0)
    for first in range(start, pairs, step):
        more = first + step < pairs
        t_z = s_tiles.index(i_z)
        t_ring = s_tiles.index(4 * g + 1 - i_z)
        ring = t_ring._reinterpret(dtype, [2, OUTS, PAIRS], HALVES)
        mbarrier.wait(bar_z, in_z)
        in_z ^= 1
        tma.store_wait(0)  # of the pairs before, from where the ring is now
        barrier()
        for b in gl.static_range(2):
            bar = full_ring.index(2 * g + b)
            mbarrier.expect(bar, BYTES // 2)
            tma.async_copy_global_to_shared(d_edges, [b * OUTS, first], bar, ring.index(b))
        there = None if p_mask is None else _numbers(p_mask, first, pairs, HALF) != 0
        n = _normalised(t_z, mean, rstd, p_norm_weight, p_norm_bias, LEFT)
        # Zero, which the compiler does not see: it would keep the address of every operand.
        none = turn >> 28
        turn = turn + 1
        zero = gl.zeros([PAIRS, 2 * OUTS], gl.float32, ACC)
        dn = gl.zeros([PAIRS, C], gl.float32, ACC)
        both = warpgroup_mma(
            n, s_in.index(none).permute((1, 0)), zero, use_acc=False, is_async=True
        )
        both = warpgroup_mma_wait(0, deps=(both,))
        for b in gl.static_range(4):
            bar = full_ring.index(2 * g + b % 2)
            mbarrier.wait(bar, in_ring ^ (b // 2))
            grad = ring.index(b % 2).permute((1, 0)).load(HALF)
            barrier()  # all have read it
            mbarrier.expect(bar, BYTES // 2)
            if b < 2:
                at = [(b + 2) * OUTS + gap, first]
                tma.async_copy_global_to_shared(d_edges, at, bar, ring.index(b % 2))
            else:
                at = [first, (b - 2) * OUTS]
                tma.async_copy_global_to_shared(d_grad_gate, at, bar, ring.index(b % 2))
            left = _operand(grad, both, there, HALF, LEFT)
            dn = warpgroup_mma(left, s_in.index(none + b), dn, is_async=True)
            if b < 3:
                both = warpgroup_mma(
                    n, s_in.index(none + b + 1).permute((1, 0)), zero, use_acc=False, is_async=True
                )  # fmt: skip
                dn, both, left = warpgroup_mma_wait(0, deps=(dn, both, left))
        for h in gl.static_range(2):
            mbarrier.wait(full_ring.index(2 * g + h), in_ring)
            dn = warpgroup_mma(ring.index(h), s_out.index(none + h), dn, is_async=True)
        in_ring ^= 1  # for a half is filled three times
        mean_z = _numbers(p_stats, first, pairs, ACC)
        rstd_z = _numbers(p_stats + pairs, first, pairs, ACC)
        mean = _numbers(p_stats, first + step, pairs, LEFT)
        rstd = _numbers(p_stats + pairs, first + step, pairs, LEFT)
        if p_residual is not None:
            past = _past(p_residual, stride_residual, first, pairs, ACC)
        dn, left = warpgroup_mma_wait(0, deps=(dn, left))
        barrier()
        mbarrier.expect(bar_z, BYTES, pred=more)
        tma.async_copy_global_to_shared(d_z, [first + step, 0], bar_z, t_ring, pred=more)

        normal = (t_z.load(ACC).to(gl.float32) - mean_z[:, None]) * rstd_z[:, None]
        of_bias += warp_sums(dn)
        of_weight += warp_sums(dn * normal)
        grad_z = _through_norm(dn, normal, rstd_z, p_norm_weight, ACC)
        if p_residual is not None:
            grad_z = grad_z + past.to(gl.float32)
        t_z.store(grad_z.to(dtype))
        fence_async_shared()
        tma.async_copy_shared_to_global(d_grad_z, [first, 0], t_z)
        i_z = 4 * g + 1 - i_z
    tma.store_wait(0)
    p_own = p_sums + (gl.program_id(0) * GROUPS + g) * (2 * C)
    store_sums(p_own, s_tiles.index(2 * g), of_weight)
    store_sums(p_own + C, s_tiles.index(2 * g + 1), of_bias)


@gluon.jit
def hopper_grad_z_kernel(
    d_edges,  # [2 C + gap, M], in boxes of 64 by 64: gradients of a, then, behind a gap, of b
    d_grad_gate,  # [M, C], in boxes of 64 by 64: of what the sigmoid of the output takes
    d_z,  # [M, C], in boxes of 64 by 128
    d_p, d_g,  # [2 C, C], in boxes of 64 by 64
    d_g_out,  # [C, C], in boxes of 64 by 128
    d_grad_z,  # [M, C], in boxes of 64 by 128, written; may be where d_grad_gate is
    p_mask,  # bool [M] or None
    p_norm_weight,  # [C] or None
    p_norm_bias,  # [C] or None
    p_stats,  # fp32 [2, M]: of z
    p_residual,  # [M, C], neighbours along C: of the output, to which z was added; or None
    p_sums,  # fp32 [2 programs, 2, C], written
    stride_residual,  # of a row
    pairs,
    gap,
    REGISTERS: gl.constexpr,  # of a thread that computes
    HALVES: gl.constexpr,  # layout in shared memory of 64 by 64, and of 128 by 128
):  # fmt: skip
    """As ``grad_z_kernel``; a sum for the norm's parameters for each group of warps."""
    BAR: gl.constexpr = mbarrier.MBarrierLayout()
    dtype: gl.constexpr = d_z.dtype
    s_tiles = gl.allocate_shared_memory(dtype, [2 * GROUPS, PAIRS, C], d_z.layout)
    s_in = gl.allocate_shared_memory(dtype, [4, 2 * OUTS, C], HALVES)
    s_out = gl.allocate_shared_memory(dtype, [2, OUTS, C], d_g_out.layout)
    full_z = gl.allocate_shared_memory(gl.int64, [GROUPS, 1], BAR)
    full_ring = gl.allocate_shared_memory(gl.int64, [2 * GROUPS, 1], BAR)
    full_weights = gl.allocate_shared_memory(gl.int64, [1], BAR)
    for i in gl.static_range(GROUPS):
        mbarrier.init(full_z.index(i), 1)
    for i in gl.static_range(2 * GROUPS):
        mbarrier.init(full_ring.index(i), 1)
    mbarrier.init(full_weights, 1)
    # Arguments are written out for each role: a tuple kept under a name loses its constants.
    gl.warp_specialize(
        [
            (_grad_z, (
                gl.constexpr(0), d_edges, d_grad_gate, d_z, d_grad_z, p_mask, p_norm_weight,
                p_norm_bias, p_stats, p_residual, p_sums, s_tiles, s_in, s_out, full_z, full_ring,
                full_weights, stride_residual, pairs, gap, HALVES,
            )),
            (_grad_z, (
                gl.constexpr(1), d_edges, d_grad_gate, d_z, d_grad_z, p_mask, p_norm_weight,
                p_norm_bias, p_stats, p_residual, p_sums, s_tiles, s_in, s_out, full_z, full_ring,
                full_weights, stride_residual, pairs, gap, HALVES,
            )),
            (_fetch_in, (d_p, d_g, d_g_out, s_in, s_out, full_weights, HALVES)),
        ],
        [4, 1],
        [REGISTERS, FETCHING],
    )  # fmt: skip


@gluon.jit
def _fetch_out(d_p, d_g, s_p, s_g, full_weights):
    """The warp that fetches the weights of ``grad_x``, once."""
    mbarrier.expect(full_weights, 4 * BYTES)
    for b in gl.static_range(2):
        tma.async_copy_global_to_shared(d_p, [b * OUTS, 0], full_weights, s_p.index(b))
        tma.async_copy_global_to_shared(d_g, [b * OUTS, 0], full_weights, s_g.index(b))


@gluon.jit
def _fetch_pairs(d_grad, d_x, d_z, t_grad, t_x, t_z, bar, first, there):
    """Fetch what ``grad_x`` reads of 64 pairs."""
    mbarrier.expect(bar, 3 * BYTES, pred=there)
    tma.async_copy_global_to_shared(d_z, [first, 0], bar, t_z, pred=there)
    tma.async_copy_global_to_shared(d_x, [0, first], bar, t_x, pred=there)
    tma.async_copy_global_to_shared(d_grad, [first, 0], bar, t_grad, pred=there)


@gluon.jit
def _through_gate(t_grad, gate, u, LEFT: gl.constexpr):
    """The gradient of 64 outputs' u, an operand in registers; leaves that of their gates there."""
    gate = sigmoid(gate)
    of_u = t_grad.load(gate.type.layout).to(gl.float32) * gate
    t_grad.store((of_u * u * (1.0 - gate)).to(t_grad.dtype))
    return gl.convert_layout(of_u.to(t_grad.dtype), LEFT)


@gluon.jit
def _grad_x(
    g: gl.constexpr, d_grad, d_x, d_z, d_grad_x, d_grad_gate, p_norm_in_weight, p_norm_in_bias,
    p_norm_out_weight, p_norm_out_bias, p_stats_in, p_stats_out, p_sums, s_grad, s_x, s_z, s_p, s_g,
    full, full_weights, pairs, HALVES: gl.constexpr,
):  # fmt: skip
    """One group of four warps. Results take the place of x and of the gradient of the output;
    z is an operand in registers at once, and leaves room for the next.
    """
    ACC: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], instr_shape=[16, C, 16])
    HALF: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], instr_shape=[16, OUTS, 16])
    LEFT: gl.constexpr = gl.DotOperandLayout(0, ACC, k_width=2)
    dtype: gl.constexpr = s_z.dtype
    bar = full.index(g)
    t_z = s_z.index(g)
    step = gl.num_programs(0) * (GROUPS * PAIRS)
    start = gl.program_id(0) * (GROUPS * PAIRS) + g * PAIRS
    turn = 0
    i = 2 * g
    in_pairs = 0
    _fetch_pairs(
        d_grad, d_x, d_z, s_grad.index(i), s_x.index(i), t_z, bar, start, start < pairs
    )  # fmt: skip
    mean_in = _numbers(p_stats_in, start, pairs, LEFT)
    rstd_in = _numbers(p_stats_in + pairs, start, pairs, LEFT)
    mean_out = _numbers(p_stats_out, start, pairs, LEFT)
    rstd_out = _numbers(p_stats_out + pairs, start, pairs, LEFT)
    of_bias = warp_sums(gl.zeros([PAIRS, C], gl.float32, ACC))
    of_weight = of_bias
    mbarrier.wait(full_weights, 0)
    for first in range(start, pairs, step):
        t_grad = s_grad.index(i)
        grads = t_grad._reinterpret(dtype, [2, PAIRS, OUTS], HALVES)
        t_x = s_x.index(i).permute((1, 0))
        mbarrier.wait(bar, in_pairs)
        in_pairs ^= 1
        n = _normalised(t_z, mean_in, rstd_in, p_norm_in_weight, p_norm_in_bias, LEFT)
        y = _normalised(t_x, mean_out, rstd_out, p_norm_out_weight, p_norm_out_bias, LEFT)
        none = turn >> 28  # zero, as above
        turn = turn + 1
        zero = gl.zeros([PAIRS, OUTS], gl.float32, HALF)
        g_0 = s_g.index(none).permute((1, 0))
        g_1 = s_g.index(none + 1).permute((1, 0))
        gate_0 = warpgroup_mma(n, g_0, zero, use_acc=False, is_async=True)
        gate_1 = warpgroup_mma(n, g_1, zero, use_acc=False, is_async=True)
        p_0, p_1 = s_p.index(none), s_p.index(none + 1)
        u_0 = warpgroup_mma(y, p_0.permute((1, 0)), zero, use_acc=False, is_async=True)
        u_1 = warpgroup_mma(y, p_1.permute((1, 0)), zero, use_acc=False, is_async=True)
        i = 4 * g + 1 - i
        tma.store_wait(0)  # of the pairs before, from where the next come
        barrier()  # and all have read z
        _fetch_pairs(
            d_grad, d_x, d_z, s_grad.index(i), s_x.index(i), t_z, bar, first + step,
            first + step < pairs,
        )  # fmt: skip
        gate_0, gate_1, u_0, u_1 = warpgroup_mma_wait(0, deps=(gate_0, gate_1, u_0, u_1))
        dy = gl.zeros([PAIRS, C], gl.float32, ACC)
        left = _through_gate(grads.index(0), gate_0, u_0, LEFT)
        dy = warpgroup_mma(left, p_0, dy, is_async=True)
        right = _through_gate(grads.index(1), gate_1, u_1, LEFT)
        dy = warpgroup_mma(right, p_1, dy, is_async=True)
        fence_async_shared()
        tma.async_copy_shared_to_global(d_grad_gate, [first, 0], t_grad)
        mean_x = _numbers(p_stats_out, first, pairs, ACC)
        rstd_x = _numbers(p_stats_out + pairs, first, pairs, ACC)
        mean_in = _numbers(p_stats_in, first + step, pairs, LEFT)
        rstd_in = _numbers(p_stats_in + pairs, first + step, pairs, LEFT)
        mean_out = _numbers(p_stats_out, first + step, pairs, LEFT)
        rstd_out = _numbers(p_stats_out + pairs, first + step, pairs, LEFT)
        dy, left, right = warpgroup_mma_wait(0, deps=(dy, left, right))

        normal = (t_x.load(ACC).to(gl.float32) - mean_x[:, None]) * rstd_x[:, None]
        of_bias += warp_sums(dy)
        of_weight += warp_sums(dy * normal)
        grad_x = _through_norm(dy, normal, rstd_x, p_norm_out_weight, ACC)
        t_x.store(grad_x.to(dtype))
        fence_async_shared()
        tma.async_copy_shared_to_global(d_grad_x, [0, first], s_x.index(4 * g + 1 - i))
    tma.store_wait(0)
    p_own = p_sums + (gl.program_id(0) * GROUPS + g) * (2 * C)
    store_sums(p_own, s_grad.index(2 * g), of_weight)
    store_sums(p_own + C, s_grad.index(2 * g + 1), of_bias)


@gluon.jit
def hopper_grad_x_kernel(
    d_grad,  # [M, C], in boxes of 64 by 128, as what follows but for x: of the output
    d_x,  # [C, M], in boxes of 128 by 64: the product over triangles
    d_z,  # [M, C]
    d_p, d_g,  # [C, C]
    d_grad_x,  # [C, M], in boxes of 128 by 64, written; may be where d_x is
    d_grad_gate,  # [M, C], written: of what the sigmoid takes
    p_norm_in_weight,  # [C] or None, as the norms' other parameters are
    p_norm_in_bias,
    p_norm_out_weight,
    p_norm_out_bias,
    p_stats_in,  # fp32 [2, M]: of z
    p_stats_out,  # fp32 [2, M]: of x
    p_sums,  # fp32 [2 programs, 2, C], written
    pairs,
    REGISTERS: gl.constexpr,  # of a thread that computes
    HALVES: gl.constexpr,  # layout in shared memory of 64 by 64
):  # fmt: skip
    """As ``grad_x_kernel``; a sum for the norm's parameters for each group of warps."""
    BAR: gl.constexpr = mbarrier.MBarrierLayout()
    dtype: gl.constexpr = d_z.dtype
    s_grad = gl.allocate_shared_memory(dtype, [2 * GROUPS, PAIRS, C], d_grad.layout)
    s_x = gl.allocate_shared_memory(dtype, [2 * GROUPS, C, PAIRS], d_x.layout)
    s_z = gl.allocate_shared_memory(dtype, [GROUPS, PAIRS, C], d_z.layout)
    s_p = gl.allocate_shared_memory(dtype, [2, OUTS, C], d_p.layout)
    s_g = gl.allocate_shared_memory(dtype, [2, OUTS, C], d_g.layout)
    full = gl.allocate_shared_memory(gl.int64, [GROUPS, 1], BAR)
    full_weights = gl.allocate_shared_memory(gl.int64, [1], BAR)
    for i in gl.static_range(GROUPS):
        mbarrier.init(full.index(i), 1)
    mbarrier.init(full_weights, 1)
    gl.warp_specialize(
        [
            (_grad_x, (
                gl.constexpr(0), d_grad, d_x, d_z, d_grad_x, d_grad_gate, p_norm_in_weight,
                p_norm_in_bias, p_norm_out_weight, p_norm_out_bias, p_stats_in, p_stats_out,
                p_sums, s_grad, s_x, s_z, s_p, s_g, full, full_weights, pairs, HALVES,
            )),
            (_grad_x, (
                gl.constexpr(1), d_grad, d_x, d_z, d_grad_x, d_grad_gate, p_norm_in_weight,
                p_norm_in_bias, p_norm_out_weight, p_norm_out_bias, p_stats_in, p_stats_out,
                p_sums, s_grad, s_x, s_z, s_p, s_g, full, full_weights, pairs, HALVES,
            )),
            (_fetch_out, (d_p, d_g, s_p, s_g, full_weights)),
        ],
        [4, 1],
        [REGISTERS, FETCHING],
    )  # fmt: skip

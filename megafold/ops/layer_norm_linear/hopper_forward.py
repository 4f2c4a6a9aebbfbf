"""LayerNorm + Linear forward on Hopper's own instructions (Gluon).

The kernel moves bytes, most of them out: what counts is that stores never wait. Programs stay, one
for each multiprocessor, with the weight in shared memory. Each of their groups of four warps takes
64 rows at a time by itself, so that while one normalises, others multiply and store: it reads a
tile by TMA, normalises it in the layout of operands in registers, where a row's channels are in
four neighbouring threads, and at once fetches its next tile. A block of outputs is rounded, and
sent off by way of shared memory, from where TMA takes whole lines, while the next is multiplied.
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

C = gl.constexpr(128)  # channels
ROWS = gl.constexpr(64)  # of a tile
SIDE = gl.constexpr(64)  # of a box of the weight
BYTES = gl.constexpr(64 * 128 * 2)  # of a tile of 64 by 128


@gluon.jit
def _keep(p, t):
    """Keep numbers of each channel, or None, in shared memory, as fp32."""
    o_c = gl.arange(0, C, gl.BlockedLayout([1], [32], [4], [0]))
    if p is not None:
        t.store(gl.load(p + o_c).to(gl.float32))


@gluon.jit
def _here(x):
    """Numbers in 16 bits, from here on: else the compiler keeps fp32 until they are of use."""
    return gl.inline_asm_elementwise(
        "mov.b32 $0, $1;", "=r,r", [x], dtype=x.dtype, is_pure=False, pack=2
    )


@gluon.jit
def _normal(
    x, p_stats, s_norm, i_m, rows, eps, WEIGHT: gl.constexpr, BIAS: gl.constexpr,
    LEFT: gl.constexpr,
):  # fmt: skip
    """Rows normalised, with scale and offset: an operand in registers. Statistics are stored.

    Scale and offset come from shared memory: pointers to them take registers for each, not for all.
    """
    dtype: gl.constexpr = x.dtype
    x = x.to(gl.float32)
    mean = gl.sum(x, 1) * (1.0 / C)
    x = x - mean[:, None]
    variance = gl.sum(x * x, 1) * (1.0 / C)
    inverse = gl.div_rn(1.0, gl.sqrt_rn(variance + eps))
    gl.store(p_stats + i_m, mean, mask=i_m < rows)
    gl.store(p_stats + rows + i_m, inverse, mask=i_m < rows)
    x = x * inverse[:, None]
    if WEIGHT:
        x = x * s_norm.index(0).load(gl.SliceLayout(0, x.type.layout))[None, :]
    if BIAS:
        x = x + s_norm.index(1).load(gl.SliceLayout(0, x.type.layout))[None, :]
    return _here(gl.convert_layout(x.to(dtype), LEFT))


@gluon.jit
def _product(n, s_weight, full_weight, i, TILES: gl.constexpr, HALVES: gl.constexpr):
    """Begin to multiply with a block of the weight: 64 rows TILES times, from its tile i on."""
    ACC: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, TILES * SIDE, 16])
    mbarrier.wait(full_weight.index(i), 0)
    block = s_weight.index(2 * i)._reinterpret(s_weight.dtype, [TILES * SIDE, C], HALVES)
    zero = gl.zeros([ROWS, TILES * SIDE], gl.float32, ACC)
    n = gl.convert_layout(n, gl.DotOperandLayout(0, ACC, k_width=2))
    return warpgroup_mma(n, block.permute((1, 0)), zero, use_acc=False, is_async=True)


@gluon.jit
def _outputs(acc, p_bias, i, outs, dtype: gl.constexpr):
    """Outputs of a block, in 16 bits."""
    if p_bias is not None:
        i_o = i * SIDE + gl.arange(0, acc.shape[1], gl.SliceLayout(0, acc.type.layout))
        acc += gl.load(p_bias + i_o, mask=i_o < outs, other=0.0).to(gl.float32)[None, :]
    return _here(acc.to(dtype))


@gluon.jit
def _store(block, d_out, t, first, i, STAGING: gl.constexpr, HALVES: gl.constexpr):
    """Send off a block of outputs; what lies beyond the last, TMA leaves out."""
    tma.store_wait(STAGING - 1)  # of the block that left this place
    t._reinterpret(t.dtype, block.shape, HALVES).store(block)
    fence_async_shared()
    tma.async_copy_shared_to_global(d_out, [first, i * SIDE], t)


@gluon.jit
def _fetch_weight(d_weight, s_weight, full_weight, WEIGHT: gl.constexpr, BLOCK: gl.constexpr):
    """Fetch the weight, block by block, so that the first products need not wait for all."""
    WHOLE: gl.constexpr = WEIGHT // BLOCK * BLOCK  # tiles in whole blocks
    for i in gl.static_range(WEIGHT):
        bar = full_weight.index(i // BLOCK * BLOCK)
        if i % BLOCK == 0:
            mbarrier.expect(bar, BLOCK * BYTES if i < WHOLE else BYTES)
        for half in gl.static_range(2):  # of the channels
            # A block's boxes: all of one half, then all of the other.
            if i < WHOLE:
                box = s_weight.index((2 * (i // BLOCK) + half) * BLOCK + i % BLOCK)
            else:
                box = s_weight.index(2 * i + half)
            at = [i * SIDE, half * SIDE]
            tma.async_copy_global_to_shared(d_weight, at, bar, box)


@gluon.jit
def _forward(
    g: gl.constexpr, d_x, d_weight, d_out, p_bias, p_stats, s_x, s_weight, s_out, s_norm, full_x,
    full_weight, rows, outs, blocks, eps, GROUPS: gl.constexpr, WEIGHT: gl.constexpr,
    BLOCK: gl.constexpr, STAGING: gl.constexpr, DEPTH: gl.constexpr, NORM_WEIGHT: gl.constexpr,
    NORM_BIAS: gl.constexpr, HALVES: gl.constexpr,
):  # fmt: skip
    """One group of four warps."""
    ACC: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK * SIDE, 16])
    LEFT: gl.constexpr = gl.DotOperandLayout(0, ACC, k_width=2)
    REST: gl.constexpr = WEIGHT % BLOCK  # tiles of the weight in no whole block: the last, or none
    dtype: gl.constexpr = s_x.dtype
    o_m = gl.arange(0, ROWS, gl.SliceLayout(1, ACC))
    # Programs take neighbouring rows: what is written at a time lies together.
    step = gl.num_programs(0) * (GROUPS * ROWS)
    start = (gl.program_id(0) + g * gl.num_programs(0)) * ROWS
    for i in gl.static_range(DEPTH):
        there = start + i * step < rows
        bar = full_x.index(g * DEPTH + i)
        t_x = s_x.index(g * DEPTH + i)
        mbarrier.expect(bar, BYTES, pred=there)
        tma.async_copy_global_to_shared(d_x, [start + i * step, 0], bar, t_x, pred=there)
    if g == 0:
        _fetch_weight(d_weight, s_weight, full_weight, WEIGHT, BLOCK)
    d, in_x = 0, 0
    o = 0
    for first in range(start, rows, step):
        bar = full_x.index(g * DEPTH + d)
        t_x = s_x.index(g * DEPTH + d)
        mbarrier.wait(bar, in_x)
        x = t_x.load(ACC)
        barrier()  # all have read
        i_row = first + DEPTH * step
        more = i_row < rows
        mbarrier.expect(bar, BYTES, pred=more)
        tma.async_copy_global_to_shared(d_x, [i_row, 0], bar, t_x, pred=more)
        d, in_x = following(d, in_x, DEPTH)
        n = _normal(x, p_stats, s_norm, first + o_m, rows, eps, NORM_WEIGHT, NORM_BIAS, LEFT)
        acc = _product(n, s_weight, full_weight, 0, BLOCK, HALVES)
        for b in range(blocks - 1):
            acc, n = warpgroup_mma_wait(0, deps=(acc, n))
            block = _outputs(acc, p_bias, b * BLOCK, outs, dtype)
            acc = _product(n, s_weight, full_weight, (b + 1) * BLOCK, BLOCK, HALVES)
            _store(block, d_out, s_out.index(g * STAGING + o), first, b * BLOCK, STAGING, HALVES)
            o = (o + 1) % STAGING
        acc, n = warpgroup_mma_wait(0, deps=(acc, n))
        last = (blocks - 1) * BLOCK
        block = _outputs(acc, p_bias, last, outs, dtype)
        if REST:
            acc = _product(n, s_weight, full_weight, WEIGHT - 1, 1, HALVES)
            _store(block, d_out, s_out.index(g * STAGING + o), first, last, STAGING, HALVES)
            o = (o + 1) % STAGING
            acc, n = warpgroup_mma_wait(0, deps=(acc, n))
            last = WEIGHT - 1
            block = _outputs(acc, p_bias, last, outs, dtype)
        _store(block, d_out, s_out.index(g * STAGING + o), first, last, STAGING, HALVES)
        o = (o + 1) % STAGING
    tma.store_wait(0)


@gluon.jit
def hopper_forward_kernel(
    d_x,  # [M, C], in boxes of 64 by 128
    d_weight,  # [O, C], in boxes of 64 by 64
    d_out,  # [M, O], contiguous, in boxes of 64 by 64 BLOCK, written
    p_norm_weight,  # [C] or None
    p_norm_bias,  # [C] or None
    p_bias,  # [O] or None
    p_stats,  # fp32 [2, M], written
    rows,
    outs,
    blocks,  # whole ones of the weight; not a constant, for a loop over them that stays a loop
    eps,
    GROUPS: gl.constexpr,  # of four warps
    WEIGHT: gl.constexpr,  # tiles of 64 rows of the weight
    BLOCK: gl.constexpr,  # tiles that are multiplied at a time; one at most is in no whole block
    STAGING: gl.constexpr,  # blocks of outputs on their way, for each group
    DEPTH: gl.constexpr,  # tiles of x that are fetched ahead, for each group
    REGISTERS: gl.constexpr,  # of a thread
    HALVES: gl.constexpr,  # layout in shared memory of columns by 64
    LINE: gl.constexpr,  # and of 128 numbers
):  # fmt: skip
    """As ``forward_kernel``; programs stay, and take rows after rows."""
    BAR: gl.constexpr = mbarrier.MBarrierLayout()
    dtype: gl.constexpr = d_x.dtype
    s_weight = gl.allocate_shared_memory(dtype, [2 * WEIGHT, SIDE, SIDE], d_weight.layout)
    s_x = gl.allocate_shared_memory(dtype, [GROUPS * DEPTH, ROWS, C], d_x.layout)
    s_out = gl.allocate_shared_memory(dtype, [GROUPS * STAGING, ROWS, BLOCK * SIDE], d_out.layout)
    s_norm = gl.allocate_shared_memory(gl.float32, [2, C], LINE)
    full_weight = gl.allocate_shared_memory(gl.int64, [WEIGHT, 1], BAR)
    full_x = gl.allocate_shared_memory(gl.int64, [GROUPS * DEPTH, 1], BAR)
    for i in gl.static_range(WEIGHT):
        mbarrier.init(full_weight.index(i), 1)
    for i in gl.static_range(GROUPS * DEPTH):
        mbarrier.init(full_x.index(i), 1)
    _keep(p_norm_weight, s_norm.index(0))
    _keep(p_norm_bias, s_norm.index(1))
    # Arguments are written out for each role: a tuple kept under a name loses its constants.
    if GROUPS == 2:
        gl.warp_specialize(
            [
                (_forward, (
                    gl.constexpr(0), d_x, d_weight, d_out, p_bias, p_stats, s_x, s_weight,
                    s_out, s_norm, full_x, full_weight, rows, outs, blocks, eps, GROUPS, WEIGHT,
                    BLOCK, STAGING, DEPTH, gl.constexpr(p_norm_weight is not None),
                    gl.constexpr(p_norm_bias is not None), HALVES,
                )),
                (_forward, (
                    gl.constexpr(1), d_x, d_weight, d_out, p_bias, p_stats, s_x, s_weight,
                    s_out, s_norm, full_x, full_weight, rows, outs, blocks, eps, GROUPS, WEIGHT,
                    BLOCK, STAGING, DEPTH, gl.constexpr(p_norm_weight is not None),
                    gl.constexpr(p_norm_bias is not None), HALVES,
                )),
            ],
            [4],
            [REGISTERS],
        )  # fmt: skip
    else:
        gl.static_assert(GROUPS == 3)
        gl.warp_specialize(
            [
                (_forward, (
                    gl.constexpr(0), d_x, d_weight, d_out, p_bias, p_stats, s_x, s_weight,
                    s_out, s_norm, full_x, full_weight, rows, outs, blocks, eps, GROUPS, WEIGHT,
                    BLOCK, STAGING, DEPTH, gl.constexpr(p_norm_weight is not None),
                    gl.constexpr(p_norm_bias is not None), HALVES,
                )),
                (_forward, (
                    gl.constexpr(1), d_x, d_weight, d_out, p_bias, p_stats, s_x, s_weight,
                    s_out, s_norm, full_x, full_weight, rows, outs, blocks, eps, GROUPS, WEIGHT,
                    BLOCK, STAGING, DEPTH, gl.constexpr(p_norm_weight is not None),
                    gl.constexpr(p_norm_bias is not None), HALVES,
                )),
                (_forward, (
                    gl.constexpr(2), d_x, d_weight, d_out, p_bias, p_stats, s_x, s_weight,
                    s_out, s_norm, full_x, full_weight, rows, outs, blocks, eps, GROUPS, WEIGHT,
                    BLOCK, STAGING, DEPTH, gl.constexpr(p_norm_weight is not None),
                    gl.constexpr(p_norm_bias is not None), HALVES,
                )),
            ],
            [4, 4],
            [REGISTERS, REGISTERS],
        )  # fmt: skip

"""The gradients of the transition's weights on Hopper's own instructions (Gluon).

As ``grad_weights_kernel``: products over the rows of a chunk, each split of them added to a partial
sum of its own. A program has 256 hidden columns and all 128 channels: two groups of four warps hold
the sums of 64 channels each, ``[C, U]``, and do nothing but multiply; one warp fetches by TMA.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from megafold.ops.gluon import following

ROWS = gl.constexpr(64)  # of a product
C = gl.constexpr(128)  # channels
SLICE = gl.constexpr(256)  # hidden columns of a program
STAGES = gl.constexpr(4)  # products that are fetched ahead: three tiles of 64 by 128 each


@gluon.jit
def _place(rows, hidden, per_split):
    """The first hidden column of a program, its split of the rows, and the rows from and to."""
    slices = 3 * hidden // SLICE
    i_split = gl.program_id(0) // slices
    first = i_split * per_split
    return gl.program_id(0) % slices * SLICE, i_split, first, gl.minimum(first + per_split, rows)


@gluon.jit
def _fetch(d_hidden, d_normalised, d_grad, tiles, full, empty, rows, hidden, per_split):
    """The warp that fetches; the activation goes with the gradient of the output."""
    s, in_s = 0, 0
    i_u, _, first, last = _place(rows, hidden, per_split)
    for i_row in range(first, last, ROWS):
        bar = full.index(s)
        mbarrier.wait(empty.index(s), in_s ^ 1)
        mbarrier.expect(bar, 3 * ROWS * C * 2)
        if i_u < 2 * hidden:
            tma.async_copy_global_to_shared(d_normalised, [i_row, 0], bar, tiles.index(3 * s))
        else:
            tma.async_copy_global_to_shared(d_grad, [i_row, 0], bar, tiles.index(3 * s))
        for h in gl.static_range(2):
            at = [i_row, i_u + h * C]
            tma.async_copy_global_to_shared(d_hidden, at, bar, tiles.index(3 * s + 1 + h))
        s, in_s = following(s, in_s, STAGES)


@gluon.jit
def _multiply(
    w: gl.constexpr, p_partial, tiles, full, empty, rows, hidden, per_split,
    FIRST: gl.constexpr, HALVES: gl.constexpr,
):  # fmt: skip
    """Four warps that have 64 of the channels."""
    SUM: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], instr_shape=[16, C, 16])
    LEFT: gl.constexpr = gl.DotOperandLayout(0, SUM, k_width=2)
    dtype: gl.constexpr = tiles.dtype
    i_u, i_split, first, last = _place(rows, hidden, per_split)
    sum_0 = gl.zeros([C // 2, C], gl.float32, SUM)
    sum_1 = gl.zeros([C // 2, C], gl.float32, SUM)
    s, in_s = 0, 0
    for _ in range(first, last, ROWS):
        mbarrier.wait(full.index(s), in_s)
        left = tiles.index(3 * s)._reinterpret(dtype, [2, ROWS, C // 2], HALVES).index(w)
        left = left.permute((1, 0)).load(LEFT)
        sum_0 = warpgroup_mma(left, tiles.index(3 * s + 1), sum_0, is_async=True)
        sum_1 = warpgroup_mma(left, tiles.index(3 * s + 2), sum_1, is_async=True)
        sum_0, sum_1, left = warpgroup_mma_wait(0, deps=(sum_0, sum_1, left))
        mbarrier.arrive(empty.index(s))
        s, in_s = following(s, in_s, STAGES)
    o_c = gl.arange(0, C // 2, gl.SliceLayout(1, SUM))
    o_u = gl.arange(0, C, gl.SliceLayout(0, SUM))
    p = p_partial + (i_split.to(gl.int64) * 3 * hidden + i_u) * C + w * (C // 2)
    p += o_u[None, :] * C + o_c[:, None]
    if not FIRST:
        sum_0 += gl.load(p)
    gl.store(p, sum_0)
    if not FIRST:
        sum_1 += gl.load(p + C * C)
    gl.store(p + C * C, sum_1)


@gluon.jit
def hopper_weights_kernel(
    d_hidden,  # [M, 3 H], contiguous, in boxes of 64 by 128, as all that follow are
    d_normalised,  # [M, C]
    d_grad,  # [M, C]: gradient of the output
    p_partial,  # fp32 [splits, 3 H, C], written, or added to
    rows,
    hidden,
    per_split,  # rows of a split, a multiple of 64
    FIRST: gl.constexpr,  # whether p_partial is written and not added to
    REGISTERS: gl.constexpr,
    HALVES: gl.constexpr,  # layout in shared memory
):
    """Partial sums of one chunk of rows."""
    BAR: gl.constexpr = mbarrier.MBarrierLayout()
    tiles = gl.allocate_shared_memory(d_hidden.dtype, [3 * STAGES, ROWS, C], d_hidden.layout)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BAR)
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BAR)
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), 1)
        mbarrier.init(empty.index(i), 2)
    gl.warp_specialize(
        [
            (_multiply, (
                gl.constexpr(0), p_partial, tiles, full, empty, rows, hidden, per_split, FIRST,
                HALVES,
            )),
            (_multiply, (
                gl.constexpr(1), p_partial, tiles, full, empty, rows, hidden, per_split, FIRST,
                HALVES,
            )),
            (_fetch, (
                d_hidden, d_normalised, d_grad, tiles, full, empty, rows, hidden, per_split,
            )),
        ],
        [4, 1],
        [REGISTERS, 24],
    )  # fmt: skip

"""LayerNorm + Linear in Triton: one kernel forward; one or two backward, and the sum of theirs.

Letters: M rows, C channels, O outputs. The normalised x exists in registers only, in the dtype
of the weight, as tensor cores take it; statistics are fp32 ``[2, M]`` (mean, one over the
standard deviation), and every product accumulates in fp32.

All that the backward pass needs for the parameters follows from two sums over rows, with x^ the
x normalised without scale and offset: ``S = grad^T x^`` ``[O, C]`` and ``t = sum of grad``
``[O]``. They give

- weight: ``S * norm_weight + t norm_bias^T``;  bias: ``t``
- norm_weight: ``sum over O of weight * S``;  norm_bias: ``weight^T t``

so that nothing else is summed over rows. Programs sum over rows of their own, and one kernel
adds up what they found, in a fixed order. Up to as many outputs as one program has registers for
(``backward_kernel``) the gradient of x is taken on the way, and x and the gradient of the output
are read once; beyond, the gradient of x (``grad_x_kernel``) and the sums (``product_kernel``)
each read them. (On Hopper GPUs there is one kernel for both: ``hopper_backward``.)

SHARED says that tensor cores take their operands from shared memory, as Hopper's do. The weight
then stays there, and t is a product with ones: it costs next to nothing, where a sum over the rows
of a tile has every warp wait for the others. Where operands are in registers there is no room for
either beside S.

Names: ``p_`` pointer, ``o_`` offsets, ``m_`` mask, ``b_`` block, ``i_`` index.
"""

from __future__ import annotations

import triton
import triton.language as tl

from megafold.ops.layer_norm.kernels import (
    centred_and_rstd,
    grad_of_normalised,
    load_channels,
)

COLUMNS: tl.constexpr = tl.constexpr(16)  # of ones: the least that tensor cores multiply


@triton.jit
def long(x):
    """A number in 64 bits; also one that Triton knows when it compiles."""
    return tl.full([], 0, tl.int64) + x


@triton.jit
def tile(p, first, o_m, o_n, stride):
    """Rows ``first + o_m``, columns ``o_n``: where they begin in 64 bits, within them in 32."""
    return p + long(first) * stride + (o_m[:, None] * stride + o_n[None, :])


@triton.jit
def load_tile(p, first, o_m, o_n, stride, left, width, EVEN_M: tl.constexpr, EVEN_N: tl.constexpr):
    """A tile of a matrix; zeros beyond ``left`` rows and ``width`` columns. EVEN: all are there."""
    p_tile = tile(p, first, o_m, o_n, stride)
    if EVEN_M and EVEN_N:
        return tl.load(p_tile)
    elif EVEN_M:
        return tl.load(p_tile, mask=(o_n < width)[None, :], other=0.0)
    elif EVEN_N:
        return tl.load(p_tile, mask=(o_m < left)[:, None], other=0.0)
    else:
        return tl.load(p_tile, mask=(o_m < left)[:, None] & (o_n < width)[None, :], other=0.0)


@triton.jit
def store_tile(p, b, first, o_m, o_n, stride, left, width, EVEN_N: tl.constexpr):
    """Store what there is of a tile."""
    p_tile = tile(p, first, o_m, o_n, stride)
    b = b.to(p.dtype.element_ty)
    if EVEN_N:
        tl.store(p_tile, b, mask=(o_m < left)[:, None])
    else:
        tl.store(p_tile, b, mask=(o_m < left)[:, None] & (o_n < width)[None, :])


@triton.jit
def load_turned(
    p, first, o_o, o_c, stride, left, width, EVEN_O: tl.constexpr, EVEN_C: tl.constexpr
):
    """The transpose ``[C, O]`` of a tile of the weight ``[O, C]``; zeros outside."""
    p_tile = p + long(first) * stride
    p_tile += o_o[None, :] * stride + o_c[:, None]
    if EVEN_O and EVEN_C:
        return tl.load(p_tile)
    else:
        return tl.load(p_tile, mask=(o_o < left)[None, :] & (o_c < width)[:, None], other=0.0)


@triton.jit
def rows_left(rows, first, BLOCK_M: tl.constexpr):
    """How many rows there are from ``first`` on, up to a block."""
    return tl.minimum(rows - first, BLOCK_M).to(tl.int32)


@triton.jit
def normalise(
    p_x, b_norm_weight, b_norm_bias, p_stats, first, o_m, o_c, stride_x, eps, rows, is_first,
    C: tl.constexpr, EVEN_C: tl.constexpr,
):  # fmt: skip
    """Rows of x normalised, with scale and offset, fp32; their statistics are stored on the way."""
    left = rows_left(rows, first, o_m.shape[0])
    b_x = load_tile(p_x, first, o_m, o_c, stride_x, left, C, False, EVEN_C).to(tl.float32)
    b_centred, b_mean, b_rstd = centred_and_rstd(b_x, (o_c < C)[None, :], C, eps)
    m_m = (o_m < left) & is_first
    tl.store(p_stats + first + o_m, b_mean, mask=m_m)
    tl.store(p_stats + rows + first + o_m, b_rstd, mask=m_m)
    # No channel, no offset: load_channels gives zero there.
    return b_centred * b_rstd[:, None] * b_norm_weight + b_norm_bias


@triton.jit
def put_out(b_n, b_w, p_bias, p_out, first, o_m, i_o, o_o, rows, outs, EVEN_O: tl.constexpr):
    """One tile of the output."""
    b_out = tl.dot(b_n, b_w)
    if p_bias is not None:
        b_out += load_channels(p_bias + i_o, o_o, o_o < outs - i_o, 0.0)
    left = rows_left(rows, first, o_m.shape[0])
    store_tile(p_out + i_o, b_out, first, o_m, o_o, outs, left, outs - i_o, EVEN_O)


@triton.jit
def forward_kernel(
    p_x,  # [M, C], neighbours along C
    p_norm_weight,  # [C] or None
    p_norm_bias,  # [C] or None
    p_weight,  # [O, C], neighbours along C
    p_bias,  # [O] or None
    p_out,  # [M, O], contiguous, written
    p_stats,  # fp32 [2, M], written
    stride_x,  # of a row
    stride_w,  # of a row
    eps,
    rows,
    outs,
    blocks,  # of BLOCK_M rows
    per_program,  # blocks of BLOCK_O outputs
    splits,  # programs that share BLOCK_M rows
    HELD: tl.constexpr,  # blocks of outputs, all there are, whose weight is at hand; or 0
    EVEN_O: tl.constexpr,  # BLOCK_O divides O
    BLOCK_M: tl.constexpr,
    BLOCK_O: tl.constexpr,
    C: tl.constexpr,
    BLOCK_C: tl.constexpr,  # the power of two from C on
):
    """A program normalises BLOCK_M rows at a time and multiplies them with the weight.

    With HELD it takes one block of rows after another, and reads ahead; without, one block of
    rows with ``per_program`` blocks of outputs.
    """
    EVEN_C: tl.constexpr = BLOCK_C == C
    o_m, o_c, o_o = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_C), tl.arange(0, BLOCK_O)
    PRODUCT: tl.constexpr = p_weight.dtype.element_ty
    b_norm_weight = load_channels(p_norm_weight, o_c, o_c < C, 1.0)
    b_norm_bias = load_channels(p_norm_bias, o_c, o_c < C, 0.0)
    if HELD:
        held = ()
        for k in tl.static_range(HELD):
            i_o = k * BLOCK_O
            held += (load_turned(p_weight, i_o, o_o, o_c, stride_w, outs - i_o, C, EVEN_O, EVEN_C),)
        for i in range(tl.program_id(0), blocks, tl.num_programs(0)):
            first = long(i) * BLOCK_M
            b_n = normalise(
                p_x, b_norm_weight, b_norm_bias, p_stats, first, o_m, o_c, stride_x, eps, rows,
                True, C, EVEN_C,
            ).to(PRODUCT)  # fmt: skip
            for k in tl.static_range(HELD):
                i_o = k * BLOCK_O
                put_out(b_n, held[k], p_bias, p_out, first, o_m, i_o, o_o, rows, outs, EVEN_O)
    else:
        i_split = tl.program_id(0) % splits
        first = long(tl.program_id(0) // splits) * BLOCK_M
        b_n = normalise(
            p_x, b_norm_weight, b_norm_bias, p_stats, first, o_m, o_c, stride_x, eps, rows,
            i_split == 0, C, EVEN_C,
        ).to(PRODUCT)  # fmt: skip
        last = tl.minimum((i_split + 1) * per_program, tl.cdiv(outs, BLOCK_O))
        for i in range(i_split * per_program, last):
            i_o = i * BLOCK_O
            b_w = load_turned(p_weight, i_o, o_o, o_c, stride_w, outs - i_o, C, EVEN_O, EVEN_C)
            put_out(b_n, b_w, p_bias, p_out, first, o_m, i_o, o_o, rows, outs, EVEN_O)


@triton.jit
def load_normal(
    p_x, p_stats, first, o_m, o_c, stride_x, rows, left, C: tl.constexpr, EVEN_C: tl.constexpr
):
    """Rows of x normalised without scale and offset, fp32, and one over their deviation."""
    b_x = load_tile(p_x, first, o_m, o_c, stride_x, left, C, False, EVEN_C).to(tl.float32)
    b_mean = tl.load(p_stats + first + o_m, mask=o_m < left, other=0.0)
    b_rstd = tl.load(p_stats + rows + first + o_m, mask=o_m < left, other=0.0)
    b_normal = (b_x - b_mean[:, None]) * b_rstd[:, None]
    return b_normal if EVEN_C else tl.where((o_c < C)[None, :], b_normal, 0.0), b_rstd


@triton.jit
def add_rows(b_total, b_grad, SHARED: tl.constexpr):
    """Add the sum over the rows of a tile: as a product with ``[rows, COLUMNS]`` ones, or not."""
    if SHARED:
        b_ones = tl.full([b_grad.shape[0], COLUMNS], 1.0, b_grad.dtype)
        return tl.dot(tl.trans(b_grad), b_ones, b_total)
    else:
        return b_total + tl.sum(b_grad.to(tl.float32), axis=0)


@triton.jit
def leave_sums(
    b_product, b_total, p_weight, p_products, p_totals, p_norms, i_group, i_o, o_o, o_c,
    stride_w, outs, C: tl.constexpr, EVEN_C: tl.constexpr, SHARED: tl.constexpr,
):  # fmt: skip
    """Write S and t of one group of rows, and what they add to the gradients of the norm's.

    The groups' slices of outputs follow one another in ``p_norms`` ``[2, groups * slices, C]``.
    """
    left = outs - i_o
    p_products += long(i_group) * outs * C
    store_tile(p_products, b_product, i_o, o_o, o_c, C, left, C, EVEN_C)
    if p_totals is not None:
        p_totals += long(i_group) * outs + i_o
        if SHARED:  # every column is the same
            b_total = tl.sum(b_total, axis=1) * (1.0 / COLUMNS)
        tl.store(p_totals + o_o, b_total, mask=o_o < left)
    if p_norms is not None:
        # Read again a few rows at a time: beside S there is no room for the weight in registers.
        tl.debug_barrier()
        ROWS: tl.constexpr = 64 if o_o.shape[0] > 64 else o_o.shape[0]
        o_r = tl.arange(0, ROWS)
        b_of_weight = tl.zeros([ROWS, o_c.shape[0]], tl.float32)
        b_of_bias = tl.zeros([ROWS, o_c.shape[0]], tl.float32)
        for i in range(0, o_o.shape[0], ROWS):
            there, i_row = left - i, i_o + i
            b_w = load_tile(p_weight, i_row, o_r, o_c, stride_w, there, C, False, EVEN_C)
            b_s = load_tile(p_products, i_row, o_r, o_c, C, there, C, False, EVEN_C)
            b_of_weight += b_w.to(tl.float32) * b_s
            if p_totals is not None:
                b_t = tl.load(p_totals + i + o_r, mask=o_r < there, other=0.0)
                b_of_bias += b_w.to(tl.float32) * b_t[:, None]
        p_own = p_norms + tl.program_id(0) * C + o_c
        tl.store(p_own, tl.sum(b_of_weight, axis=0), mask=o_c < C)
        if p_totals is not None:
            p_own += tl.num_programs(0) * C
            tl.store(p_own, tl.sum(b_of_bias, axis=0), mask=o_c < C)


@triton.jit
def backward_kernel(
    p_grad,  # [M, O], neighbours along O
    p_x,  # [M, C], neighbours along C
    p_norm_weight,  # [C] or None
    p_weight,  # [O, C], neighbours along C
    p_stats,  # fp32 [2, M]
    p_added,  # [M, C], neighbours along C, what is added to the gradient of x; or None
    p_grad_x,  # [M, C], contiguous, written; or None
    p_products,  # fp32 [groups, O, C], written: S of each group of rows; or None
    p_totals,  # fp32 [groups, O], written: t of each group; or None
    p_norms,  # fp32 [2, groups, C], written: gradients of the norm's; or None
    stride_g,  # of a row
    stride_x,
    stride_w,
    stride_a,  # of p_added
    rows,
    outs,
    blocks,  # of BLOCK_M rows
    per_group,  # blocks of one program
    EVEN_O: tl.constexpr,  # BLOCK_O is O
    SHARED: tl.constexpr,  # operands of tensor cores lie in shared memory; see the top
    BLOCK_M: tl.constexpr,
    BLOCK_O: tl.constexpr,
    C: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """One program walks over a group of rows: S and t of all outputs, and the gradient of x."""
    EVEN_C: tl.constexpr = BLOCK_C == C
    PRODUCT: tl.constexpr = p_weight.dtype.element_ty
    i_group = tl.program_id(0)
    o_m, o_c, o_o = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_C), tl.arange(0, BLOCK_O)
    if SHARED:
        b_w = load_tile(p_weight, 0, o_o, o_c, stride_w, outs, C, EVEN_O, EVEN_C)
    b_norm_weight = load_channels(p_norm_weight, o_c, o_c < C, 1.0)
    b_product = tl.zeros([BLOCK_O, BLOCK_C], tl.float32)
    b_total = tl.zeros([BLOCK_O, COLUMNS] if SHARED else [BLOCK_O], tl.float32)
    for i in range(i_group * per_group, tl.minimum((i_group + 1) * per_group, blocks)):
        first = long(i) * BLOCK_M
        left = rows_left(rows, first, BLOCK_M)
        b_grad = load_tile(p_grad, first, o_m, o_o, stride_g, left, outs, False, EVEN_O)
        b_normal, b_rstd = load_normal(
            p_x, p_stats, first, o_m, o_c, stride_x, rows, left, C, EVEN_C
        )  # fmt: skip
        if p_grad_x is not None:
            if SHARED:
                b_of_n = tl.dot(b_grad, b_w)
            else:
                o_k = tl.arange(0, 32)
                b_of_n = tl.zeros([BLOCK_M, BLOCK_C], tl.float32)
                for i_o in range(0, BLOCK_O, 32):
                    there = outs - i_o
                    b_g = load_tile(
                        p_grad + i_o, first, o_m, o_k, stride_g, left, there, False, EVEN_O
                    )  # fmt: skip
                    b_w = load_tile(p_weight, i_o, o_k, o_c, stride_w, there, C, EVEN_O, EVEN_C)
                    b_of_n = tl.dot(b_g, b_w, b_of_n)
        if p_products is not None:
            b_product = tl.dot(tl.trans(b_grad), b_normal.to(PRODUCT), b_product)
        if p_totals is not None:
            b_total = add_rows(b_total, b_grad, SHARED)
        if p_grad_x is not None:
            b_grad_x = grad_of_normalised(b_of_n * b_norm_weight, b_normal, b_rstd, C)
            if p_added is not None:
                b_grad_x += load_tile(
                    p_added, first, o_m, o_c, stride_a, left, C, False, EVEN_C
                ).to(tl.float32)
            store_tile(p_grad_x, b_grad_x, first, o_m, o_c, C, left, C, EVEN_C)
    if p_products is not None:
        leave_sums(
            b_product, b_total, p_weight, p_products, p_totals, p_norms, i_group, 0,
            o_o, o_c, stride_w, outs, C, EVEN_C, SHARED,
        )  # fmt: skip


@triton.jit
def grad_x_kernel(
    p_grad,  # as in backward_kernel
    p_x,
    p_norm_weight,
    p_weight,
    p_stats,
    p_added,
    p_grad_x,  # [M, C], contiguous, written
    stride_g,
    stride_x,
    stride_w,
    stride_a,
    rows,
    outs,
    blocks,
    per_group,
    STEPS: tl.constexpr,  # blocks of BLOCK_O outputs
    EVEN_O: tl.constexpr,  # BLOCK_O divides O
    BLOCK_M: tl.constexpr,
    BLOCK_O: tl.constexpr,
    C: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """The gradient of x. One loop over blocks of rows and their outputs, so that what the next
    block of rows begins with is read while this one ends.
    """
    EVEN_C: tl.constexpr = BLOCK_C == C
    i_group = tl.program_id(0)
    o_m, o_c, o_o = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_C), tl.arange(0, BLOCK_O)
    b_norm_weight = load_channels(p_norm_weight, o_c, o_c < C, 1.0)
    b_of_n = tl.zeros([BLOCK_M, BLOCK_C], tl.float32)
    last = tl.minimum((i_group + 1) * per_group, blocks)
    for i_step in range(i_group * per_group * STEPS, last * STEPS):
        first = long(i_step // STEPS) * BLOCK_M
        left = rows_left(rows, first, BLOCK_M)
        i_o = i_step % STEPS * BLOCK_O
        b_grad = load_tile(
            p_grad + i_o, first, o_m, o_o, stride_g, left, outs - i_o, False, EVEN_O
        )  # fmt: skip
        b_w = load_tile(p_weight, i_o, o_o, o_c, stride_w, outs - i_o, C, EVEN_O, EVEN_C)
        b_of_n = tl.dot(b_grad, b_w, b_of_n)
        if i_step % STEPS == STEPS - 1:
            b_normal, b_rstd = load_normal(
                p_x, p_stats, first, o_m, o_c, stride_x, rows, left, C, EVEN_C
            )  # fmt: skip
            b_grad_x = grad_of_normalised(b_of_n * b_norm_weight, b_normal, b_rstd, C)
            if p_added is not None:
                b_grad_x += load_tile(
                    p_added, first, o_m, o_c, stride_a, left, C, False, EVEN_C
                ).to(tl.float32)
            store_tile(p_grad_x, b_grad_x, first, o_m, o_c, C, left, C, EVEN_C)
            b_of_n = tl.zeros([BLOCK_M, BLOCK_C], tl.float32)


@triton.jit
def product_kernel(
    p_grad,  # as in backward_kernel
    p_x,
    p_weight,
    p_stats,
    p_products,
    p_totals,
    p_norms,  # fp32 [2, groups * SLICES, C], written; or None
    stride_g,
    stride_x,
    stride_w,
    rows,
    outs,
    blocks,
    per_group,
    SLICES: tl.constexpr,  # blocks of BLOCK_O outputs
    EVEN_O: tl.constexpr,  # BLOCK_O divides O
    SHARED: tl.constexpr,  # operands of tensor cores lie in shared memory; see the top
    BLOCK_M: tl.constexpr,
    BLOCK_O: tl.constexpr,
    C: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """S and t of BLOCK_O outputs over one group of rows; SLICES programs share the group."""
    EVEN_C: tl.constexpr = BLOCK_C == C
    PRODUCT: tl.constexpr = p_weight.dtype.element_ty
    i_o = tl.program_id(0) % SLICES * BLOCK_O
    i_group = tl.program_id(0) // SLICES
    o_m, o_c, o_o = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_C), tl.arange(0, BLOCK_O)
    b_product = tl.zeros([BLOCK_O, BLOCK_C], tl.float32)
    b_total = tl.zeros([BLOCK_O, COLUMNS] if SHARED else [BLOCK_O], tl.float32)
    for i in range(i_group * per_group, tl.minimum((i_group + 1) * per_group, blocks)):
        first = long(i) * BLOCK_M
        left = rows_left(rows, first, BLOCK_M)
        b_grad = load_tile(
            p_grad + i_o, first, o_m, o_o, stride_g, left, outs - i_o, False, EVEN_O
        )  # fmt: skip
        b_normal, _ = load_normal(p_x, p_stats, first, o_m, o_c, stride_x, rows, left, C, EVEN_C)
        b_product = tl.dot(tl.trans(b_grad), b_normal.to(PRODUCT), b_product)
        if p_totals is not None:
            b_total = add_rows(b_total, b_grad, SHARED)
    leave_sums(
        b_product, b_total, p_weight, p_products, p_totals, p_norms, i_group, i_o,
        o_o, o_c, stride_w, outs, C, EVEN_C, SHARED,
    )  # fmt: skip


@triton.jit
def finish_kernel(
    p_products,  # fp32 [groups, O, C]: S of each group of rows
    p_totals,  # fp32 [groups, O]: t of each; or None
    p_of_weight,  # fp32 [parts_weight, C]: what each program found for the norm's; or None
    p_of_bias,  # fp32 [parts_bias, C]; or None
    p_norm_weight,  # [C] or None
    p_norm_bias,  # [C] or None
    p_grad_weight,  # [O, C], contiguous, written; or None
    p_grad_bias,  # [O], written; or None
    p_grad_norm_weight,  # [C], written; or None
    p_grad_norm_bias,  # [C], written; or None
    groups,
    parts_weight,
    parts_bias,
    outs,
    C: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Add up the groups: a program for BLOCK_C channels of an output, or BLOCK_N of the norm's."""
    BLOCKS_C: tl.constexpr = (C + BLOCK_C - 1) // BLOCK_C
    i_o, i_c = tl.program_id(0) // BLOCKS_C, tl.program_id(0) % BLOCKS_C
    if i_o < outs:
        o_c = i_c * BLOCK_C + tl.arange(0, BLOCK_C)
        m_c = o_c < C
        o_g = tl.arange(0, BLOCK_G).to(tl.int64)
        b_total = 0.0
        if p_totals is not None:
            b_totals = tl.zeros([BLOCK_G], tl.float32)
            for i_g in range(0, groups, BLOCK_G):
                p_total = p_totals + (i_g + o_g) * outs + i_o
                b_totals += tl.load(p_total, mask=i_g + o_g < groups, other=0.0)
            b_total = tl.sum(b_totals, axis=0)
        if p_grad_weight is not None:
            p_own = p_products + long(i_o) * C
            b_product = add_up(p_own, groups, long(outs) * C, o_c, m_c, BLOCK_G)
            b_grad = b_product[None, :] * load_channels(p_norm_weight, o_c, m_c, 1.0)
            if p_norm_bias is not None:
                b_grad += b_total * load_channels(p_norm_bias, o_c, m_c, 0.0)
            p_own = p_grad_weight + long(i_o) * C + o_c[None, :]
            tl.store(p_own, b_grad.to(p_grad_weight.dtype.element_ty), mask=m_c[None, :])
        if p_grad_bias is not None and i_c == 0:
            tl.store(p_grad_bias + i_o, b_total.to(p_grad_bias.dtype.element_ty))
    else:
        o_n = (tl.program_id(0) - outs * BLOCKS_C) * BLOCK_N + tl.arange(0, BLOCK_N)
        m_n = o_n < C
        if p_grad_norm_weight is not None:
            b = add_up(p_of_weight, parts_weight, C, o_n, m_n, BLOCK_P)
            tl.store(p_grad_norm_weight + o_n, b.to(p_grad_norm_weight.dtype.element_ty), mask=m_n)
        if p_grad_norm_bias is not None:
            b = add_up(p_of_bias, parts_bias, C, o_n, m_n, BLOCK_P)
            tl.store(p_grad_norm_bias + o_n, b.to(p_grad_norm_bias.dtype.element_ty), mask=m_n)


@triton.jit
def add_up(p, number, stride, o_c, m_c, BLOCK_G: tl.constexpr):
    """The sum over ``number`` rows of columns ``o_c``, always in one order."""
    o_g = tl.arange(0, BLOCK_G).to(tl.int64)
    b_sums = tl.zeros([BLOCK_G, o_c.shape[0]], tl.float32)
    for i_g in range(0, number, BLOCK_G):
        p_tile = p + (i_g + o_g)[:, None] * stride + o_c[None, :]
        b_sums += tl.load(p_tile, mask=(i_g + o_g < number)[:, None] & m_c[None, :], other=0.0)
    return tl.sum(b_sums, axis=0)

"""What the kernels of EvoAttention share: tiles, rows, logits, weights."""

from __future__ import annotations

import triton
import triton.language as tl

from megafold.ops.exact import exponential
from megafold.ops.launcher import Layout

LOG2E: tl.constexpr = tl.constexpr(1.4426950408889634)


@triton.jit
def long(x):
    """A number in 64 bits; also one that Triton knows when it compiles."""
    return tl.full([], 0, tl.int64) + x


@triton.jit
def load_tile(
    p, start, o_n, o_d, stride_n, stride_d, n, d, EVEN_N: tl.constexpr, EVEN_D: tl.constexpr
):
    """Rows ``start + o_n``, columns ``o_d`` of a matrix ``[n, d]``; zeros beyond its ends."""
    # 64-bit offsets: one row, times its stride, may lie beyond 2**31 elements. Those of the
    # tile do not change in a loop; what moves is a scalar.
    p_tile = p + long(start) * stride_n
    p_tile += o_n.to(tl.int64)[:, None] * stride_n + o_d.to(tl.int64)[None, :] * stride_d
    if EVEN_N and EVEN_D:
        return tl.load(p_tile)
    elif EVEN_D:
        return tl.load(p_tile, mask=(start + o_n < n)[:, None], other=0.0)
    elif EVEN_N:
        return tl.load(p_tile, mask=(o_d < d)[None, :], other=0.0)
    else:
        return tl.load(p_tile, mask=(start + o_n < n)[:, None] & (o_d < d)[None, :], other=0.0)


@triton.jit
def store_tile(p, b, start, o_n, o_d, stride_n, n, d, EVEN: tl.constexpr):
    """Store what :func:`load_tile` loads; the columns are contiguous."""
    p_tile = p + long(start) * stride_n + (o_n.to(tl.int64)[:, None] * stride_n + o_d[None, :])
    b = b.to(p.dtype.element_ty)
    if EVEN:
        tl.store(p_tile, b)
    else:
        tl.store(p_tile, b, mask=(start + o_n < n)[:, None] & (o_d < d)[None, :])


@triton.jit
def store_gradient(
    p, b, i_row, i_head, start, o_n, o_d, stride_b, stride_s, stride_n, stride_h,
    rows, n, heads, d, EVEN: tl.constexpr, AS_OPERANDS: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """Store a tile of one head in the gradient of an operand ``[B, S, N, H, D]``.

    It lies as the operand does, whose strides these are (AS_OPERANDS), or is contiguous.
    """
    if AS_OPERANDS:
        p = at(p, i_row, i_head, rows, stride_b, stride_s, stride_h, STEP)
        store_tile(p, b, start, o_n, o_d, stride_n, n, d, EVEN)
    else:
        p += (i_row.to(tl.int64) * n * heads + i_head) * d
        store_tile(p, b, start, o_n, o_d, heads * d, n, d, EVEN)


@triton.jit
def load_row(p, start, o, n, EVEN: tl.constexpr):
    """Numbers ``start + o`` of ``[n]``, contiguous; zeros beyond its end."""
    if EVEN:
        return tl.load(p + start + o)
    else:
        return tl.load(p + start + o, mask=start + o < n, other=0.0)


@triton.jit
def load_shift(p, start, o, n, EVEN: tl.constexpr, EXACT: tl.constexpr, FP32: tl.constexpr):
    """The shifts of queries ``start + o`` as :func:`weights` takes them.

    For fp32 they are kept as logits, whichever way its products go: torch's setting may change
    between the passes.
    """
    b_shift = load_row(p, start, o, n, EVEN)
    if FP32 and not EXACT:
        b_shift = b_shift * LOG2E
    return b_shift


@triton.jit
def load_kept(p_mask, start, o_k, stride_mk, keys, HAS_MASK: tl.constexpr, EVEN: tl.constexpr):
    """Which keys ``start + o_k`` of one row there are and the mask allows, bool."""
    if HAS_MASK:
        p = p_mask + long(start) * stride_mk + o_k.to(tl.int64) * stride_mk
        if EVEN:
            return tl.load(p) != 0
        else:
            return tl.load(p, mask=start + o_k < keys, other=0) != 0
    else:
        return start + o_k < keys


@triton.jit
def ahead(start, BLOCK: tl.constexpr, n, EVEN: tl.constexpr):
    """Where the next block begins; after the last one of an even number, the last one again.

    So that reading a block ahead needs no mask where blocks fit.
    """
    if EVEN:
        return tl.minimum(start + BLOCK, n - BLOCK)
    else:
        return start + BLOCK


@triton.jit
def row(i_group, r, rows_per_bias, ROWS: tl.constexpr):
    """Row ``r`` of a group of rows, counted over B S.

    The last group of a bias may be short; it does its last row more than once, with one result.
    """
    groups = tl.cdiv(rows_per_bias, ROWS)
    i_in_bias = tl.minimum((i_group % groups) * ROWS + r, rows_per_bias - 1)
    return (i_group // groups) * rows_per_bias + i_in_bias


def step_of(width: int, *operands: Layout) -> int:
    """What :func:`at` can tell Triton of heads of ``[B, S, N, H, D]``: 8; or 1, nothing."""
    numbers = [width, *(strides[3] for strides, *_ in operands)]
    return 8 if any(n % 16 for n in numbers) and not any(n % 8 for n in numbers) else 1


@triton.jit
def at(p, i_row, i_head, rows, stride_b, stride_s, stride_h, STEP: tl.constexpr):
    """Where row ``i_row`` (over B S) and one head begin in ``[B, S, N, H, D]``.

    Triton sees of a number whether it is a multiple of 16, and moves 16 bytes at a time if so.
    Heads of 8, 24 or 40 channels and their distance are no such multiples; divided by STEP, and
    multiplied again, they are multiples of 8 for all to see.
    """
    i_batch, i_s = (i_row // rows).to(tl.int64), (i_row % rows).to(tl.int64)
    stride_h = stride_h // STEP * STEP
    return p + i_batch * stride_b + i_s * stride_s + i_head.to(tl.int64) * stride_h


@triton.jit
def next_row(p, i_next, rows, stride_b, stride_s):
    """From the row before row ``i_next`` (over B S) to that row."""
    step = long(stride_s)
    if i_next % rows == 0:
        step = long(stride_b) - long(rows - 1) * stride_s
    return p + step


@triton.jit
def grad_logits(b_p, b_dp, b_inverse, b_delta, EXACT: tl.constexpr):
    """Gradient of the logits, from unnormalised weights and the gradient of the weights.

    One over the sum stands with the gradients: two operations, not three. With EXACT (delta is
    not divided by the sum then) everything cancels as it does in PyTorch.
    """
    if EXACT:
        return (b_p * b_inverse) * (b_dp - b_delta)
    else:
        return b_p * (b_dp * b_inverse - b_delta)


@triton.jit
def logits(b_s, b_bias, b_kept, scale, HAS_BIAS: tl.constexpr, SELECT: tl.constexpr):
    """Logits of ``[queries, keys]`` from products of q and k; -inf where a key is left out.

    Forward and backward go through these same operations, so that both see the same bits.
    """
    b_x = b_s * scale
    if HAS_BIAS:
        b_x += b_bias
    if SELECT:
        b_x = tl.where(b_kept[None, :], b_x, float("-inf"))
    return b_x


@triton.jit
def shift_of(b_max, EXACT: tl.constexpr):
    """What :func:`weights` takes from logits whose maximum is ``b_max``; 0 where no key is left."""
    b_shift = b_max
    if not EXACT:
        b_shift = b_max * LOG2E
    return tl.where(b_max == float("-inf"), 0.0, b_shift)  # -inf - -inf would be NaN


@triton.jit
def weights(b_x, b_shift, EXACT: tl.constexpr):
    """``exp(b_x - maximum)``, from logits and the shift of their maximum.

    The hardware's power of two is good to 22 bits: plenty for 16-bit results and for TF32; not
    for full fp32 (EXACT).
    """
    if EXACT:
        return exponential(b_x - b_shift)
    else:
        return tl.exp2(b_x * LOG2E - b_shift)


@triton.jit
def rescaling(b_max, b_new, EXACT: tl.constexpr):
    """What weights found with the maximum ``b_max`` are multiplied by where it becomes ``b_new``.

    Exactly one where it stays: :func:`weights` of a maximum would be off by what the shift of a
    very large one is rounded by, once in every block of keys.
    """
    b_new = tl.where(b_new == float("-inf"), 0.0, b_new)
    if EXACT:
        return weights(b_max, b_new, EXACT)
    else:
        return tl.exp2((b_max - b_new) * LOG2E)


@triton.jit
def load_bias(
    p, start, o_q, o_k, stride_bq, stride_bk, queries, keys,
    EVEN_Q: tl.constexpr, EVEN_K: tl.constexpr,
):  # fmt: skip
    """A tile ``[queries, keys]`` of the bias in fp32, its keys beginning at ``start``."""
    p_tile = p + long(start) * stride_bk
    p_tile += o_q.to(tl.int64)[:, None] * stride_bq + o_k.to(tl.int64)[None, :] * stride_bk
    if EVEN_Q and EVEN_K:
        b = tl.load(p_tile)
    else:
        m = (o_q < queries)[:, None] & (start + o_k < keys)[None, :]
        b = tl.load(p_tile, mask=m, other=0.0)
    return b.to(tl.float32)

"""What belongs to one query or one key of EvoAttention, folded into products of matrices.

The gradients take the logarithm of its query's sum of weights from every logit, leave logits out
whose key is masked, and take its query's delta from every gradient of a weight. All of that is
linear in numbers of one query or one key. So it can be part of the products themselves: sixteen
more columns beside q and beside k, which tensor cores multiply and add up in fp32 with the rest.
A number stands in three columns, each of which has what the ones before leave of it: its 24 bits.

============ ======================== ==========================================
column       beside q (and grad)      beside k
============ ======================== ==========================================
0, 1, 2      parts of -log2(sum)      what the parts are multiplied by
3            a large number           its negative where a key is masked, or 0
4, 5, 6      parts of -delta          0 (beside v: what the parts are multiplied by)
============ ======================== ==========================================

A logit so found does not have the very bits that the forward pass saw: weights are off by about
2**-22 times the logarithm. Where the shift of any query, the maximum over its keys, is more than
:data:`PEAK`, the kernels of ``backward`` run instead, which need no such care.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from megafold.ops.evo_attention.tiles import LOG2E, at, load_kept, load_tile

COLUMNS = 16  # the fewest that tensor cores multiply
PEAK = 1024.0  # of a shift, in powers of two: weights are good to 2e-4
DELTA = 4  # the first column of delta
OF_PROGRAMS = 16  # where the flags of programs begin; the first of all flags is theirs together
_PEAK = tl.constexpr(PEAK)
_OF_PROGRAMS = tl.constexpr(OF_PROGRAMS)


class Parts(NamedTuple):
    """What the three parts of a number are multiplied by, and the large number.

    fp16 ends at 65,504; with its first part in units of 4,096 numbers reach 2**28. The square of
    the large number is beyond every logit.
    """

    first: float
    second: float
    third: float
    large: float


PARTS = {
    torch.bfloat16: Parts(1.0, 1.0, 1.0, 1e15),
    torch.float16: Parts(4096.0, 1.0, 1.0 / 1024.0, 6e4),
}


@triton.jit
def _columns():
    """Their numbers ``[1, 2, 8]``: by the 16 bytes that lie together."""
    return tl.arange(0, 2)[None, :, None] * 8 + tl.arange(0, 8)[None, None, :]


@triton.jit
def _in_lines(o_n, o_c):
    """Where columns ``o_c`` of rows ``o_n`` ``[rows, 1, 1]`` lie, of those of one head or row.

    TMA takes as long for 32 bytes as for 128, so it reads four rows as one line. It swizzles lines
    of 128 bytes; products read rows swizzled by 32. So the parts of 16 bytes are in the order in
    which the first leaves what the second expects.
    """
    line = o_n // 4
    part = (o_n % 4 * 2 + (o_c // 8 ^ (line & 1))) ^ (line & 7)
    return line.to(tl.int64) * 64 + part * 8 + o_c % 8


@triton.jit
def _in_parts(o_c, b, FIRST: tl.constexpr, b_e, UNIT: tl.constexpr):
    """Put numbers ``b`` ``[rows, 1, 1]`` into three columns of ``b_e``, in its dtype."""
    for i in tl.static_range(3):
        b_p = (b / UNIT[i]).to(b_e.dtype)
        b -= b_p.to(tl.float32) * UNIT[i]
        b_e = tl.where(o_c == FIRST + i, b_p, b_e)
    return b_e


@triton.jit
def _fold_queries(
    i, p_out, p_grad, p_stats, p_beside, p_delta, p_beyond,
    stride_gb, stride_gs, stride_gn, stride_gh, stride_gd,
    scale, rows, stride_inverse, queries, heads, width,
    STEP: tl.constexpr, UNIT: tl.constexpr, LARGE: tl.constexpr, EVEN_Q: tl.constexpr,
    EVEN_D: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """The columns beside BLOCK queries of one head in one row."""
    i_head = i % heads
    blocks = tl.cdiv(queries, BLOCK)
    i_q = ((i // heads) % blocks) * BLOCK
    i_row = i // (heads * blocks)
    o_q = tl.arange(0, BLOCK)
    o_d = tl.arange(0, BLOCK_D)
    o_c = _columns()
    width = width // STEP * STEP
    m = i_q + o_q < queries
    p_out += (i_row.to(tl.int64) * queries * heads + i_head) * width
    p_grad = at(p_grad, i_row, i_head, rows, stride_gb, stride_gs, stride_gh, STEP)
    b_o = load_tile(p_out, i_q, o_q, o_d, heads * width, 1, queries, width, EVEN_Q, EVEN_D)
    b_g = load_tile(p_grad, i_q, o_q, o_d, stride_gn, stride_gd, queries, width, EVEN_Q, EVEN_D)
    b_delta = tl.sum(b_o.to(tl.float32) * b_g.to(tl.float32), 1)[:, None, None]
    i_first = (i_row.to(tl.int64) * heads + i_head) * queries
    o_n = i_q + o_q[:, None, None]
    o_r = i_first + o_n
    m_r = m[:, None, None]
    b_shift = tl.load(p_stats + o_r, mask=m_r, other=0.0)
    b_inverse = tl.load(p_stats + stride_inverse + o_r, mask=m_r, other=0.0)
    b_beyond = ((tl.abs(b_shift) <= _PEAK) == 0).to(tl.int32)  # of NaN, too
    tl.store(p_beyond + _OF_PROGRAMS + i, tl.max(tl.reshape(b_beyond, [BLOCK]), 0).to(tl.int8))
    # A query that has no key has no weights: a logarithm beyond every exponential.
    b_none = b_inverse == 0.0
    b_log = b_shift + tl.where(b_none, 16384.0, -tl.log2(tl.where(b_none, 1.0, b_inverse)))
    b_e = tl.zeros([BLOCK, 2, 8], p_beside.dtype.element_ty)
    b_e = _in_parts(o_c, -b_log / (scale * LOG2E), 0, b_e, UNIT)
    b_e = _in_parts(o_c, -b_delta, 4, b_e, UNIT)
    b_e = tl.where(o_c == 3, tl.full([], LARGE, tl.float32).to(b_e.dtype), b_e)
    b_e = tl.where(m_r, b_e, tl.zeros_like(b_e))  # beyond the last query, in its line
    lines = tl.cdiv(queries, 4)
    p_beside += (i_row.to(tl.int64) * heads + i_head) * lines * 64
    tl.store(p_beside + _in_lines(o_n, o_c), b_e, mask=o_n < lines * 4)
    tl.store(p_delta + o_r, b_delta * b_inverse, mask=m_r)


@triton.jit
def _fold_keys(
    i, p_mask, p_beside, stride_mb, stride_ms, stride_mk, rows, keys,
    UNIT: tl.constexpr, LARGE: tl.constexpr, HAS_MASK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The columns beside BLOCK keys of one row."""
    blocks = tl.cdiv(keys, BLOCK)
    i_row = i // blocks
    o_k = (i % blocks) * BLOCK + tl.arange(0, BLOCK)
    o_n = o_k[:, None, None]
    o_c = _columns()
    m = o_n < keys
    b = tl.zeros([BLOCK, 2, 8], tl.float32)
    for part in tl.static_range(3):
        b = tl.where((o_c == part) & m, UNIT[part], b)
    if HAS_MASK:
        p_row = at(p_mask, i_row, i_row, rows, stride_mb, stride_ms, 0, 1)
        b_kept = load_kept(p_row, 0, o_k, stride_mk, keys, HAS_MASK, False)
        b = tl.where((o_c == 3) & m & (b_kept == 0)[:, None, None], -LARGE, b)
    lines = tl.cdiv(keys, 4)
    p_beside += i_row.to(tl.int64) * lines * 64
    tl.store(p_beside + _in_lines(o_n, o_c), b.to(p_beside.dtype.element_ty), mask=o_n < lines * 4)


@triton.jit
def _turn_bias(
    i, p_bias, p_turned, stride_bb, stride_bh, stride_bq, stride_bk, heads, queries, keys,
    TILE: tl.constexpr,
):  # fmt: skip
    """TILE keys by TILE queries of one head's bias, as the kernel for q, k and v reads it."""
    blocks_q, blocks_k = tl.cdiv(queries, TILE), tl.cdiv(keys, TILE)
    o_q = (i % blocks_q) * TILE + tl.arange(0, TILE)
    rest = i // blocks_q
    o_k = (rest % blocks_k) * TILE + tl.arange(0, TILE)
    rest = rest // blocks_k
    p_bias += (rest // heads).to(tl.int64) * stride_bb + (rest % heads).to(tl.int64) * stride_bh
    o_bias = o_q[:, None].to(tl.int64) * stride_bq + o_k[None, :].to(tl.int64) * stride_bk
    m = (o_q < queries)[:, None] & (o_k < keys)[None, :]
    b = tl.load(p_bias + o_bias, mask=m, other=0.0).to(tl.float32) * LOG2E
    p_turned += rest.to(tl.int64) * queries * keys
    o_turned = o_k[:, None].to(tl.int64) * queries + o_q[None, :]
    tl.store(p_turned + o_turned, tl.trans(b), mask=tl.trans(m))


@triton.jit
def fold_kernel(
    p_out,  # [B, S, N, H, D], contiguous
    p_grad,  # its gradient, [B, S, N, H, D], any strides
    p_stats,  # fp32 [2, B S, H, N]: shifts, and one over the sums
    p_beside_q,  # [B S, H, N in fours, 64], written: 16 columns of each, see `_in_lines`
    p_delta,  # fp32 [B S, H, N], written: delta over the sum of the weights, as in `backward`
    p_beyond,  # int8 [OF_PROGRAMS + of_queries], its end written: 1 where a shift is beyond PEAK
    p_mask,  # bool [B, S, M], any strides, or None
    p_beside_k,  # [B S or 1, M in fours, 64], written
    p_bias,  # [B or 1, H, N, M], any strides; or None: nothing to turn
    p_turned,  # fp32 [B or 1, H, M, N], written: times log2 e
    stride_gb, stride_gs, stride_gn, stride_gh, stride_gd,
    stride_mb, stride_ms, stride_mk,
    stride_bb, stride_bh, stride_bq, stride_bk,
    scale, rows, stride_inverse, queries, keys, heads, width,
    of_queries, of_keys,  # programs for columns, in this order; the others are for the bias
    STEP: tl.constexpr,  # see `tiles.at`
    UNIT: tl.constexpr,
    LARGE: tl.constexpr,
    HAS_MASK: tl.constexpr,
    EVEN_Q: tl.constexpr,
    EVEN_D: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_D: tl.constexpr,
    TILE: tl.constexpr,
):  # fmt: skip
    """What belongs to queries, what belongs to keys, and a bias that rows share."""
    i = tl.program_id(0)
    if i < of_queries:
        _fold_queries(
            i, p_out, p_grad, p_stats, p_beside_q, p_delta, p_beyond, stride_gb, stride_gs,
            stride_gn, stride_gh, stride_gd, scale, rows, stride_inverse, queries, heads, width,
            STEP, UNIT, LARGE, EVEN_Q, EVEN_D, BLOCK, BLOCK_D,
        )  # fmt: skip
    elif i < of_queries + of_keys:
        _fold_keys(
            i - of_queries, p_mask, p_beside_k, stride_mb, stride_ms, stride_mk, rows, keys, UNIT,
            LARGE, HAS_MASK, BLOCK,
        )  # fmt: skip
    elif p_bias is not None:
        _turn_bias(
            i - of_queries - of_keys, p_bias, p_turned, stride_bb, stride_bh, stride_bq, stride_bk,
            heads, queries, keys, TILE,
        )  # fmt: skip


@triton.jit
def add_ranges_kernel(
    p_sums,  # fp32 [ranges, B S, H, N in tiles, 64 D], as `hopper_backward` holds them
    p_grad_q,  # [B S, N, H, D], neighbours along D, written
    scale, ranges, stride_range, stride_row, stride_query, stride_head,  # of p_grad_q
    heads, queries, padded, width,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """BLOCK numbers of the gradient of q in one head of one row, from what the ranges add to it."""
    i_head = tl.program_id(0) % heads
    blocks = tl.cdiv(padded * width, BLOCK)
    rest = tl.program_id(0) // heads
    i_row = rest // blocks
    o = rest % blocks * BLOCK + tl.arange(0, BLOCK)
    m = o < padded * width
    p_sums += (i_row.to(tl.int64) * heads + i_head) * padded * width
    b = tl.zeros([BLOCK], tl.float32)
    for _ in range(0, ranges):
        b += tl.load(p_sums + o, mask=m, other=0.0)
        p_sums += stride_range.to(tl.int64)
    # By eight channels, 16 queries of a warp, and threads, which have two of each.
    o_tile = o % (64 * width)
    i_q = o // (64 * width) * 64 + o_tile // 128 % 4 * 16 + o // 2 % 2 * 8 + o // 16 % 8
    i_d = o_tile // 512 * 8 + o // 4 % 4 * 2 + o % 2
    p_grad_q += i_row.to(tl.int64) * stride_row + i_head * stride_head
    p = p_grad_q + i_q.to(tl.int64) * stride_query + i_d
    tl.store(p, (b * scale).to(p_grad_q.dtype.element_ty), mask=m & (i_q < queries))

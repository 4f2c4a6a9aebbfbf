"""Products of tiles in Triton kernels, with fp32 operands as PyTorch's own settings have them."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def dot(b_a, b_b, PRECISION: tl.constexpr):
    """``b_a @ b_b``; fp32 in TF32 rounds its operands, as cuBLAS does, where Triton cuts them."""
    return tl.dot(operand(b_a, PRECISION), operand(b_b, PRECISION), input_precision=PRECISION)


@triton.jit
def add_dot(b_a, b_b, b_sum, PRECISION: tl.constexpr):
    """``b_sum + b_a @ b_b``."""
    return tl.dot(
        operand(b_a, PRECISION), operand(b_b, PRECISION), acc=b_sum, input_precision=PRECISION
    )


@triton.jit
def add_product(b_a, b_b, b_sum, b_lost, PRECISION: tl.constexpr):
    """``b_sum + b_a @ b_b``, for sums of many products; and what to give as ``b_lost`` next.

    Of operands in full fp32 the sum's own rounding would be most of the error, term by term of
    hundreds of thousands: there each product is added as a whole, and what the addition rounds
    away is taken from the next (Kahan's summation). Elsewhere ``b_lost`` stays as it is.
    """
    if PRECISION == "ieee" and b_a.dtype == tl.float32:
        # A difference, for Triton makes of a sum with a product the product's own running sum.
        b_term = dot(b_a, b_b, PRECISION) - b_lost
        b_next = b_sum + b_term
        b_lost = (b_next - b_sum) - b_term
        b_sum = b_next
    else:
        b_sum = add_dot(b_a, b_b, b_sum, PRECISION)
    return b_sum, b_lost


@triton.jit
def operand(b, PRECISION: tl.constexpr):
    """What a product in TF32 takes of an fp32: the nearest number of 10 bits."""
    if PRECISION == "tf32" and b.dtype == tl.float32:
        return ((b.to(tl.int32, bitcast=True) + 0x1000) & -0x2000).to(tl.float32, bitcast=True)
    else:
        return b


@triton.jit
def dot_in_parts(b_a, b_b, K: tl.constexpr, PRECISION: tl.constexpr):
    """``b_a @ b_b`` of ``[M, K]`` and ``[K, N]``; in full fp32 sixteen terms at a time.

    There 128 terms, added one after another, round twice as far off as those of the vendor's
    library do. (What is not of a part is zero in both, so that infinite numbers stay of theirs.)
    """
    if PRECISION == "ieee" and b_a.dtype == tl.float32:
        o_k = tl.arange(0, K)
        b_sum = tl.zeros([b_a.shape[0], b_b.shape[1]], tl.float32)
        b_lost = tl.zeros([b_a.shape[0], b_b.shape[1]], tl.float32)
        for first in range(0, K, 16):
            m_k = (o_k >= first) & (o_k < first + 16)
            b_left = tl.where(m_k[None, :], b_a, 0.0)
            b_right = tl.where(m_k[:, None], b_b, 0.0)
            b_sum, b_lost = add_product(b_left, b_right, b_sum, b_lost, PRECISION)
        return b_sum
    else:
        return dot(b_a, b_b, PRECISION)

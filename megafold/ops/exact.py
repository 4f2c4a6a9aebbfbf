"""Exponentials and sigmoids for results in full fp32, which the hardware's are too coarse for."""

from __future__ import annotations

import triton
import triton.language as tl

_LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def exponential(b_t):
    """``exp(b_t)`` of numbers that are not above 0, in fp32.

    The hardware's power of two is good to 22 bits. This takes as many operations as one in a
    mathematical library: the argument less a multiple of ln 2 (in two parts, Cody and Waite
    1980), a polynomial (Taylor to the 7th power, error 2**-27), a power of two.
    """
    # Below the smallest fp32, -inf too; what is no number stays none.
    b_t = tl.maximum(b_t, -104.0, propagate_nan=tl.PropagateNan.ALL)
    b_n = tl.floor(b_t * _LOG2E + 0.5)
    b_f = (b_t - b_n * 0.693359375) + b_n * 2.12194440e-4
    b_y = 1.0 / 5040.0
    b_y = b_y * b_f + 1.0 / 720.0
    b_y = b_y * b_f + 1.0 / 120.0
    b_y = b_y * b_f + 1.0 / 24.0
    b_y = b_y * b_f + 1.0 / 6.0
    b_y = b_y * b_f + 0.5
    b_y = b_y * b_f + 1.0
    b_y = b_y * b_f + 1.0
    return b_y * tl.exp2(b_n)


@triton.jit
def sigmoid(b, EXACT: tl.constexpr):
    """The sigmoid of fp32 numbers; with EXACT as good as PyTorch's, else good to 22 bits."""
    if EXACT:
        b_e = exponential(-tl.abs(b))
        b_sum = 1.0 + b_e
        # One step of Newton's on an inverse good to two units in the last place. A division that
        # rounds to nearest (div_rn) branches, for numbers that a sum from 1 to 2 cannot be.
        b_y = 1.0 / b_sum
        b_y = tl.fma(tl.fma(-b_sum, b_y, 1.0), b_y, b_y)
        return tl.where(b < 0.0, b_e * b_y, b_y)
    else:
        return tl.sigmoid(b)

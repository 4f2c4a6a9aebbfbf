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
def operand(b, PRECISION: tl.constexpr):
    """What a product in TF32 takes of an fp32: the nearest number of 10 bits."""
    if PRECISION == "tf32" and b.dtype == tl.float32:
        return ((b.to(tl.int32, bitcast=True) + 0x1000) & -0x2000).to(tl.float32, bitcast=True)
    else:
        return b

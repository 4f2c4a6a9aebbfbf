"""What the kernels of the transition share: rows, weights, LayerNorm, SwiGLU."""

from __future__ import annotations

import triton
import triton.language as tl

from megafold.ops.exact import sigmoid


@triton.jit
def long(x):
    """A number in 64 bits; also one that Triton knows when it compiles."""
    return tl.full([], 0, tl.int64) + x


@triton.jit
def load_rows(
    p, i_m, o_m, o_c, stride_m, rows, channels, EVEN_M: tl.constexpr, EVEN_C: tl.constexpr
):
    """Rows ``i_m + o_m`` of a matrix ``[rows, channels]``; zeros beyond its ends.

    Neighbours in a row are neighbours in memory. ``i_m`` has 64 bits.
    """
    p_tile = p + i_m * stride_m + o_m.to(tl.int64)[:, None] * stride_m + o_c[None, :]
    if EVEN_M and EVEN_C:
        return tl.load(p_tile)
    elif EVEN_C:
        return tl.load(p_tile, mask=(i_m + o_m < rows)[:, None], other=0.0)
    elif EVEN_M:
        return tl.load(p_tile, mask=(o_c < channels)[None, :], other=0.0)
    else:
        mask = (i_m + o_m < rows)[:, None] & (o_c < channels)[None, :]
        return tl.load(p_tile, mask=mask, other=0.0)


@triton.jit
def store_rows(
    p, b, i_m, o_m, o_c, stride_m, rows, channels, EVEN_M: tl.constexpr, EVEN_C: tl.constexpr
):
    """Store what :func:`load_rows` loads, in the dtype of the memory."""
    p_tile = p + i_m * stride_m + o_m.to(tl.int64)[:, None] * stride_m + o_c[None, :]
    b = b.to(p.dtype.element_ty)
    if EVEN_M and EVEN_C:
        tl.store(p_tile, b)
    else:
        tl.store(p_tile, b, mask=(i_m + o_m < rows)[:, None] & (o_c < channels)[None, :])


@triton.jit
def load_weight(
    p, start, o_h, o_c, stride_h, stride_c, hidden, channels,
    EVEN_H: tl.constexpr, EVEN_C: tl.constexpr,
):  # fmt: skip
    """A tile of a weight, the rows of it hidden units ``start + o_h``; zeros beyond its ends."""
    p_tile = p + start * stride_h + (o_h[:, None] * stride_h + o_c[None, :] * stride_c)
    if EVEN_H and EVEN_C:
        return tl.load(p_tile)
    else:
        mask = (start + o_h < hidden)[:, None] & (o_c < channels)[None, :]
        return tl.load(p_tile, mask=mask, other=0.0)


@triton.jit
def load_channel(p, o_c, channels, EVEN_C: tl.constexpr):
    """A parameter ``[channels]`` of the norm in fp32; zeros beyond its end."""
    if EVEN_C:
        return tl.load(p + o_c).to(tl.float32)
    else:
        return tl.load(p + o_c, mask=o_c < channels, other=0.0).to(tl.float32)


@triton.jit
def statistics(b_x, o_c, channels, eps, EVEN_C: tl.constexpr):
    """Mean and one over the standard deviation of rows in fp32, from their deviations."""
    b_mean = tl.sum(b_x, 1) / channels
    b_centred = b_x - b_mean[:, None]
    if not EVEN_C:
        b_centred = tl.where((o_c < channels)[None, :], b_centred, 0.0)
    b_variance = tl.sum(b_centred * b_centred, 1) / channels
    return b_mean, tl.math.div_rn(1.0, tl.math.sqrt_rn(b_variance + eps))


@triton.jit
def store_statistics(p_stats, b_mean, b_inverse, i_m, o_m, stride_stats, rows):
    """Store what :func:`statistics` gives for rows ``i_m + o_m``."""
    p_mean = p_stats + i_m + o_m
    tl.store(p_mean, b_mean, mask=i_m + o_m < rows)
    tl.store(p_mean + stride_stats, b_inverse, mask=i_m + o_m < rows)


@triton.jit
def scaled(
    b_hat, p_weight, p_bias, o_c, channels,
    HAS_WEIGHT: tl.constexpr, HAS_BIAS: tl.constexpr, EVEN_C: tl.constexpr,
):  # fmt: skip
    """Rows without mean and of unit variance, times the norm's weight, plus its bias."""
    if HAS_WEIGHT:
        b_hat = b_hat * load_channel(p_weight, o_c, channels, EVEN_C)[None, :]
    if HAS_BIAS:
        b_hat = b_hat + load_channel(p_bias, o_c, channels, EVEN_C)[None, :]
    return b_hat


@triton.jit
def load_normalised(
    p_x, p_weight, p_bias, p_stats, i_m, o_m, o_c, stride_x, stride_stats, rows, channels,
    HAS_WEIGHT: tl.constexpr, HAS_BIAS: tl.constexpr, EVEN_M: tl.constexpr, EVEN_C: tl.constexpr,
):  # fmt: skip
    """The normalised rows in fp32 before and after their scale, and the inverse deviations."""
    b_x = load_rows(p_x, i_m, o_m, o_c, stride_x, rows, channels, EVEN_M, EVEN_C).to(tl.float32)
    p_mean = p_stats + i_m + o_m
    b_mean = tl.load(p_mean, mask=i_m + o_m < rows, other=0.0)
    b_inverse = tl.load(p_mean + stride_stats, mask=i_m + o_m < rows, other=0.0)
    b_hat = (b_x - b_mean[:, None]) * b_inverse[:, None]
    b_n = scaled(b_hat, p_weight, p_bias, o_c, channels, HAS_WEIGHT, HAS_BIAS, EVEN_C)
    return b_hat, b_n, b_inverse


@triton.jit
def swiglu(b_gate, b_value, EXACT: tl.constexpr):
    """``silu(gate) * value`` in fp32."""
    return b_gate * sigmoid(b_gate, EXACT) * b_value


@triton.jit
def swiglu_gradients(b_grad, b_gate, b_value, EXACT: tl.constexpr):
    """Hidden activation, and the gradients of gate and value, in fp32."""
    b_sigmoid = sigmoid(b_gate, EXACT)
    b_silu = b_gate * b_sigmoid
    # d silu(g) / dg = sigmoid(g) (1 + g (1 - sigmoid(g)))
    b_slope = b_sigmoid + b_silu * (1.0 - b_sigmoid)
    return b_silu * b_value, b_grad * b_value * b_slope, b_grad * b_silu


@triton.jit
def norm_gradient(b_grad, b_hat, b_inverse, channels):
    """LayerNorm's gradient of x from that of the unscaled rows ``b_hat``, which it is linear in.

    ``(g - mean(g) - hat mean(g hat)) / deviation``, means over the channels; g is zero beyond
    the last channel.
    """
    b_mean = tl.sum(b_grad, 1) / channels
    b_along = tl.sum(b_grad * b_hat, 1) / channels
    return (b_grad - b_mean[:, None] - b_hat * b_along[:, None]) * b_inverse[:, None]


@triton.jit
def norm_sums(p_sums, i_sum, b_of_weight, b_of_bias, o_c, channels):
    """Store one program's share of the gradients of the norm's weight and bias: ``[2, C]``."""
    p = p_sums + i_sum.to(tl.int64) * 2 * channels + o_c
    tl.store(p, tl.sum(b_of_weight, 0), mask=o_c < channels)
    tl.store(p + channels, tl.sum(b_of_bias, 0), mask=o_c < channels)

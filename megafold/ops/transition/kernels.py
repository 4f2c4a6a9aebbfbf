"""SwiGLU in Triton: the elementwise heart of the transition, forward and backward.

PyTorch runs ``silu(gate) * value`` as two kernels and stores ``silu(gate)`` for the backward
pass. Here each direction is one kernel that reads its inputs once, computes in fp32, and stores
nothing beyond ``gate`` and ``value``.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from megafold.ops.variants import KernelVariant

BLOCK = 1024  # elements per program
NUM_WARPS = 4


@triton.jit
def swiglu_forward_kernel(
    p_gate,  # [size]
    p_value,  # [size]
    p_out,  # [size], written
    size,
    BLOCK: tl.constexpr,
):
    """One program computes ``out = silu(gate) * value`` for BLOCK consecutive elements."""
    # In 64 bits before it is multiplied: hidden activations outgrow 2**31 elements.
    o = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)  # [BLOCK]
    m = o < size
    b_gate = tl.load(p_gate + o, mask=m, other=0.0).to(tl.float32)
    b_value = tl.load(p_value + o, mask=m, other=0.0).to(tl.float32)
    b_out = b_gate * tl.sigmoid(b_gate) * b_value
    tl.store(p_out + o, b_out.to(p_out.dtype.element_ty), mask=m)


@triton.jit
def swiglu_backward_kernel(
    p_grad,  # [size], gradient of out
    p_gate,  # [size]
    p_value,  # [size]
    p_grad_gate,  # [size], written
    p_grad_value,  # [size], written
    size,
    BLOCK: tl.constexpr,
):
    """One program computes both gradients for BLOCK consecutive elements."""
    o = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)  # [BLOCK]
    m = o < size
    b_grad = tl.load(p_grad + o, mask=m, other=0.0).to(tl.float32)
    b_gate = tl.load(p_gate + o, mask=m, other=0.0).to(tl.float32)
    b_value = tl.load(p_value + o, mask=m, other=0.0).to(tl.float32)
    b_sigmoid = tl.sigmoid(b_gate)
    b_silu = b_gate * b_sigmoid
    # d silu(g) / dg = sigmoid(g) (1 + g (1 - sigmoid(g)))
    b_slope = b_sigmoid + b_silu * (1.0 - b_sigmoid)
    b_grad_gate = b_grad * b_value * b_slope
    b_grad_value = b_grad * b_silu
    tl.store(p_grad_gate + o, b_grad_gate.to(p_grad_gate.dtype.element_ty), mask=m)
    tl.store(p_grad_value + o, b_grad_value.to(p_grad_value.dtype.element_ty), mask=m)


def launch_forward(gate: torch.Tensor, value: torch.Tensor, out: torch.Tensor) -> None:
    """Write ``silu(gate) * value`` into ``out``. All contiguous, of one shape and dtype."""
    _launch(swiglu_forward_kernel, gate, value, out)


def launch_backward(
    grad: torch.Tensor,
    gate: torch.Tensor,
    value: torch.Tensor,
    grad_gate: torch.Tensor,
    grad_value: torch.Tensor,
) -> None:
    """Write the gradients of gate and value. All contiguous, of one shape and dtype."""
    _launch(swiglu_backward_kernel, grad, gate, value, grad_gate, grad_value)


def _launch(kernel: triton.JITFunction, *tensors: torch.Tensor) -> None:
    size = tensors[0].numel()
    if size == 0:
        return
    with torch.cuda.device_of(tensors[0]):  # Triton launches on the current device
        kernel[(triton.cdiv(size, BLOCK),)](*tensors, size, BLOCK=BLOCK, num_warps=NUM_WARPS)


@torch.library.custom_op("megafold::swiglu", mutates_args=())
def swiglu(gate: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """``silu(gate) * value`` by Triton.

    Args:
        gate, value: one shape, one dtype (fp32, bf16, fp16), one device; any strides
            (made contiguous first).

    Returns:
        Contiguous, of the same shape and dtype.
    """
    if gate.shape != value.shape or gate.dtype != value.dtype or gate.device != value.device:
        raise ValueError(
            f"swiglu: gate is {tuple(gate.shape)} {gate.dtype} on {gate.device}, but value is "
            f"{tuple(value.shape)} {value.dtype} on {value.device}; they must agree"
        )
    out = _empty(gate)
    launch_forward(gate.contiguous(), value.contiguous(), out)
    return out


@torch.library.custom_op("megafold::swiglu_backward", mutates_args=())
def swiglu_backward(
    grad: torch.Tensor, gate: torch.Tensor, value: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The gradients of ``gate`` and ``value`` for the gradient ``grad`` of the output."""
    grad_gate, grad_value = _empty(gate), _empty(value)
    launch_backward(grad.contiguous(), gate.contiguous(), value.contiguous(), grad_gate, grad_value)
    return grad_gate, grad_value


def _empty(like: torch.Tensor) -> torch.Tensor:
    return torch.empty(like.shape, dtype=like.dtype, device=like.device)


@swiglu.register_fake
def _(gate: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    return _empty(gate)


@swiglu_backward.register_fake
def _(
    grad: torch.Tensor, gate: torch.Tensor, value: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    return _empty(gate), _empty(value)


def _save(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs)


def _gradients(ctx, grad: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return swiglu_backward(grad, *ctx.saved_tensors)


def _no_double_backward(ctx, *grads: torch.Tensor) -> None:
    raise NotImplementedError(
        "the Triton SwiGLU has no second derivative; "
        'compute it with the PyTorch implementation: with megafold.ops.use("torch")'
    )


swiglu.register_autograd(_gradients, setup_context=_save)
swiglu_backward.register_autograd(_no_double_backward)


def variants() -> list[KernelVariant]:
    """Every kernel of this file as it ships, for compiling ahead of time."""
    shipped = []
    for dtype, element in (("float32", "*fp32"), ("bfloat16", "*bf16"), ("float16", "*fp16")):
        for name, kernel in (
            ("swiglu_forward", swiglu_forward_kernel),
            ("swiglu_backward", swiglu_backward_kernel),
        ):
            signature = {
                argument: {"size": "i64", "BLOCK": "constexpr"}.get(argument, element)
                for argument in kernel.arg_names
            }
            shipped.append(
                KernelVariant(f"{name} {dtype}", kernel, signature, {"BLOCK": BLOCK}, NUM_WARPS)
            )
    return shipped

"""Triangle multiplication as PyTorch operators: what compilers, autograd and opcheck see of it.

A call that nobody traces takes the short way, an ``autograd.Function``: going through PyTorch's
dispatcher several times takes longer than the kernels of a small call.
"""

from __future__ import annotations

import torch

from megafold.ops.layer_norm.traced import traced
from megafold.ops.triangle_multiplication import passes

_OPERANDS = (
    "Tensor z, Tensor? mask, Tensor? norm_in_weight, Tensor? norm_in_bias, Tensor p_in_weight, "
    "Tensor g_in_weight, Tensor? norm_out_weight, Tensor? norm_out_bias, Tensor p_out_weight, "
    "Tensor g_out_weight"
)
_LIBRARY = torch.library.Library("megafold", "FRAGMENT")
_LIBRARY.define(
    f"triangle_multiplication({_OPERANDS}, bool outgoing, float eps) -> (Tensor, Tensor, Tensor)"
)
_LIBRARY.define(
    f"triangle_multiplication_backward(Tensor grad, {_OPERANDS}, Tensor edges, "
    "Tensor stats, bool outgoing, bool[] asked) -> Tensor[]"
)
_LIBRARY.impl("triangle_multiplication", passes.forward, "CompositeExplicitAutograd")
_LIBRARY.impl("triangle_multiplication_backward", passes.backward, "CompositeExplicitAutograd")


@torch.library.register_fake("megafold::triangle_multiplication", lib=_LIBRARY)
def _(z, mask, norm_in_weight, norm_in_bias, p_in_weight, *rest):
    channels = z.shape[-1]
    pairs = z.shape[0] * z.shape[1] * z.shape[2]
    return (
        p_in_weight.new_empty(z.shape),
        p_in_weight.new_empty((2 * channels, pairs)),
        z.new_empty((2, 2, pairs), dtype=torch.float32),
    )


@torch.library.register_fake("megafold::triangle_multiplication_backward", lib=_LIBRARY)
def _(grad, z, mask, *rest):
    *weights, _edges, _stats, _outgoing, asked = rest
    return [t.new_empty(t.shape) for t, one in zip((z, *weights), asked, strict=True) if one]


def _save(ctx, inputs, output) -> None:
    *operands, ctx.outgoing, _ = inputs
    _, *kept = output
    ctx.mark_non_differentiable(*kept)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*operands, *kept)


def _gradients(ctx, grad: torch.Tensor | None, *_kept: None) -> tuple[torch.Tensor | None, ...]:
    if grad is None:
        return (None,) * 12
    for_z, _, *for_parameters = ctx.needs_input_grad[:10]
    asked = [for_z, *for_parameters]
    # With a graph of the backward pass: the operator, which refuses a second derivative.
    seen = torch.is_grad_enabled() or traced(grad)
    backward = torch.ops.megafold.triangle_multiplication_backward if seen else passes.backward
    found = iter(backward(grad, *ctx.saved_tensors, ctx.outgoing, asked))
    of_z, *of_parameters = (next(found) if one else None for one in asked)
    return of_z, None, *of_parameters, None, None


def _no_double_backward(ctx, *grads) -> None:
    raise NotImplementedError(
        "triangle_multiplication's Triton kernels have no second derivative; "
        'compute it with the PyTorch implementation: with megafold.ops.use("torch")'
    )


torch.library.register_autograd(
    "megafold::triangle_multiplication", _gradients, setup_context=_save, lib=_LIBRARY
)
torch.library.register_autograd(
    "megafold::triangle_multiplication_backward", _no_double_backward, lib=_LIBRARY
)


class _TriangleMultiplication(torch.autograd.Function):
    """The operator without the dispatcher."""

    @staticmethod
    def forward(ctx, *inputs):
        output = passes.forward(*inputs)
        _save(ctx, inputs, output)
        return output

    backward = staticmethod(_gradients)


def multiply(
    z: torch.Tensor,
    mask: torch.Tensor | None,
    *parameters: torch.Tensor | None,
    outgoing: bool,
    eps: float,
) -> torch.Tensor:
    """Triangle multiplication by the kernels; arguments validated, weights of one dtype."""
    seen = traced(z, mask, *parameters)
    call = torch.ops.megafold.triangle_multiplication if seen else _TriangleMultiplication.apply
    return call(z, mask, *parameters, outgoing, eps)[0]

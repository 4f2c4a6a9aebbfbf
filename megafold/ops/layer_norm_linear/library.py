"""LayerNorm + Linear as PyTorch operators: what torch.compile, autograd and opcheck see of it.

A call that nobody traces takes the short way, an ``autograd.Function``, or without gradients none:
going through PyTorch's dispatcher several times takes longer than the kernels of a small call.
"""

from __future__ import annotations

import torch

from megafold.ops.layer_norm.traced import differentiated, traced
from megafold.ops.layer_norm_linear import launch

_LIBRARY = torch.library.Library("megafold", "FRAGMENT")
_LIBRARY.define(
    "layer_norm_linear(Tensor x, Tensor? norm_weight, Tensor? norm_bias, Tensor weight, "
    "Tensor? bias, float eps) -> (Tensor, Tensor)"
)
_LIBRARY.define(
    "layer_norm_linear_backward(Tensor grad, Tensor x, Tensor? norm_weight, Tensor? norm_bias, "
    "Tensor weight, Tensor? bias, Tensor stats, bool[] asked) -> Tensor[]"
)
_LIBRARY.impl("layer_norm_linear", launch.forward, "CompositeExplicitAutograd")
_LIBRARY.impl("layer_norm_linear_backward", launch.backward, "CompositeExplicitAutograd")


@torch.library.register_fake("megafold::layer_norm_linear", lib=_LIBRARY)
def _(x, norm_weight, norm_bias, weight, bias, eps):
    out = weight.new_empty((*x.shape[:-1], weight.shape[0]))
    return out, x.new_empty((2, x.numel() // x.shape[-1]), dtype=torch.float32)


@torch.library.register_fake("megafold::layer_norm_linear_backward", lib=_LIBRARY)
def _(grad, x, norm_weight, norm_bias, weight, bias, stats, asked):
    operands = (x, norm_weight, norm_bias, weight, bias)
    return [t.new_empty(t.shape) for t, one in zip(operands, asked, strict=True) if one]


def _save(ctx, inputs, output) -> None:
    *operands, _ = inputs
    _, stats = output
    ctx.mark_non_differentiable(stats)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*operands, stats)


def _gradients(ctx, grad: torch.Tensor | None, _stats: None) -> tuple[torch.Tensor | None, ...]:
    if grad is None:
        return (None,) * 6
    asked = list(ctx.needs_input_grad[:5])
    # With a graph of the backward pass: the operator, which refuses a second derivative.
    seen = torch.is_grad_enabled() or traced(grad)
    backward = torch.ops.megafold.layer_norm_linear_backward if seen else launch.backward
    found = iter(backward(grad, *ctx.saved_tensors, asked))
    return (*(next(found) if one else None for one in asked), None)


def _no_double_backward(ctx, *grads) -> None:
    raise NotImplementedError(
        "layer_norm_linear's Triton kernels have no second derivative; "
        'compute it with the PyTorch implementation: with megafold.ops.use("torch")'
    )


torch.library.register_autograd(
    "megafold::layer_norm_linear", _gradients, setup_context=_save, lib=_LIBRARY
)
torch.library.register_autograd(
    "megafold::layer_norm_linear_backward", _no_double_backward, lib=_LIBRARY
)


class _LayerNormLinear(torch.autograd.Function):
    """The operator without the dispatcher."""

    @staticmethod
    def forward(ctx, *inputs):
        output = launch.forward(*inputs)
        _save(ctx, inputs, output)
        return output

    backward = staticmethod(_gradients)


def project(
    x: torch.Tensor,
    norm_weight: torch.Tensor | None,
    norm_bias: torch.Tensor | None,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    eps: float,
) -> torch.Tensor:
    """LayerNorm + Linear by the kernels; arguments validated, the result in weight's dtype."""
    operands = (x, norm_weight, norm_bias, weight, bias)
    if traced(*operands):
        return torch.ops.megafold.layer_norm_linear(*operands, eps)[0]
    call = _LayerNormLinear.apply if differentiated(*operands) else launch.forward
    return call(*operands, eps)[0]

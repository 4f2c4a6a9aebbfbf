"""Adaptive LayerNorm as PyTorch operators: what torch.compile, autograd and opcheck see of it."""

from __future__ import annotations

import torch

from megafold.ops.adaptive_layer_norm import launch
from megafold.ops.layer_norm.traced import differentiated, traced

_LIBRARY = torch.library.Library("megafold", "FRAGMENT")
_OPERANDS = (
    "Tensor a, Tensor s, Tensor? norm_weight_s, Tensor weight_gate, Tensor? bias_gate, "
    "Tensor weight_shift"
)
_LIBRARY.define(
    f"adaptive_layer_norm({_OPERANDS}, float eps, ScalarType dtype) -> (Tensor, Tensor, Tensor)"
)
_LIBRARY.define(
    f"adaptive_layer_norm_backward(Tensor grad, {_OPERANDS}, Tensor stats_a, Tensor stats_s, "
    "bool[] asked) -> Tensor[]"
)
_LIBRARY.impl("adaptive_layer_norm", launch.forward, "CompositeExplicitAutograd")
_LIBRARY.impl("adaptive_layer_norm_backward", launch.backward, "CompositeExplicitAutograd")


@torch.library.register_fake("megafold::adaptive_layer_norm", lib=_LIBRARY)
def _(a, s, norm_weight_s, weight_gate, bias_gate, weight_shift, eps, dtype):
    def stats(x: torch.Tensor) -> torch.Tensor:
        return x.new_empty((2, x.numel() // x.shape[-1]), dtype=torch.float32)

    return a.new_empty(a.shape, dtype=dtype), stats(a), stats(s)


@torch.library.register_fake("megafold::adaptive_layer_norm_backward", lib=_LIBRARY)
def _(
    grad, a, s, norm_weight_s, weight_gate, bias_gate, weight_shift, stats_a, stats_s, asked
):  # fmt: skip
    operands = (a, s, norm_weight_s, weight_gate, bias_gate, weight_shift)
    return [t.new_empty(t.shape) for t, one in zip(operands, asked, strict=True) if one]


def _save(ctx, inputs, output) -> None:
    *operands, _, _ = inputs
    _, *stats = output
    ctx.mark_non_differentiable(*stats)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*operands, *stats)


def _gradients(ctx, grad: torch.Tensor | None, *_stats: None) -> tuple[torch.Tensor | None, ...]:
    if grad is None:
        return (None,) * 8
    asked = list(ctx.needs_input_grad[:6])
    # With a graph of the backward pass: the operator, which refuses a second derivative.
    seen = torch.is_grad_enabled() or traced(grad)
    backward = torch.ops.megafold.adaptive_layer_norm_backward if seen else launch.backward
    found = iter(backward(grad, *ctx.saved_tensors, asked))
    return (*(next(found) if one else None for one in asked), None, None)


def _no_double_backward(ctx, *grads) -> None:
    raise NotImplementedError(
        "adaptive_layer_norm's Triton kernels have no second derivative; "
        'compute it with the PyTorch implementation: with megafold.ops.use("torch")'
    )


torch.library.register_autograd(
    "megafold::adaptive_layer_norm", _gradients, setup_context=_save, lib=_LIBRARY
)
torch.library.register_autograd(
    "megafold::adaptive_layer_norm_backward", _no_double_backward, lib=_LIBRARY
)


class _AdaptiveLayerNorm(torch.autograd.Function):
    """The operator without the dispatcher."""

    @staticmethod
    def forward(ctx, *inputs):
        output = launch.forward(*inputs)
        _save(ctx, inputs, output)
        return output

    backward = staticmethod(_gradients)


def modulate(
    a: torch.Tensor,
    s: torch.Tensor,
    norm_weight_s: torch.Tensor | None,
    weight_gate: torch.Tensor,
    bias_gate: torch.Tensor | None,
    weight_shift: torch.Tensor,
    eps: float,
    dtype: torch.dtype,
) -> torch.Tensor:
    """Adaptive LayerNorm by the kernels; arguments validated, the result in ``dtype``."""
    operands = (a, launch.shared(a, s), norm_weight_s, weight_gate, bias_gate, weight_shift)
    if traced(*operands):
        return torch.ops.megafold.adaptive_layer_norm(*operands, eps, dtype)[0]
    call = _AdaptiveLayerNorm.apply if differentiated(*operands) else launch.forward
    return call(*operands, eps, dtype)[0]

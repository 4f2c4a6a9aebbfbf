"""The transition as PyTorch operators: what torch.compile, autograd and opcheck see of it.

A call that nobody traces takes the short way, an ``autograd.Function`` on the same passes:
PyTorch's dispatcher takes longer than the kernels of a small transition.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.utils._python_dispatch import _get_current_dispatch_mode

from megafold.ops.transition import passes

_LIBRARY = torch.library.Library("megafold", "FRAGMENT")
_LIBRARY.define(
    "transition(Tensor x, Tensor? norm_weight, Tensor? norm_bias, Tensor weight_gate, "
    "Tensor weight_value, Tensor weight_out, float? eps) -> (Tensor, Tensor)"
)
_LIBRARY.define(
    "transition_backward(Tensor grad, Tensor x, Tensor? norm_weight, Tensor? norm_bias, "
    "Tensor weight_gate, Tensor weight_value, Tensor weight_out, Tensor stats, float? eps, "
    "bool[] asked) -> Tensor[]"
)
_LIBRARY.impl("transition", passes.forward, "CompositeExplicitAutograd")
_LIBRARY.impl("transition_backward", passes.backward, "CompositeExplicitAutograd")


@torch.library.register_fake("megafold::transition", lib=_LIBRARY)
def _(x, norm_weight, norm_bias, weight_gate, weight_value, weight_out, eps):
    statistics = 0 if eps is None else 2
    rows = x.numel() // x.shape[-1]
    stats = x.new_empty((statistics, rows), dtype=torch.float32)
    return weight_gate.new_empty(x.shape), stats


@torch.library.register_fake("megafold::transition_backward", lib=_LIBRARY)
def _(grad, x, norm_weight, norm_bias, weight_gate, weight_value, weight_out, stats, eps, asked):
    arguments = (x, norm_weight, norm_bias, weight_gate, weight_value, weight_out)
    return [t.new_empty(t.shape) for t, one in zip(arguments, asked, strict=True) if one]


def _save(ctx, inputs, output) -> None:
    *tensors, ctx.eps = inputs
    _, stats = output
    ctx.mark_non_differentiable(stats)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors, stats)


def _gradients(ctx, grad: torch.Tensor | None, _stats: None) -> tuple[torch.Tensor | None, ...]:
    if grad is None:
        return (None,) * 7
    asked = list(ctx.needs_input_grad[:6])
    # With a graph of the backward pass: the operator, which refuses a second derivative.
    as_operator = torch.is_grad_enabled() or traced(grad)
    backward = torch.ops.megafold.transition_backward if as_operator else passes.backward
    found = iter(backward(grad, *ctx.saved_tensors, ctx.eps, asked))
    return (*(next(found) if one else None for one in asked), None)


def _no_double_backward(ctx, *grads: Sequence[torch.Tensor]) -> None:
    raise NotImplementedError(
        "the transition's Triton kernels have no second derivative; "
        'compute it with the PyTorch implementation: with megafold.ops.use("torch")'
    )


torch.library.register_autograd(
    "megafold::transition", _gradients, setup_context=_save, lib=_LIBRARY
)
torch.library.register_autograd("megafold::transition_backward", _no_double_backward, lib=_LIBRARY)


_PLAIN = (torch.Tensor, torch.nn.Parameter, type(None))


def traced(*tensors: torch.Tensor | None) -> bool:
    """Whether something has to see the operator itself: a compiler, a mode, a kind of tensor."""
    return (
        torch.compiler.is_compiling()
        or _get_current_dispatch_mode() is not None
        or not all(type(tensor) in _PLAIN for tensor in tensors)
    )


class _Transition(torch.autograd.Function):
    """The operator without the dispatcher."""

    @staticmethod
    def forward(ctx, *inputs):
        # Not in a `setup_context`: with one, PyTorch inspects the signature in every call.
        output = passes.forward(*inputs)
        _save(ctx, inputs, output)
        return output

    backward = staticmethod(_gradients)


def apply(
    x: torch.Tensor,
    norm_weight: torch.Tensor | None,
    norm_bias: torch.Tensor | None,
    weight_gate: torch.Tensor,
    weight_value: torch.Tensor,
    weight_out: torch.Tensor,
    eps: float | None,
) -> torch.Tensor:
    """A transition by the kernels; arguments validated, the weights of one dtype.

    Args:
        eps: of the norm; None where x is not to be normalised.
    """
    inputs = (x, norm_weight, norm_bias, weight_gate, weight_value, weight_out)
    call = torch.ops.megafold.transition if traced(*inputs) else _Transition.apply
    return call(*inputs, eps)[0]

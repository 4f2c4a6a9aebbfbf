"""The gated transition as PyTorch operators: what follows the norm of a conditioned transition.

``sigmoid(scale) * (weight_out @ (silu(weight_gate @ a) * (weight_value @ a)))``; the passes are
those of ``megafold.ops.transition`` without a norm.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from megafold.ops.transition import passes
from megafold.ops.transition.library import traced

_LIBRARY = torch.library.Library("megafold", "FRAGMENT")
_LIBRARY.define(
    "gated_transition(Tensor a, Tensor scale, Tensor weight_gate, Tensor weight_value, "
    "Tensor weight_out) -> (Tensor, Tensor)"
)
_LIBRARY.define(
    "gated_transition_backward(Tensor grad, Tensor a, Tensor scale, Tensor weight_gate, "
    "Tensor weight_value, Tensor weight_out, Tensor ungated, bool[] asked) -> Tensor[]"
)


def forward(
    a: torch.Tensor,
    scale: torch.Tensor,
    weight_gate: torch.Tensor,
    weight_value: torch.Tensor,
    weight_out: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The output and what the gate is multiplied with, both ``[..., C]``.

    Args:
        scale: contiguous, ``[..., C]`` with as many of a's last dimensions as it has.
    """
    ungated, _ = passes.forward(a, None, None, weight_gate, weight_value, weight_out, None)
    return passes.gate_forward(ungated, scale), ungated


def backward(
    grad: torch.Tensor,
    a: torch.Tensor,
    scale: torch.Tensor,
    weight_gate: torch.Tensor,
    weight_value: torch.Tensor,
    weight_out: torch.Tensor,
    ungated: torch.Tensor,
    asked: Sequence[bool],
) -> list[torch.Tensor]:
    """The gradients asked for of a, scale and the three weights, in this order."""
    for_a, for_scale, *for_weights = asked
    of_ungated, of_scale = passes.gate_backward(grad, ungated, scale)
    found = []
    if for_a or any(for_weights):
        wanted = (for_a, False, False, *for_weights)
        weights = (weight_gate, weight_value, weight_out)
        stats = a.new_empty((0, 0), dtype=torch.float32)
        found = passes.backward(of_ungated, a, None, None, *weights, stats, None, wanted)
    if for_scale:
        found.insert(int(for_a), of_scale)
    return found


_LIBRARY.impl("gated_transition", forward, "CompositeExplicitAutograd")
_LIBRARY.impl("gated_transition_backward", backward, "CompositeExplicitAutograd")


@torch.library.register_fake("megafold::gated_transition", lib=_LIBRARY)
def _(a, scale, weight_gate, weight_value, weight_out):
    return weight_gate.new_empty(a.shape), weight_gate.new_empty(a.shape)


@torch.library.register_fake("megafold::gated_transition_backward", lib=_LIBRARY)
def _(grad, a, scale, weight_gate, weight_value, weight_out, ungated, asked):
    arguments = (a, scale, weight_gate, weight_value, weight_out)
    return [t.new_empty(t.shape) for t, one in zip(arguments, asked, strict=True) if one]


def _save(ctx, inputs, output) -> None:
    _, ungated = output
    ctx.mark_non_differentiable(ungated)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs, ungated)


def _gradients(ctx, grad: torch.Tensor | None, _ungated: None) -> tuple[torch.Tensor | None, ...]:
    if grad is None:
        return (None,) * 5
    asked = list(ctx.needs_input_grad[:5])
    # With a graph of the backward pass: the operator, which refuses a second derivative.
    as_operator = torch.is_grad_enabled() or traced(grad)
    call = torch.ops.megafold.gated_transition_backward if as_operator else backward
    found = iter(call(grad, *ctx.saved_tensors, asked))
    return tuple(next(found) if one else None for one in asked)


def _no_double_backward(ctx, *grads: Sequence[torch.Tensor]) -> None:
    raise NotImplementedError(
        "the conditioned transition's Triton kernels have no second derivative; "
        'compute it with the PyTorch implementation: with megafold.ops.use("torch")'
    )


torch.library.register_autograd(
    "megafold::gated_transition", _gradients, setup_context=_save, lib=_LIBRARY
)
torch.library.register_autograd(
    "megafold::gated_transition_backward", _no_double_backward, lib=_LIBRARY
)


class _GatedTransition(torch.autograd.Function):
    """The operator without the dispatcher."""

    @staticmethod
    def forward(ctx, *inputs):
        output = forward(*inputs)
        _save(ctx, inputs, output)
        return output

    backward = staticmethod(_gradients)


def gated_transition(
    a: torch.Tensor,
    scale: torch.Tensor,
    weight_gate: torch.Tensor,
    weight_value: torch.Tensor,
    weight_out: torch.Tensor,
) -> torch.Tensor:
    """What follows the norm of a conditioned transition, by the kernels.

    Args:
        a: ``[..., C]``, already normalised.
        scale: logits of the gate, ``[..., C]``; broadcasts to a.
    """
    while scale.dim() > 1 and scale.shape[0] == 1:
        scale = scale[0]
    if scale.shape != a.shape[a.dim() - scale.dim() :]:  # 1 between others: not one period
        scale = scale.expand(a.shape)
    inputs = (a, scale.contiguous(), weight_gate, weight_value, weight_out)
    call = torch.ops.megafold.gated_transition if traced(*inputs) else _GatedTransition.apply
    return call(*inputs)[0]

"""The gated transition as PyTorch operators: what follows the norm of a conditioned transition.

``sigmoid(scale) * (weight_out @ (silu(weight_gate @ a) * (weight_value @ a)))``; the passes are
those of ``megafold.ops.transition`` without a norm.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from megafold.ops.registration import Passes, register
from megafold.ops.transition import passes


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


def _fake(a, scale, weight_gate, weight_value, weight_out):
    return weight_gate.new_empty(a.shape), weight_gate.new_empty(a.shape)


_call = register(
    Passes(
        name="gated_transition",
        operands=(
            "Tensor a", "Tensor scale",
            "Tensor weight_gate", "Tensor weight_value", "Tensor weight_out",
        ),
        options=(),
        kept=("Tensor ungated",),
        forward=forward,
        backward=backward,
        fake=_fake,
    )
)  # fmt: skip


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
    return _call(a, scale.contiguous(), weight_gate, weight_value, weight_out)[0]

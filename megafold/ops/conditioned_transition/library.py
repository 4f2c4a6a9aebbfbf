"""The gated transition as PyTorch operators: what follows the norm of a conditioned transition.

``sigmoid(scale) * (weight_out @ (silu(weight_gate @ a) * (weight_value @ a)))``; the passes are
those of ``megafold.ops.transition`` without a norm. Where they keep gate and value and every row
has a scale of its own, the scale's linear layer belongs to the operator: its gradient is then
gone before that of the transition needs memory.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F

from megafold.ops.gated import launch as gate
from megafold.ops.gated.library import as_last
from megafold.ops.keeping import register_keeping
from megafold.ops.registration import Passes, has_gradient, register
from megafold.ops.transition import launch, passes


def forward(
    a: torch.Tensor,
    scale: torch.Tensor,
    weight_gate: torch.Tensor,
    weight_value: torch.Tensor,
    weight_out: torch.Tensor,
    *,
    added: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The output and what the gate is multiplied with, both ``[..., C]``.

    Args:
        scale: contiguous, ``[..., C]`` with as many of a's last dimensions as it has.
        added: to the output, ``[..., C]``; or None.
    """
    ungated, _ = passes.forward(a, None, None, weight_gate, weight_value, weight_out, None)
    return gate.forward(ungated, scale, added), ungated


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
    of_transition = for_a or any(for_weights)
    of_gate = iter(gate.backward(grad, ungated, scale, (of_transition, for_scale)))
    of_ungated = next(of_gate) if of_transition else None
    found = []
    if of_ungated is not None:
        wanted = (for_a, False, False, *for_weights)
        weights = (weight_gate, weight_value, weight_out)
        stats = a.new_empty((0, 0), dtype=torch.float32)
        none = None, False  # neither a norm nor a residual
        found = passes.backward(of_ungated, a, None, None, *weights, stats, *none, wanted)
    if for_scale:
        found.insert(int(for_a), next(of_gate))
    return found


def forward_keeping(
    a: torch.Tensor,
    s: torch.Tensor,
    weight_gate: torch.Tensor,
    weight_value: torch.Tensor,
    weight_out: torch.Tensor,
    weight_scale: torch.Tensor,
    bias_scale: torch.Tensor | None,
    *,
    added: torch.Tensor | None = None,
) -> tuple[torch.Tensor, ...]:
    """With ``scale = weight_scale @ s + bias_scale``, s ``[..., Cs]`` with as many rows as a.

    Returns:
        The output ``[..., C]``; the scale and what the gate is multiplied with, ``[M, C]``; what
        :func:`passes.forward_keeping` gives last: gate and value, and their weights as one.
    """
    ungated, _stats, _normalised, pairs, both = passes.forward_keeping(
        a, None, None, weight_gate, weight_value, weight_out, None
    )
    bias_scale = None if bias_scale is None else bias_scale.contiguous()
    with passes.as_given(a.device):  # contiguous, for the library takes other products otherwise
        scale = F.linear(passes.by_rows(s), weight_scale.contiguous(), bias_scale)
    y = gate.forward(ungated, scale.view(ungated.shape), added)
    return y, scale, ungated.view(scale.shape), pairs, both


def backward_from_kept(
    grad: torch.Tensor,
    a: torch.Tensor,
    s: torch.Tensor,
    weight_gate: torch.Tensor,
    weight_value: torch.Tensor,
    weight_out: torch.Tensor,
    weight_scale: torch.Tensor,
    bias_scale: torch.Tensor | None,
    scale: torch.Tensor,
    ungated: torch.Tensor,
    pairs: torch.Tensor,
    both: torch.Tensor,
    asked: Sequence[bool],
    *,
    last: bool = False,
    inner: bool = False,
) -> list[torch.Tensor]:
    """The gradients asked for of a, s, the three weights, the scale's weight and its bias.

    Args:
        last: nobody needs what was kept after this: gradients are written over it.
        inner: whether the gradient of a is no result, and may be so written, too.
    """
    operands = (a, s, weight_gate, weight_value, weight_out, weight_scale, bias_scale)
    if not grad.numel():
        return [
            torch.zeros(t.shape, dtype=t.dtype, device=t.device)
            for t, one in zip(operands, asked, strict=True)
            if one
        ]
    for_a, for_s, *for_weights, for_scale, _for_bias = asked
    of_ungated, of_scale, of_bias = passes.gate_rows_backward(grad, ungated, scale, last=last)
    of_s = of_weight = None
    with passes.as_given(a.device):
        if for_s:
            of_s = torch.mm(of_scale, weight_scale.contiguous()).view(s.shape)
        if for_scale:
            of_weight = torch.mm(of_scale.t(), passes.by_rows(s))
    del of_scale
    found = iter(())
    if for_a or any(for_weights):
        weights = (weight_gate, weight_value, weight_out)
        none, rows = a.new_empty((0, 0), dtype=torch.float32), both.new_empty((0, 0))
        wanted = (for_a, False, False, *for_weights)
        of_transition = passes.backward_from_kept(
            of_ungated, a, None, None, *weights, none, rows, pairs, both, False, wanted, last=last,
            room=scale if last and inner and scale.dtype == a.dtype else None,
        )  # fmt: skip
        found = iter(of_transition)
    gradients = (
        next(found) if for_a else None,
        of_s,
        *(next(found) if one else None for one in for_weights),
        of_weight,
        of_bias,
    )
    return [gradient for gradient, one in zip(gradients, asked, strict=True) if one]


def fake_keeping(a, s, weight_gate, weight_value, weight_out, weight_scale, bias_scale):
    """What :func:`forward_keeping` returns, not computed."""
    hidden, channels = weight_gate.shape
    rows, empty = a.numel() // channels, weight_gate.new_empty
    of_rows = weight_scale.new_empty((rows, channels)), empty((rows, channels))
    return empty(a.shape), *of_rows, empty((rows, 2 * hidden)), empty((2 * hidden, channels))


def _fake(a, scale, weight_gate, weight_value, weight_out):
    return weight_gate.new_empty(a.shape), weight_gate.new_empty(a.shape)


_call = register(
    Passes(
        name="gated_transition",
        operands=(
            "Tensor a",
            "Tensor scale",
            "Tensor weight_gate",
            "Tensor weight_value",
            "Tensor weight_out",
        ),
        options=(),
        kept=("Tensor ungated",),
        forward=forward,
        backward=backward,
        fake=_fake,
    )
)

_call_keeping = register_keeping(
    Passes(
        name="gated_transition_keeping",
        operands=(
            "Tensor a", "Tensor s",
            "Tensor weight_gate", "Tensor weight_value", "Tensor weight_out",
            "Tensor weight_scale", "Tensor? bias_scale",
        ),
        options=(),
        kept=("Tensor scale", "Tensor ungated", "Tensor pairs", "Tensor both"),
        forward=forward_keeping,
        backward=backward_from_kept,
        fake=fake_keeping,
    )
)  # fmt: skip


def keeps(a: torch.Tensor, s: torch.Tensor) -> bool:
    """Whether a call with gradients keeps gate and value: every row of a has a row of s."""
    own = a.numel() * s.shape[-1] == s.numel() * a.shape[-1]
    return own and launch.keeps(a.shape[-1])


def apply(
    a: torch.Tensor,
    s: torch.Tensor,
    weight_gate: torch.Tensor,
    weight_value: torch.Tensor,
    weight_out: torch.Tensor,
    weight_scale: torch.Tensor,
    bias_scale: torch.Tensor | None,
) -> torch.Tensor:
    """What follows the norm of a conditioned transition, gated by a linear layer of s.

    Args:
        a: ``[..., C]``, already normalised; it and the weights in the dtype of products.
        s: ``[..., Cs]``; broadcasts to a.
    """
    weights = weight_gate, weight_value, weight_out
    if keeps(a, s):
        operands = a, s, *weights, weight_scale, bias_scale
        if has_gradient(*operands):
            return _call_keeping(*operands)
    return gated_transition(a, F.linear(s, weight_scale, bias_scale), *weights)


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
    return _call(a, as_period(a, scale), weight_gate, weight_value, weight_out)[0]


def as_period(a: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """What broadcasts to a, contiguous and with as many of its last dimensions as are needed."""
    return as_last(a, scale).contiguous()

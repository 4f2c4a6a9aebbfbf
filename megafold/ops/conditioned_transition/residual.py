"""The conditioned transition on its residual as PyTorch operators, the norm within.

``a + sigmoid(scale) * (weight_out @ (silu(weight_gate @ n) * (weight_value @ n)))`` with ``n =
adaptive_layer_norm(a, s)``. The kernel of the gate adds a. Backward, the last kernel of the norm
writes the gradient of a, and adds the gradient of the output, which is that of a as well: so norm
and transition are one operator here, where without the residual they are two. Their passes are
those of ``megafold.ops.adaptive_layer_norm`` and of :mod:`~megafold.ops.conditioned_transition.
library`, and so are their plans.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F

from megafold.ops.adaptive_layer_norm import launch as norm
from megafold.ops.adaptive_layer_norm import library as norm_library
from megafold.ops.conditioned_transition import library as gated
from megafold.ops.keeping import register_keeping
from megafold.ops.registration import Passes, has_gradient, register

OF_NORM = (
    "Tensor a", "Tensor s", "Tensor? norm_weight_s",
    "Tensor norm_weight_gate", "Tensor? norm_bias_gate", "Tensor norm_weight_shift",
)  # fmt: skip
OF_WEIGHTS = ("Tensor weight_gate", "Tensor weight_value", "Tensor weight_out")
# The norm keeps the last three where `norm.keeps` says so, else they are empty.
KEPT_OF_NORM = (
    "Tensor stats_a", "Tensor stats_s", "Tensor normal", "Tensor norm_gate", "Tensor norm_both",
)  # fmt: skip
OPTIONS = ("float eps", "ScalarType dtype")
NORM_OPERANDS = len(OF_NORM)


def forward(
    a: torch.Tensor,
    s: torch.Tensor,
    norm_weight_s: torch.Tensor | None,
    norm_weight_gate: torch.Tensor,
    norm_bias_gate: torch.Tensor | None,
    norm_weight_shift: torch.Tensor,
    scale: torch.Tensor,
    weight_gate: torch.Tensor,
    weight_value: torch.Tensor,
    weight_out: torch.Tensor,
    eps: float,
    dtype: torch.dtype,
    keeping: bool,
) -> tuple[torch.Tensor, ...]:
    """Nothing hidden is kept, and the scale is given.

    Args:
        s: as :func:`megafold.ops.adaptive_layer_norm.launch.shared` returns it.
        scale: logits of the gate; as :func:`~megafold.ops.conditioned_transition.library.as_period`
            returns them.
        dtype: of n, and of all weights but the norm's of s.
        keeping: whether the norm keeps what it can.

    Returns:
        The output; n and what the gate is multiplied with, ``[..., Ca]``; what the norm keeps.
    """
    of_norm = (a, s, norm_weight_s, norm_weight_gate, norm_bias_gate, norm_weight_shift)
    n, *kept = _normalise(of_norm, eps, dtype, keeping)
    y, ungated = gated.forward(n, scale, weight_gate, weight_value, weight_out, added=a)
    return y, n, ungated, *kept


def backward(
    grad: torch.Tensor, *given: torch.Tensor | Sequence[bool] | None
) -> list[torch.Tensor]:
    """The gradients asked for of the operands of :func:`forward`, from these and what it kept."""
    *tensors, asked = given
    of_norm, operands = tensors[:NORM_OPERANDS], tensors[NORM_OPERANDS:][:4]
    n, ungated, *kept = tensors[NORM_OPERANDS + 4 :]
    for_norm, for_gated = asked[:NORM_OPERANDS], asked[NORM_OPERANDS:]
    wanted = (any(for_norm), *for_gated)
    found = gated.backward(grad, n, *operands, ungated, wanted)
    of_n = found.pop(0) if wanted[0] else None
    return [*_norm_gradients(of_n, grad, of_norm, kept, for_norm), *found]


def forward_keeping(
    a: torch.Tensor,
    s: torch.Tensor,
    norm_weight_s: torch.Tensor | None,
    norm_weight_gate: torch.Tensor,
    norm_bias_gate: torch.Tensor | None,
    norm_weight_shift: torch.Tensor,
    condition: torch.Tensor,
    weight_gate: torch.Tensor,
    weight_value: torch.Tensor,
    weight_out: torch.Tensor,
    weight_scale: torch.Tensor,
    bias_scale: torch.Tensor | None,
    eps: float,
    dtype: torch.dtype,
) -> tuple[torch.Tensor, ...]:
    """Gate and value are kept, of rows that each have a condition of their own.

    Args:
        condition: s as products take it.

    Returns:
        The output; n; the scale, what the gate is multiplied with, gate and value, the weights of
        both, as :func:`~megafold.ops.conditioned_transition.library.forward_keeping` returns them;
        what the norm keeps.
    """
    of_norm = (a, s, norm_weight_s, norm_weight_gate, norm_bias_gate, norm_weight_shift)
    n, *kept = _normalise(of_norm, eps, dtype, True)
    weights = (weight_gate, weight_value, weight_out, weight_scale, bias_scale)
    y, *of_transition = gated.forward_keeping(n, condition, *weights, added=a)
    return y, n, *of_transition, *kept


def backward_from_kept(
    grad: torch.Tensor, *given: torch.Tensor | Sequence[bool] | None, last: bool = False
) -> list[torch.Tensor]:
    """The gradients asked for of the operands of :func:`forward_keeping`.

    Args:
        last: nobody needs what was kept after this: gradients are written over it, those of n and
            of the norm's projections, too, so that the norm's pass needs no more memory than the
            transition's.
    """
    *tensors, asked = given
    of_norm, operands = tensors[:NORM_OPERANDS], tensors[NORM_OPERANDS:][:6]
    n, scale, ungated, pairs, both, *kept = tensors[NORM_OPERANDS + 6 :]
    for_norm, for_gated = asked[:NORM_OPERANDS], asked[NORM_OPERANDS:]
    wanted = (any(for_norm), *for_gated)
    found = gated.backward_from_kept(
        grad, n, *operands, scale, ungated, pairs, both, wanted, last=last, inner=True
    )
    of_n = found.pop(0) if wanted[0] else None
    room = pairs if last else None
    return [*_norm_gradients(of_n, grad, of_norm, kept, for_norm, room), *found]


def _normalise(
    operands: Sequence[torch.Tensor | None], eps: float, dtype: torch.dtype, keeping: bool
) -> tuple[torch.Tensor, ...]:
    """n, and five tensors that the norm's backward pass needs."""
    a, s, _, weight, *_ = operands
    if keeping and norm.keeps(a, s, weight):
        return norm.forward_keeping(*operands, eps, dtype)
    return *norm.forward(*operands, eps, dtype), *(weight.new_empty((0, 0)) for _ in range(3))


def _norm_gradients(
    of_n: torch.Tensor | None,
    added: torch.Tensor,
    operands: Sequence[torch.Tensor | None],
    kept: Sequence[torch.Tensor],
    asked: Sequence[bool],
    room: torch.Tensor | None = None,
) -> list[torch.Tensor]:
    """The gradients asked for of the norm's operands, of which a has ``added`` as well."""
    if of_n is None:
        return []
    stats_a, stats_s, normal, gate, both = kept
    stats = (stats_a, stats_s)
    if both.numel():
        of_rows = (normal, gate, both)
        return norm.backward_from_kept(
            of_n, *operands, *stats, *of_rows, asked, added=added, room=room
        )
    return norm.backward(of_n, *operands, *stats, asked, added=added)


def _fake_of_norm(operands, eps, dtype, keeping):
    a, s, _, weight, *_ = operands
    if keeping and norm.keeps(a, s, weight):
        return norm_library.fake_keeping(*operands, eps, dtype)
    three = norm_library.fake(*operands, eps, dtype)
    return *three, *(weight.new_empty((0, 0)) for _ in range(3))


def _output(a, weight):
    return a.new_empty(a.shape, dtype=torch.promote_types(a.dtype, weight.dtype))


def _fake(*given):
    *operands, eps, dtype, keeping = given
    a, weight = operands[0], operands[-1]
    n, *kept = _fake_of_norm(operands[:NORM_OPERANDS], eps, dtype, keeping)
    return _output(a, weight), n, weight.new_empty(a.shape), *kept


def _fake_keeping(*given):
    *operands, eps, dtype = given
    n, *kept = _fake_of_norm(operands[:NORM_OPERANDS], eps, dtype, True)
    _, *of_transition = gated.fake_keeping(n, *operands[NORM_OPERANDS:])
    return _output(operands[0], operands[-2]), n, *of_transition, *kept


_call = register(
    Passes(
        name="conditioned_transition",
        operands=(*OF_NORM, "Tensor scale", *OF_WEIGHTS),
        options=(*OPTIONS, "bool keeping"),
        kept=("Tensor n", "Tensor ungated", *KEPT_OF_NORM),
        forward=forward,
        backward=backward,
        fake=_fake,
    )
)

_call_keeping = register_keeping(
    Passes(
        name="conditioned_transition_keeping",
        operands=(
            *OF_NORM, "Tensor condition", *OF_WEIGHTS, "Tensor weight_scale", "Tensor? bias_scale",
        ),
        options=OPTIONS,
        kept=(
            "Tensor n", "Tensor scale", "Tensor ungated", "Tensor pairs", "Tensor both",
            *KEPT_OF_NORM,
        ),
        forward=forward_keeping,
        backward=backward_from_kept,
        fake=_fake_keeping,
    )
)  # fmt: skip


def apply(
    of_norm: Sequence[torch.Tensor | None],
    condition: torch.Tensor,
    weights: Sequence[torch.Tensor],
    weight_scale: torch.Tensor,
    bias_scale: torch.Tensor | None,
    eps: float,
    dtype: torch.dtype,
) -> torch.Tensor:
    """A conditioned transition on its residual by the kernels; arguments validated.

    Args:
        of_norm: a, s and the four parameters of the norm.
        condition: s as products take it, as are all weights but the norm's of s.
        weights: of gate, value and output.
        dtype: of n.
    """
    a, s, *parameters = of_norm
    of_norm = (a, norm.shared(a, s), *parameters)
    differentiated = has_gradient(*of_norm, condition, *weights, weight_scale, bias_scale)
    if differentiated and gated.keeps(a, condition):
        operands = (*of_norm, condition, *weights, weight_scale, bias_scale)
        return _call_keeping(*operands, eps, dtype)
    scale = gated.as_period(a, F.linear(condition, weight_scale, bias_scale))
    return _call(*of_norm, scale, *weights, eps, dtype, differentiated)[0]

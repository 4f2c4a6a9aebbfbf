"""Adaptive LayerNorm as PyTorch operators: what torch.compile, autograd and opcheck see of it."""

from __future__ import annotations

import torch

from megafold.ops.adaptive_layer_norm import launch
from megafold.ops.registration import Passes, has_gradient, register

OPERANDS = (
    "Tensor a", "Tensor s", "Tensor? norm_weight_s", "Tensor weight_gate",
    "Tensor? bias_gate", "Tensor weight_shift",
)  # fmt: skip
OPTIONS = ("float eps", "ScalarType dtype")


def fake(a, s, norm_weight_s, weight_gate, bias_gate, weight_shift, eps, dtype):
    """What ``launch.forward`` returns, not computed."""

    def stats(x: torch.Tensor) -> torch.Tensor:
        return x.new_empty((2, x.numel() // x.shape[-1]), dtype=torch.float32)

    return a.new_empty(a.shape, dtype=dtype), stats(a), stats(s)


def fake_keeping(a, s, norm_weight_s, weight_gate, bias_gate, weight_shift, eps, dtype):
    """What ``launch.forward_keeping`` returns, not computed."""
    channels, channels_s = weight_gate.shape
    rows, empty = a.numel() // a.shape[-1], weight_gate.new_empty
    three = fake(a, s, norm_weight_s, weight_gate, bias_gate, weight_shift, eps, dtype)
    of_rows = empty((rows, channels_s)), empty((rows, channels))
    return *three, *of_rows, empty((2 * channels, channels_s))


_call = register(
    Passes(
        name="adaptive_layer_norm",
        operands=OPERANDS,
        options=OPTIONS,
        kept=("Tensor stats_a", "Tensor stats_s"),
        forward=launch.forward,
        backward=launch.backward,
        fake=fake,
    )
)

_call_keeping = register(
    Passes(
        name="adaptive_layer_norm_keeping",
        operands=OPERANDS,
        options=OPTIONS,
        kept=("Tensor stats_a", "Tensor stats_s", "Tensor normal", "Tensor gate", "Tensor both"),
        forward=launch.forward_keeping,
        backward=launch.backward_from_kept,
        fake=fake_keeping,
    )
)


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
    s = launch.shared(a, s)
    operands = a, s, norm_weight_s, weight_gate, bias_gate, weight_shift
    if launch.keeps(a, s, weight_gate) and has_gradient(*operands):
        return _call_keeping(*operands, eps, dtype)[0]
    return _call(*operands, eps, dtype)[0]

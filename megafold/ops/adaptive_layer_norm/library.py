"""Adaptive LayerNorm as PyTorch operators: what torch.compile, autograd and opcheck see of it."""

from __future__ import annotations

import torch

from megafold.ops.adaptive_layer_norm import launch
from megafold.ops.registration import Passes, register


def _fake(a, s, norm_weight_s, weight_gate, bias_gate, weight_shift, eps, dtype):
    def stats(x: torch.Tensor) -> torch.Tensor:
        return x.new_empty((2, x.numel() // x.shape[-1]), dtype=torch.float32)

    return a.new_empty(a.shape, dtype=dtype), stats(a), stats(s)


_call = register(
    Passes(
        name="adaptive_layer_norm",
        operands=(
            "Tensor a", "Tensor s", "Tensor? norm_weight_s", "Tensor weight_gate",
            "Tensor? bias_gate", "Tensor weight_shift",
        ),
        options=("float eps", "ScalarType dtype"),
        kept=("Tensor stats_a", "Tensor stats_s"),
        forward=launch.forward,
        backward=launch.backward,
        fake=_fake,
    )
)  # fmt: skip


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
    return _call(a, s, norm_weight_s, weight_gate, bias_gate, weight_shift, eps, dtype)[0]

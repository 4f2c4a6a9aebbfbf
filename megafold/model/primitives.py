"""Layers that every block is made of: linear layers with AlphaFold's initialisation,
transitions, adaptive LayerNorm.

Shape letters: S noised copies, N tokens or atoms, C channels.

Parameters live in plain ``torch.nn`` layers; the arithmetic is that of ``megafold.ops``.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import nn

from megafold import ops

Init = Literal["default", "relu", "gate", "final"]


def linear(c_in: int, c_out: int, *, bias: bool = False, init: Init = "default") -> nn.Linear:
    """A linear layer initialised as in AlphaFold: truncated normal scaled by fan-in.

    ``relu`` doubles the variance; ``gate`` and ``final`` start at zero, so that gates start
    half open and residual branches start as nothing.
    """
    layer = nn.Linear(c_in, c_out, bias=bias)
    with torch.no_grad():
        if init in ("gate", "final"):
            layer.weight.zero_()
        else:
            # A normal truncated at two standard deviations has 0.8796 of its width left.
            std = math.sqrt((2.0 if init == "relu" else 1.0) / c_in) / 0.87962566
            nn.init.trunc_normal_(layer.weight, std=std, a=-2 * std, b=2 * std)
        if bias:
            layer.bias.zero_()
    return layer


class Transition(nn.Module):
    """Algorithm 11: LayerNorm, SwiGLU, projection back. x ``[..., C]``.

    Returns the update of x, or with ``residual`` the updated x.
    """

    def __init__(self, c: int, n: int = 4) -> None:
        super().__init__()
        self.layer_norm = nn.LayerNorm(c)
        self.linear_gate = linear(c, n * c, init="relu")
        self.linear_value = linear(c, n * c, init="relu")
        self.linear_out = linear(n * c, c, init="final")

    def forward(self, x: torch.Tensor, *, residual: bool = False) -> torch.Tensor:
        return ops.transition(
            x,
            self.layer_norm.weight,
            self.layer_norm.bias,
            self.linear_gate.weight,
            self.linear_value.weight,
            self.linear_out.weight,
            self.layer_norm.eps,
            residual=residual,
        )


class LayerNormLinear(nn.Module):
    """LayerNorm followed by a linear layer without bias. x ``[..., C]`` -> ``[..., C_out]``."""

    def __init__(self, c: int, c_out: int, *, init: Init = "default") -> None:
        super().__init__()
        self.layer_norm = nn.LayerNorm(c)
        self.linear = linear(c, c_out, init=init)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        norm = self.layer_norm
        return ops.layer_norm_linear(x, norm.weight, norm.bias, self.linear.weight, eps=norm.eps)


class AdaptiveLayerNorm(nn.Module):
    """Algorithm 26: LayerNorm of ``a`` scaled and shifted by the conditioning ``s``.

    a ``[S, N, c_a]``, s ``[S or 1, N, c_s]``; returns as a.
    """

    def __init__(self, c_a: int, c_s: int) -> None:
        super().__init__()
        self.layer_norm_s = nn.LayerNorm(c_s, bias=False)
        self.linear_gate = linear(c_s, c_a, bias=True, init="gate")
        self.linear_shift = linear(c_s, c_a, init="final")

    def forward(self, a: torch.Tensor, s: torch.Tensor) -> torch.Tensor:
        return ops.adaptive_layer_norm(
            a,
            s,
            self.layer_norm_s.weight,
            self.linear_gate.weight,
            self.linear_gate.bias,
            self.linear_shift.weight,
            self.layer_norm_s.eps,
        )


class ConditionedTransition(nn.Module):
    """Algorithm 25: SwiGLU of the adaptively normalised ``a``, gated by ``s``.

    a ``[S, N, c_a]``, s ``[S or 1, N, c_s]``; returns the update of a, or with ``residual`` the
    updated a.
    """

    def __init__(self, c_a: int, c_s: int, n: int = 2) -> None:
        super().__init__()
        self.adaptive_layer_norm = AdaptiveLayerNorm(c_a, c_s)
        self.linear_gate = linear(c_a, n * c_a, init="relu")
        self.linear_value = linear(c_a, n * c_a, init="relu")
        self.linear_out = linear(n * c_a, c_a)
        self.linear_scale = zero_scale(c_a, c_s)

    def forward(self, a: torch.Tensor, s: torch.Tensor, *, residual: bool = False) -> torch.Tensor:
        norm = self.adaptive_layer_norm
        return ops.conditioned_transition(
            a,
            s,
            norm.layer_norm_s.weight,
            norm.linear_gate.weight,
            norm.linear_gate.bias,
            norm.linear_shift.weight,
            self.linear_gate.weight,
            self.linear_value.weight,
            self.linear_out.weight,
            self.linear_scale.weight,
            self.linear_scale.bias,
            norm.layer_norm_s.eps,
            residual=residual,
        )


def zero_scale(c_a: int, c_s: int) -> nn.Linear:
    """The "adaLN-Zero" output gate: starts nearly closed, sigmoid(-2) = 0.12."""
    layer = linear(c_s, c_a, bias=True, init="gate")
    nn.init.constant_(layer.bias, -2.0)
    return layer

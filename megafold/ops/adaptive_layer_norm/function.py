"""Adaptive LayerNorm: the public function, its validation and the choice of implementation."""

from __future__ import annotations

import torch

from megafold.ops import dispatch
from megafold.ops.adaptive_layer_norm.reference import reference
from megafold.ops.checks import (
    autocast,
    autocast_dtype,
    broadcasts,
    check_floats,
    check_shape,
    described,
)

NAME = "adaptive_layer_norm"


def adaptive_layer_norm(
    a: torch.Tensor,
    s: torch.Tensor,
    norm_weight_s: torch.Tensor | None,
    weight_gate: torch.Tensor,
    bias_gate: torch.Tensor | None,
    weight_shift: torch.Tensor,
    eps: float = 1e-5,
) -> torch.Tensor:
    """``sigmoid(weight_gate @ n + bias_gate) * layer_norm(a) + weight_shift @ n``.

    n is ``layer_norm(s)`` scaled by ``norm_weight_s``, without offset; the norm of a has
    neither scale nor offset.

    Args:
        a: ``[..., Ca]``, what is normalised; fp32, bf16, fp16 (or fp64); any strides.
        s: ``[..., Cs]``, what it is conditioned on. Its leading dimensions broadcast to those
            of a: one s for many samples is computed once.
        norm_weight_s: ``[Cs]`` or None.
        weight_gate, weight_shift: ``[Ca, Cs]``.
        bias_gate: ``[Ca]`` or None.
        eps: added to the variances.

    Returns:
        ``[..., Ca]``, dtype of a. Under ``torch.autocast`` the two linear layers run in the
        autocast dtype and the result has it, too: what reads it is linear layers.

    Raises:
        TypeError, ValueError: naming the argument, its shape or dtype, and what was expected.

    Algorithm 26 of AlphaFold 3.
    """
    check(a, s, norm_weight_s, weight_gate, bias_gate, weight_shift, eps)
    if dispatch.choose(NAME, a).implementation == "torch":
        return autocast(reference(a, s, norm_weight_s, weight_gate, bias_gate, weight_shift, eps))
    # Imported on first use: kernels compile (or are interpreted) as the environment then says.
    from megafold.ops.adaptive_layer_norm.library import modulate

    gate, shift = autocast(weight_gate), autocast(weight_shift)
    bias = None if bias_gate is None else autocast(bias_gate)
    return modulate(a, s, norm_weight_s, gate, bias, shift, eps, autocast_dtype(a))


def check(
    a: torch.Tensor,
    s: torch.Tensor,
    norm_weight_s: torch.Tensor | None,
    weight_gate: torch.Tensor,
    bias_gate: torch.Tensor | None,
    weight_shift: torch.Tensor,
    eps: float = 1e-5,
) -> None:
    """Raise TypeError or ValueError where the arguments are not a valid call."""
    check_floats(
        NAME,
        {"a": a, "s": s, "weight_gate": weight_gate, "weight_shift": weight_shift},
        {"norm_weight_s": norm_weight_s, "bias_gate": bias_gate},
    )
    for name, tensor in (("a", a), ("s", s)):
        if tensor.dim() < 1 or tensor.shape[-1] == 0:
            raise ValueError(
                f"{NAME}: {name} has shape {tuple(tensor.shape)}, expected [..., C] with C > 0"
            )
    if not broadcasts(tuple(s.shape[:-1]), tuple(a.shape[:-1])):
        raise ValueError(
            f"{NAME}: s has shape {tuple(s.shape)}, expected leading dimensions that broadcast "
            f"to those of {described('a', a)}"
        )
    shape, of = (a.shape[-1], s.shape[-1]), f"{described('a', a)} and {described('s', s)}"
    check_shape(NAME, "norm_weight_s", norm_weight_s, shape[1:], "[Cs]", of)
    check_shape(NAME, "weight_gate", weight_gate, shape, "[Ca, Cs]", of)
    check_shape(NAME, "bias_gate", bias_gate, shape[:1], "[Ca]", of)
    check_shape(NAME, "weight_shift", weight_shift, shape, "[Ca, Cs]", of)


def _configs(
    a: torch.Tensor,
    s: torch.Tensor,
    norm_weight_s: torch.Tensor | None,
    weight_gate: torch.Tensor,
    bias_gate: torch.Tensor | None,
    weight_shift: torch.Tensor,
    eps: float = 1e-5,
) -> tuple[str, ...]:
    """What this call would run in both passes: block sizes, and where they are from."""
    from megafold.ops.adaptive_layer_norm import launch

    return launch.described(a, s, autocast(weight_gate))


dispatch.register(
    dispatch.Operator(
        NAME, adaptive_layer_norm, check, "forward and backward are kernels", _configs
    )
)

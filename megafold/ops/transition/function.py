"""The SwiGLU transition: the public function, its validation and the choice of implementation."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from megafold.ops import dispatch
from megafold.ops.checks import check_floats, check_shape, described
from megafold.ops.transition.reference import reference

NAME = "transition"


def transition(
    x: torch.Tensor,
    norm_weight: torch.Tensor | None,
    norm_bias: torch.Tensor | None,
    weight_gate: torch.Tensor,
    weight_value: torch.Tensor,
    weight_out: torch.Tensor,
    eps: float = 1e-5,
) -> torch.Tensor:
    """``weight_out @ (silu(weight_gate @ n) * (weight_value @ n))`` with ``n = layer_norm(x)``.

    Args:
        x: ``[..., C]``, fp32, bf16, fp16 (or fp64); any strides.
        norm_weight, norm_bias: ``[C]`` or None (no scale, no offset).
        weight_gate, weight_value: ``[H, C]``; H is the hidden width, 4 C or 2 C in AlphaFold 3.
        weight_out: ``[C, H]``.
        eps: added to the variance.

    Returns:
        ``[..., C]``, dtype of x. Under ``torch.autocast`` the result has the autocast dtype,
        as that of ``torch.nn.functional.linear`` has.

    Raises:
        TypeError, ValueError: naming the argument, its shape or dtype, and what was expected.

    Algorithm 11 of AlphaFold 3.
    """
    check(x, norm_weight, norm_bias, weight_gate, weight_value, weight_out, eps)
    if dispatch.choose(NAME, x).implementation == "torch":
        return reference(x, norm_weight, norm_bias, weight_gate, weight_value, weight_out, eps)
    return _triton(x, norm_weight, norm_bias, weight_gate, weight_value, weight_out, eps)


def _triton(
    x: torch.Tensor,
    norm_weight: torch.Tensor | None,
    norm_bias: torch.Tensor | None,
    weight_gate: torch.Tensor,
    weight_value: torch.Tensor,
    weight_out: torch.Tensor,
    eps: float,
) -> torch.Tensor:
    """The norm and the matrix products by PyTorch, SwiGLU by Triton."""
    # Imported on first use: kernels compile (or are interpreted) as the environment then says.
    from megafold.ops.transition.kernels import swiglu

    normalised = F.layer_norm(x, x.shape[-1:], norm_weight, norm_bias, eps)
    hidden = swiglu(F.linear(normalised, weight_gate), F.linear(normalised, weight_value))
    return F.linear(hidden, weight_out)


def check(
    x: torch.Tensor,
    norm_weight: torch.Tensor | None,
    norm_bias: torch.Tensor | None,
    weight_gate: torch.Tensor,
    weight_value: torch.Tensor,
    weight_out: torch.Tensor,
    eps: float = 1e-5,
) -> None:
    """Raise TypeError or ValueError where the arguments are not a valid call."""
    linears = {
        "weight_gate": weight_gate,
        "weight_value": weight_value,
        "weight_out": weight_out,
    }
    norms = {"norm_weight": norm_weight, "norm_bias": norm_bias}
    check_floats(NAME, {"x": x, **linears}, norms)
    if x.dim() < 1 or x.shape[-1] == 0:
        raise ValueError(f"{NAME}: x has shape {tuple(x.shape)}, expected [..., C] with C > 0")
    channels, of = x.shape[-1], described("x", x)
    for name, tensor in norms.items():
        check_shape(NAME, name, tensor, (channels,), "[C]", of)
    if weight_gate.dim() != 2 or weight_gate.shape[1] != channels:
        raise ValueError(
            f"{NAME}: weight_gate has shape {tuple(weight_gate.shape)}, "
            f"expected [H, C] = (H, {channels}) for {of}"
        )
    hidden, of = weight_gate.shape[0], described("weight_gate", weight_gate)
    check_shape(NAME, "weight_value", weight_value, (hidden, channels), "[H, C]", of)
    check_shape(NAME, "weight_out", weight_out, (channels, hidden), "[C, H]", of)


dispatch.register(dispatch.Operator(NAME, transition, check, "its SwiGLU is a Triton kernel"))

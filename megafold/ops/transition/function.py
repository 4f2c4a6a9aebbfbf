"""The SwiGLU transition: the public function, its validation and the choice of implementation."""

from __future__ import annotations

import torch

from megafold.ops import dispatch
from megafold.ops.checks import autocast, autocast_dtype, check_floats, check_shape, described
from megafold.ops.precision import in_full_fp32
from megafold.ops.transition.reference import reference

NAME = "transition"
# In full fp32 the kernels beside the library's products gain no time on an H100, but memory where
# rows are many (docs/transition.md).
FEW_ROWS = 6144
NARROW = 128  # channels, as those of pairs


def transition(
    x: torch.Tensor,
    norm_weight: torch.Tensor | None,
    norm_bias: torch.Tensor | None,
    weight_gate: torch.Tensor,
    weight_value: torch.Tensor,
    weight_out: torch.Tensor,
    eps: float = 1e-5,
    *,
    residual: bool = False,
) -> torch.Tensor:
    """``weight_out @ (silu(weight_gate @ n) * (weight_value @ n))`` with ``n = layer_norm(x)``.

    Args:
        x: ``[..., C]``, fp32, bf16, fp16 (or fp64); any strides.
        norm_weight, norm_bias: ``[C]`` or None (no scale, no offset).
        weight_gate, weight_value: ``[H, C]``; H is the hidden width, 4 C or 2 C in AlphaFold 3.
        weight_out: ``[C, H]``.
        eps: added to the variance.
        residual: whether x is added to the update, ``x + transition(x)``. By the kernels that
            takes no pass of its own, nor does the sum of x's two gradients in the backward pass.

    Returns:
        ``[..., C]``, dtype of x. Under ``torch.autocast`` the result has the autocast dtype,
        as that of ``torch.nn.functional.linear`` has, or with the residual what PyTorch promotes
        the two to: an fp32 x stays as exact as it is.

    Raises:
        TypeError, ValueError: naming the argument, its shape or dtype, and what was expected.

    Algorithm 11 of AlphaFold 3.
    """
    call = (x, norm_weight, norm_bias, weight_gate, weight_value, weight_out, eps)
    check(*call, residual=residual)
    if dispatch.choose(NAME, *call).implementation == "torch":
        return reference(*call, residual=residual)
    # Imported on first use: kernels compile (or are interpreted) as the environment then says.
    from megafold.ops.transition.library import apply

    norms = (
        t if t is None or t.dtype != torch.float64 else t.float() for t in (norm_weight, norm_bias)
    )
    weights = (autocast(t) for t in (weight_gate, weight_value, weight_out))
    return apply(x, *norms, *weights, eps, residual)


def check(
    x: torch.Tensor,
    norm_weight: torch.Tensor | None,
    norm_bias: torch.Tensor | None,
    weight_gate: torch.Tensor,
    weight_value: torch.Tensor,
    weight_out: torch.Tensor,
    eps: float = 1e-5,
    *,
    residual: bool = False,
) -> None:
    """Raise TypeError or ValueError where the arguments are not a valid call."""
    linears = {
        "weight_gate": weight_gate,
        "weight_value": weight_value,
        "weight_out": weight_out,
    }
    norms = {"norm_weight": norm_weight, "norm_bias": norm_bias}
    check_floats(NAME, {"x": x, **linears}, norms)
    check_residual(NAME, residual, "x")
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


def check_residual(operator: str, residual: object, name: str) -> None:
    """Require a yes or no; other operators take a tensor of this name."""
    if not isinstance(residual, bool):
        raise TypeError(
            f"{operator}: residual must be True or False (whether {name} is added to the update), "
            f"got {type(residual).__name__}"
        )


def _configs(
    x: torch.Tensor,
    norm_weight: torch.Tensor | None,
    norm_bias: torch.Tensor | None,
    weight_gate: torch.Tensor,
    weight_value: torch.Tensor,
    weight_out: torch.Tensor,
    eps: float = 1e-5,
    *,
    residual: bool = False,
) -> tuple[str, ...]:
    """The plan this call would take, and the block sizes of its kernels."""
    from megafold.ops.transition import launch

    gate = autocast(weight_gate)
    added = (launch.where_added(x, gate),) if residual else ()
    return (*launch.explained(x, gate), *added)


def _slower(
    x: torch.Tensor,
    norm_weight: torch.Tensor | None,
    norm_bias: torch.Tensor | None,
    weight_gate: torch.Tensor,
    *rest: object,
    **options: object,
) -> str | None:
    """Full fp32 of few rows, or of wide ones."""
    rows, channels = x.numel() // x.shape[-1], x.shape[-1]
    if not in_full_fp32(autocast_dtype(weight_gate), x.device):
        return None
    if channels <= NARROW and rows >= FEW_ROWS:
        return None
    return (
        f"in full fp32 PyTorch is faster below {FEW_ROWS} rows, here {rows}, and for more than "
        f"{NARROW} channels, here {channels}"
    )


dispatch.register(
    dispatch.Operator(
        NAME, transition, check, "forward and backward are kernels", _configs, slower=_slower
    )
)

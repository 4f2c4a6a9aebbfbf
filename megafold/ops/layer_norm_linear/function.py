"""LayerNorm + Linear: the public function, its validation and the choice of implementation."""

from __future__ import annotations

import torch

from megafold.ops import dispatch
from megafold.ops.checks import autocast, autocast_dtype, check_floats, check_shape, described
from megafold.ops.layer_norm_linear.reference import reference

NAME = "layer_norm_linear"
# Rows from which the kernels beside torch's products are as fast as PyTorch, forward and backward,
# on an H100 (docs/layer_norm_linear.md).
FEW_ROWS = 6144


def layer_norm_linear(
    x: torch.Tensor,
    norm_weight: torch.Tensor | None,
    norm_bias: torch.Tensor | None,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    eps: float = 1e-5,
) -> torch.Tensor:
    """``linear(layer_norm(x, norm_weight, norm_bias, eps), weight, bias)``.

    Args:
        x: ``[..., C]``, fp32, bf16, fp16 (or fp64); any strides.
        norm_weight, norm_bias: ``[C]`` or None (no scale, no offset).
        weight: ``[O, C]``, as in ``torch.nn.Linear``.
        bias: ``[O]`` or None.
        eps: added to the variance.

    Returns:
        ``[..., O]``, dtype of x. Under ``torch.autocast`` the result has the autocast dtype,
        as that of ``torch.nn.functional.linear`` has.

    Raises:
        TypeError, ValueError: naming the argument, its shape or dtype, and what was expected.
    """
    check(x, norm_weight, norm_bias, weight, bias, eps)
    choice = dispatch.choose(NAME, x, norm_weight, norm_bias, weight, bias, eps)
    if choice.implementation == "torch":
        return reference(x, norm_weight, norm_bias, weight, bias, eps)
    # Imported on first use: kernels compile (or are interpreted) as the environment then says.
    from megafold.ops.layer_norm_linear.library import project

    weight = autocast(weight)
    return project(x, norm_weight, norm_bias, weight, bias, eps)


def check(
    x: torch.Tensor,
    norm_weight: torch.Tensor | None,
    norm_bias: torch.Tensor | None,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    eps: float = 1e-5,
) -> None:
    """Raise TypeError or ValueError where the arguments are not a valid call."""
    norms = {"norm_weight": norm_weight, "norm_bias": norm_bias}
    check_floats(NAME, {"x": x, "weight": weight}, {**norms, "bias": bias})
    if x.dim() < 1 or x.shape[-1] == 0:
        raise ValueError(f"{NAME}: x has shape {tuple(x.shape)}, expected [..., C] with C > 0")
    channels, of = x.shape[-1], described("x", x)
    for name, tensor in norms.items():
        check_shape(NAME, name, tensor, (channels,), "[C]", of)
    if weight.dim() != 2 or weight.shape[1] != channels:
        raise ValueError(
            f"{NAME}: weight has shape {tuple(weight.shape)}, expected [O, C] = (O, {channels}) "
            f"for {of}"
        )
    check_shape(NAME, "bias", bias, (weight.shape[0],), "[O]", described("weight", weight))


def _configs(
    x: torch.Tensor,
    norm_weight: torch.Tensor | None,
    norm_bias: torch.Tensor | None,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    eps: float = 1e-5,
) -> tuple[str, ...]:
    """What this call would run in both passes: block sizes, and where they are from."""
    from megafold.ops.layer_norm_linear import launch

    return launch.described(x, autocast(weight))


def _slower(
    x: torch.Tensor,
    norm_weight: torch.Tensor | None,
    norm_bias: torch.Tensor | None,
    weight: torch.Tensor,
    *rest: object,
    **options: object,
) -> str | None:
    """Few rows whose products are PyTorch's anyway: computing their norm again does not pay."""
    from megafold.ops.layer_norm_linear import launch

    rows = x.numel() // x.shape[-1]
    if not torch.is_grad_enabled() or rows >= FEW_ROWS:
        return None
    why = launch.why_not_fused(*weight.shape, autocast_dtype(weight))
    if why is None:
        return None
    return f"with gradients PyTorch is faster below {FEW_ROWS} rows, here {rows}, for {why}"


dispatch.register(
    dispatch.Operator(
        NAME, layer_norm_linear, check, "forward and backward are kernels", _configs, slower=_slower
    )
)

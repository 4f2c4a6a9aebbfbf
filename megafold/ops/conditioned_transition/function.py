"""The conditioned transition: the public function, its validation, the implementation's choice."""

from __future__ import annotations

import torch

from megafold.ops import dispatch
from megafold.ops.adaptive_layer_norm import adaptive_layer_norm
from megafold.ops.checks import autocast, autocast_dtype, check_floats, check_shape, described
from megafold.ops.conditioned_transition.reference import reference
from megafold.ops.precision import in_full_fp32
from megafold.ops.transition.function import NARROW, check_residual

NAME = "conditioned_transition"


def conditioned_transition(
    a: torch.Tensor,
    s: torch.Tensor,
    norm_weight_s: torch.Tensor | None,
    norm_weight_gate: torch.Tensor,
    norm_bias_gate: torch.Tensor | None,
    norm_weight_shift: torch.Tensor,
    weight_gate: torch.Tensor,
    weight_value: torch.Tensor,
    weight_out: torch.Tensor,
    weight_scale: torch.Tensor,
    bias_scale: torch.Tensor | None,
    eps: float = 1e-5,
    *,
    residual: bool = False,
) -> torch.Tensor:
    """``sigmoid(weight_scale @ s + bias_scale) * (weight_out @ (silu(gate) * value))``.

    gate and value are ``weight_gate @ n`` and ``weight_value @ n``, with ``n =
    adaptive_layer_norm(a, s, norm_weight_s, norm_weight_gate, norm_bias_gate,
    norm_weight_shift, eps)``.

    Args:
        a: ``[..., Ca]``; fp32, bf16, fp16 (or fp64); any strides.
        s: ``[..., Cs]``, the conditioning. Its leading dimensions broadcast to those of a: what
            is computed of one s for many samples is computed once.
        norm_weight_s: ``[Cs]`` or None.
        norm_weight_gate, norm_weight_shift: ``[Ca, Cs]``.
        norm_bias_gate: ``[Ca]`` or None.
        weight_gate, weight_value: ``[H, Ca]``; H is the hidden width, 2 Ca in AlphaFold 3.
        weight_out: ``[Ca, H]``.
        weight_scale: ``[Ca, Cs]``.
        bias_scale: ``[Ca]`` or None.
        eps: added to the variances.
        residual: whether a is added to the update, ``a + conditioned_transition(a, s)``. By the
            kernels that takes no pass of its own, nor does the sum of a's two gradients in the
            backward pass.

    Returns:
        ``[..., Ca]``, dtype of a; under ``torch.autocast`` the autocast dtype, as a product of
        linear layers has, or with the residual what PyTorch promotes the two to: an fp32 a stays as
        exact as it is.

    Raises:
        TypeError, ValueError: naming the argument, its shape or dtype, and what was expected.

    Algorithm 25 of AlphaFold 3. By the kernels the backward pass needs n, the logits of the gate,
    and what the gate is multiplied with. Of more than 128 channels, with as many rows of s as of a,
    gate and value are kept as well; else nothing hidden is.
    """
    call = (
        a, s, norm_weight_s, norm_weight_gate, norm_bias_gate, norm_weight_shift,
        weight_gate, weight_value, weight_out, weight_scale, bias_scale, eps,
    )  # fmt: skip
    check(*call, residual=residual)
    if dispatch.choose(NAME, *call).implementation == "torch":
        return reference(*call, residual=residual)
    if residual:
        return _on_residual(*call)
    # Imported on first use: kernels compile (or are interpreted) as the environment then says.
    from megafold.ops.conditioned_transition.library import apply

    n = adaptive_layer_norm(
        a, s, norm_weight_s, norm_weight_gate, norm_bias_gate, norm_weight_shift, eps
    )
    operands = n, s, weight_gate, weight_value, weight_out, weight_scale, bias_scale
    return apply(*(None if t is None else autocast(t) for t in operands))


def _on_residual(
    a: torch.Tensor,
    s: torch.Tensor,
    norm_weight_s: torch.Tensor | None,
    *parameters: torch.Tensor | float | None,
) -> torch.Tensor:
    """The call by the kernels, plus a; arguments as those of the public function."""
    from megafold.ops.conditioned_transition.residual import apply

    *of_norm, gate, value, out, scale, bias_scale, eps = (
        autocast(t) if isinstance(t, torch.Tensor) else t for t in parameters
    )
    of_norm = (a, s, norm_weight_s, *of_norm)
    return apply(
        of_norm, autocast(s), (gate, value, out), scale, bias_scale, eps, autocast_dtype(a)
    )


def check(
    a: torch.Tensor,
    s: torch.Tensor,
    norm_weight_s: torch.Tensor | None,
    norm_weight_gate: torch.Tensor,
    norm_bias_gate: torch.Tensor | None,
    norm_weight_shift: torch.Tensor,
    weight_gate: torch.Tensor,
    weight_value: torch.Tensor,
    weight_out: torch.Tensor,
    weight_scale: torch.Tensor,
    bias_scale: torch.Tensor | None,
    eps: float = 1e-5,
    *,
    residual: bool = False,
) -> None:
    """Raise TypeError or ValueError where the arguments are not a valid call."""
    required = {
        "a": a,
        "s": s,
        "norm_weight_gate": norm_weight_gate,
        "norm_weight_shift": norm_weight_shift,
        "weight_gate": weight_gate,
        "weight_value": weight_value,
        "weight_out": weight_out,
        "weight_scale": weight_scale,
    }
    optional = {
        "norm_weight_s": norm_weight_s,
        "norm_bias_gate": norm_bias_gate,
        "bias_scale": bias_scale,
    }
    check_floats(NAME, required, optional)
    check_residual(NAME, residual, "a")
    for name, tensor in (("a", a), ("s", s)):
        if tensor.dim() < 1 or tensor.shape[-1] == 0:
            raise ValueError(
                f"{NAME}: {name} has shape {tuple(tensor.shape)}, expected [..., C] with C > 0"
            )
    # As many of a's dimensions as s has, each 1 or the same.
    beside = a.shape[:-1][max(a.dim() - s.dim(), 0) :]
    if s.dim() > a.dim() or any(n not in (1, m) for n, m in zip(s.shape, beside, strict=False)):
        raise ValueError(
            f"{NAME}: s has shape {tuple(s.shape)}, expected leading dimensions that broadcast "
            f"to those of {described('a', a)}"
        )
    channels, condition = a.shape[-1], s.shape[-1]
    of = f"{described('a', a)} and {described('s', s)}"
    check_shape(NAME, "norm_weight_s", norm_weight_s, (condition,), "[Cs]", of)
    for name in ("norm_weight_gate", "norm_weight_shift", "weight_scale"):
        check_shape(NAME, name, required[name], (channels, condition), "[Ca, Cs]", of)
    for name in ("norm_bias_gate", "bias_scale"):
        check_shape(NAME, name, optional[name], (channels,), "[Ca]", of)
    if weight_gate.dim() != 2 or weight_gate.shape[1] != channels:
        raise ValueError(
            f"{NAME}: weight_gate has shape {tuple(weight_gate.shape)}, "
            f"expected [H, Ca] = (H, {channels}) for {described('a', a)}"
        )
    hidden, of = weight_gate.shape[0], described("weight_gate", weight_gate)
    check_shape(NAME, "weight_value", weight_value, (hidden, channels), "[H, Ca]", of)
    check_shape(NAME, "weight_out", weight_out, (channels, hidden), "[Ca, H]", of)


def _configs(
    a: torch.Tensor,
    s: torch.Tensor,
    norm_weight_s: torch.Tensor | None,
    norm_weight_gate: torch.Tensor,
    norm_bias_gate: torch.Tensor | None,
    norm_weight_shift: torch.Tensor,
    weight_gate: torch.Tensor,
    weight_value: torch.Tensor,
    weight_out: torch.Tensor,
    weight_scale: torch.Tensor,
    bias_scale: torch.Tensor | None,
    eps: float = 1e-5,
    *,
    residual: bool = False,
) -> tuple[str, ...]:
    """What the kernels of this call would be: the norm's, the transition's, and the gate's."""
    from megafold.ops.conditioned_transition.library import keeps
    from megafold.ops.gated import launch as gated
    from megafold.ops.gated.library import as_last
    from megafold.ops.transition import launch

    gate = autocast(weight_gate)
    norm = dispatch.explain(
        "adaptive_layer_norm",
        a, s, norm_weight_s, norm_weight_gate, norm_bias_gate, norm_weight_shift, eps,
    )  # fmt: skip
    plan = launch.explained(a, gate, kept=keeps(a, s), what="n")
    ungated = a.detach().to(gate.dtype)
    scale = as_last(ungated, ungated.new_empty((*s.shape[:-1], a.shape[-1])))
    gates = [
        line
        for line in gated.described(ungated, scale)
        if not keeps(a, s) or line.startswith(gated.FORWARD)  # its gradients are the transition's
    ]
    how = "residual: a added in the kernel of the gate, its gradients in the norm's"
    return (*str(norm).splitlines(), *plan, *gates, *residual * (how,))


def _slower(
    a: torch.Tensor,
    s: torch.Tensor,
    norm_weight_s: torch.Tensor | None,
    norm_weight_gate: torch.Tensor,
    norm_bias_gate: torch.Tensor | None,
    norm_weight_shift: torch.Tensor,
    weight_gate: torch.Tensor,
    *rest: object,
    **options: object,
) -> str | None:
    """Full fp32 of wide rows, as of the transition."""
    channels = a.shape[-1]
    if channels <= NARROW or not in_full_fp32(autocast_dtype(weight_gate), a.device):
        return None
    return f"in full fp32 PyTorch is faster for more than {NARROW} channels, here {channels}"


dispatch.register(
    dispatch.Operator(
        NAME,
        conditioned_transition,
        check,
        "SwiGLU and gate are kernels",
        _configs,
        slower=_slower,
    )
)

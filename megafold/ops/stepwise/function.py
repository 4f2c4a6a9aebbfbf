"""What stands between the products of a conditioned transformer block, where nothing is trained.

A denoising step of one structure is hundreds of kernels of two microseconds, and as long between
them: here each is one kernel, whatever it reads. None of these has a gradient.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from megafold.ops import dispatch
from megafold.ops.registration import has_gradient


def modulated(
    a: torch.Tensor, gate: torch.Tensor, shift: torch.Tensor, eps: float = 1e-5
) -> torch.Tensor:
    """``sigmoid(gate) * layer_norm(a) + shift``, the end of adaptive LayerNorm (Algorithm 26).

    Args:
        a: ``[S, N, C]``.
        gate, shift: ``[S or 1, N, C]``, channels side by side, dtype of a.
        eps: added to the variance.

    Returns:
        ``[S, N, C]``, dtype of gate.

    Raises:
        RuntimeError: a gradient is asked for, of which there is none.
    """
    _without_gradient("modulated", a, gate, shift)
    if not dispatch.by_kernels("modulated", a):
        return torch.sigmoid(gate) * F.layer_norm(a, a.shape[-1:], eps=eps).to(gate.dtype) + shift
    from megafold.ops.stepwise import launch

    return launch.modulate(a, gate, shift, eps)


def gated(x: torch.Tensor, gate: torch.Tensor, added: torch.Tensor | None = None) -> torch.Tensor:
    """``added + sigmoid(gate) * x``.

    Args:
        x: ``[S, N, C]``.
        gate: ``[S or 1, N, C]``, channels side by side.
        added: ``[S, N, C]``, or None for nothing.

    Returns:
        ``[S, N, C]``, dtype of x, or of ``added`` where it is.

    Raises:
        RuntimeError: a gradient is asked for, of which there is none.
    """
    _without_gradient("gated", x, gate, added)
    if not dispatch.by_kernels("gated", x):
        update = torch.sigmoid(gate) * x
        return update if added is None else (added + update).to(added.dtype)
    from megafold.ops.stepwise import launch

    return launch.gate(x, gate, added)


def swiglu(pairs: torch.Tensor) -> torch.Tensor:
    """``silu(gate) * value`` of both side by side, ``[S, N, 2 H]``: ``[S, N, H]``.

    Raises:
        RuntimeError: a gradient is asked for, of which there is none.
    """
    _without_gradient("swiglu", pairs)
    if not dispatch.by_kernels("swiglu", pairs):
        gate, value = pairs.chunk(2, dim=-1)
        return F.silu(gate) * value
    from megafold.ops.stepwise import launch

    return launch.swiglu(pairs)


def _without_gradient(name: str, *tensors: torch.Tensor | None) -> None:
    if has_gradient(*tensors):
        raise RuntimeError(f"{name} has no gradient; call it under torch.no_grad()")

"""The equation of the triangle multiplicative update in plain PyTorch."""

from __future__ import annotations

import torch
import torch.nn.functional as F

OUTGOING = "bikc,bjkc->bijc"
INCOMING = "bkic,bkjc->bijc"


def reference(
    z: torch.Tensor,
    mask: torch.Tensor | None,
    norm_in_weight: torch.Tensor | None,
    norm_in_bias: torch.Tensor | None,
    p_in_weight: torch.Tensor,
    g_in_weight: torch.Tensor,
    norm_out_weight: torch.Tensor | None,
    norm_out_bias: torch.Tensor | None,
    p_out_weight: torch.Tensor,
    g_out_weight: torch.Tensor,
    *,
    outgoing: bool = True,
    eps: float = 1e-5,
    dropout: torch.Tensor | None = None,
    residual: bool = False,
) -> torch.Tensor:
    """Update every edge from the two other edges of all its triangles.

    ``update_ij = sigmoid(g_out n_ij) * p_out layer_norm(sum_k a_ik * b_jk)``, with
    ``a, b = sigmoid(g_in n) * (p_in n)`` and n the normalised z; incoming uses ``a_ki, b_kj``.
    The result is ``dropout * update``, added to z where ``residual`` says so, in one pass; of these
    two autograd stores nothing but dropout. Arguments as in
    :func:`megafold.ops.triangle_multiplication`.
    """
    channels = z.shape[-1:]
    normalised = F.layer_norm(z, channels, norm_in_weight, norm_in_bias, eps)
    edges = F.linear(normalised, p_in_weight) * torch.sigmoid(F.linear(normalised, g_in_weight))
    if mask is not None:
        edges = edges * mask[..., None]
    a, b = edges.chunk(2, dim=-1)
    update = torch.einsum(OUTGOING if outgoing else INCOMING, a, b)
    update = F.layer_norm(update, channels, norm_out_weight, norm_out_bias, eps)
    update = F.linear(update, p_out_weight) * torch.sigmoid(F.linear(normalised, g_out_weight))
    if dropout is None:
        return z + update if residual else update
    return torch.addcmul(z, dropout, update) if residual else dropout * update

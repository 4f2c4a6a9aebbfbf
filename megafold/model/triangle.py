"""Updates of the pair representation along triangles of tokens, and the stack of them."""

from __future__ import annotations

import torch
from torch import nn

from megafold import ops
from megafold.model.dropout import dropout_mask
from megafold.model.primitives import Transition, linear


class TriangleMultiplication(nn.Module):
    """Algorithms 12 (outgoing) and 13 (incoming). z ``[N, N, C]``, mask ``[N, N]`` bool."""

    def __init__(self, c_z: int, *, outgoing: bool) -> None:
        super().__init__()
        self.outgoing = outgoing
        self.layer_norm_in = nn.LayerNorm(c_z)
        self.linear_p_in = linear(c_z, 2 * c_z)
        self.linear_g_in = linear(c_z, 2 * c_z, init="gate")
        self.layer_norm_out = nn.LayerNorm(c_z)
        self.linear_p_out = linear(c_z, c_z, init="final")
        self.linear_g_out = linear(c_z, c_z, init="gate")

    def forward(
        self,
        z: torch.Tensor,
        mask: torch.Tensor,
        dropout: torch.Tensor | None = None,
        *,
        residual: bool = False,
    ) -> torch.Tensor:
        """The update of z, times ``dropout`` where there is one; added to z with ``residual``."""
        return ops.triangle_multiplication(
            z.unsqueeze(0),
            mask.unsqueeze(0),
            self.layer_norm_in.weight,
            self.layer_norm_in.bias,
            self.linear_p_in.weight,
            self.linear_g_in.weight,
            self.layer_norm_out.weight,
            self.layer_norm_out.bias,
            self.linear_p_out.weight,
            self.linear_g_out.weight,
            outgoing=self.outgoing,
            eps=self.layer_norm_in.eps,
            dropout=dropout,
            residual=residual,
        ).squeeze(0)


class TriangleAttention(nn.Module):
    """Algorithms 14 (around the starting node) and 15 (ending). z ``[N, N, C]``."""

    def __init__(self, c_z: int, heads: int, *, starting: bool) -> None:
        super().__init__()
        self.starting = starting
        self.layer_norm = nn.LayerNorm(c_z)
        self.linear_q = linear(c_z, c_z)
        self.linear_k = linear(c_z, c_z)
        self.linear_v = linear(c_z, c_z)
        self.linear_b = linear(c_z, heads)
        self.linear_g = linear(c_z, c_z, init="gate")
        self.linear_out = linear(c_z, c_z, init="final")

    def forward(
        self,
        z: torch.Tensor,
        mask: torch.Tensor,
        dropout: torch.Tensor | None = None,
        *,
        residual: bool = False,
    ) -> torch.Tensor:
        """The update of z, times ``dropout`` where there is one; added to z with ``residual``."""
        return ops.triangle_attention(
            z.unsqueeze(0),
            mask.unsqueeze(0),
            self.layer_norm.weight,
            self.layer_norm.bias,
            self.linear_q.weight,
            self.linear_k.weight,
            self.linear_v.weight,
            self.linear_b.weight,
            self.linear_g.weight,
            self.linear_out.weight,
            starting=self.starting,
            eps=self.layer_norm.eps,
            dropout=dropout,
            residual=residual,
        ).squeeze(0)


class PairStack(nn.Module):
    """The pair half of a Pairformer block (Algorithm 17, lines 2 to 6)."""

    def __init__(self, c_z: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.dropout = dropout
        self.triangle_multiplication_outgoing = TriangleMultiplication(c_z, outgoing=True)
        self.triangle_multiplication_incoming = TriangleMultiplication(c_z, outgoing=False)
        self.triangle_attention_starting = TriangleAttention(c_z, heads, starting=True)
        self.triangle_attention_ending = TriangleAttention(c_z, heads, starting=False)
        self.transition = Transition(c_z)

    def forward(self, z: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """z ``[N, N, C]``, mask ``[N, N]`` bool; returns the updated z."""

        def dropped(shared: int) -> torch.Tensor | None:
            return dropout_mask(z, self.dropout, shared, self.training)

        rows, columns = 0, 1  # along which a mask of dropout is the same
        z = self.triangle_multiplication_outgoing(z, mask, dropped(rows), residual=True)
        z = self.triangle_multiplication_incoming(z, mask, dropped(rows), residual=True)
        z = self.triangle_attention_starting(z, mask, dropped(rows), residual=True)
        z = self.triangle_attention_ending(z, mask, dropped(columns), residual=True)
        return self.transition(z, residual=True)

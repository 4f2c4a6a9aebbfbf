"""Updates of the pair representation along triangles of tokens, and the stack of them."""

from __future__ import annotations

import torch
from torch import nn

from megafold import ops
from megafold.model.dropout import add_dropped, dropout_mask
from megafold.model.primitives import Transition, linear

# Rows of a projection that is cut into parts are multiples of this: the kernels read a part 16
# bytes at a time where each of its rows begins at such an address, else number by number.
ALIGNED = 16


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

    def forward(self, z: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
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
        ).squeeze(0)


class TriangleAttention(nn.Module):
    """Algorithms 14 (around the starting node) and 15 (ending). z ``[N, N, C]``."""

    def __init__(self, c_z: int, heads: int, *, starting: bool) -> None:
        super().__init__()
        self.heads = heads
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
        residual: torch.Tensor | None = None,
        dropout: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """The update of z, times ``dropout`` where there is one, added to ``residual``."""
        layers = (self.linear_q, self.linear_k, self.linear_v, self.linear_g, self.linear_b)
        widths = [layer.out_features for layer in layers]
        padding = self.linear_b.weight.new_zeros(-sum(widths) % ALIGNED, z.shape[-1])
        widths[-1] += len(padding)  # so that every part is aligned, in the backward pass too
        # One LayerNorm feeds all five projections.
        projected = ops.layer_norm_linear(
            z,
            self.layer_norm.weight,
            self.layer_norm.bias,
            torch.cat([*(layer.weight for layer in layers), padding]),
            eps=self.layer_norm.eps,
        )
        q, k, v, g, b = projected.split(widths, dim=-1)
        q, k, v = (x.unflatten(-1, (self.heads, -1)).unsqueeze(0) for x in (q, k, v))
        b = b[..., : self.heads].permute(2, 0, 1).unsqueeze(0)
        mask = mask.unsqueeze(0)
        if self.starting:
            out = ops.evo_attention(q, k, v, mask, b).squeeze(0)
        else:
            # Around the ending node i and j change places: other strides, nothing copied.
            q, k, v = (x.transpose(1, 2) for x in (q, k, v))
            out = ops.evo_attention(q, k, v, mask.transpose(1, 2), b.transpose(2, 3))
            out = out.squeeze(0).transpose(0, 1)
        return ops.gated_linear(out.flatten(-2), g, self.linear_out.weight, residual, dropout)


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

        def added(update: torch.Tensor, shared: int) -> torch.Tensor:
            return add_dropped(z, update, self.dropout, shared, self.training)

        def dropped(shared: int) -> torch.Tensor | None:
            return dropout_mask(z, self.dropout, shared, self.training)

        rows, columns = 0, 1  # along which a mask of dropout is the same
        z = added(self.triangle_multiplication_outgoing(z, mask), rows)
        z = added(self.triangle_multiplication_incoming(z, mask), rows)
        z = self.triangle_attention_starting(z, mask, z, dropped(rows))
        z = self.triangle_attention_ending(z, mask, z, dropped(columns))
        return z + self.transition(z)

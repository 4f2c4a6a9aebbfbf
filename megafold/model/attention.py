"""Attention with pair bias, over all tokens or over windows of atoms.

Shape letters: N tokens or atoms, S noised copies, W windows, H heads, D head width.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn

from megafold import ops
from megafold.model.primitives import AdaptiveLayerNorm, LayerNormLinear, linear, zero_scale

if TYPE_CHECKING:
    from megafold.model.windows import AtomWindows


class AttentionPairBias(nn.Module):
    """Algorithm 24: gated attention whose logits carry a bias from the pair representation.

    With ``c_s`` the input is normalised, and the output scaled, by a conditioning ``s``
    (diffusion and atom transformers); without, by a plain LayerNorm (Pairformer).
    """

    def __init__(self, c_a: int, c_pair: int, heads: int, c_s: int | None = None) -> None:
        super().__init__()
        if c_a % heads:
            raise ValueError(f"c_a = {c_a} is not a multiple of heads = {heads}")
        self.heads = heads
        self.conditioned = c_s is not None
        self.norm = nn.LayerNorm(c_a) if c_s is None else AdaptiveLayerNorm(c_a, c_s)
        self.linear_q = linear(c_a, c_a, bias=True)
        self.linear_k = linear(c_a, c_a)
        self.linear_v = linear(c_a, c_a)
        self.pair_bias = LayerNormLinear(c_pair, heads)
        self.linear_g = linear(c_a, c_a, init="gate")
        # In the conditioned form the scale alone closes the branch at the start.
        self.linear_out = linear(c_a, c_a, init="final" if c_s is None else "default")
        if c_s is not None:
            self.linear_scale = zero_scale(c_a, c_s)

    def forward(
        self,
        a: torch.Tensor,
        pair: torch.Tensor,
        mask: torch.Tensor,
        s: torch.Tensor | None = None,
        windows: AtomWindows | None = None,
        residual: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """a ``[S, N, c_a]``, mask ``[N]`` bool, s ``[S or 1, N, c_s]``; returns as ``a``.

        pair is ``[N, N, c_pair]``, or ``[W, 32, 128, c_pair]`` with ``windows``; the update is
        added to ``residual`` ``[S, N, c_a]`` where it is given.
        """
        q, k, v, g = self._project(a, s)
        out = self.attend(q, k, v, self.bias_of(pair), mask, windows)
        # Not `ops.gated_linear`, whose kernels take 128 channels at most: tokens have more.
        out = self.linear_out(ops.gated(out, g))
        if self.conditioned:
            return ops.gated(out, self.linear_scale(s), residual)
        return out if residual is None else residual + out

    def attend(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        bias: torch.Tensor,
        mask: torch.Tensor,
        windows: AtomWindows | None = None,
    ) -> torch.Tensor:
        """q, k and v ``[S, N, c_a]``, bias what :meth:`bias_of` gives; returns as they are."""
        q, k, v = (x.unflatten(-1, (self.heads, -1)) for x in (q, k, v))
        # One operator serves both: all tokens are a single window, [1, S, N, H, D].
        if windows is None:
            q, k, v = q.unsqueeze(0), k.unsqueeze(0), v.unsqueeze(0)
            key_mask = mask[None, None]
        else:
            q, k, v = windows.queries(q), windows.keys(k), windows.keys(v)
            key_mask = windows.key_mask[:, None]
        out = ops.evo_attention(q, k, v, key_mask, bias)
        out = out.squeeze(0) if windows is None else windows.merge(out)
        return out.flatten(-2)

    def bias_of(self, pair: torch.Tensor) -> torch.Tensor:
        """What the logits carry: ``[1, H, N, N]``, or ``[W, H, 32, 128]`` of windows."""
        bias = self.pair_bias(pair)
        return (bias if bias.dim() == 4 else bias.unsqueeze(0)).permute(0, 3, 1, 2)

    def _project(self, a: torch.Tensor, s: torch.Tensor | None) -> tuple[torch.Tensor, ...]:
        """Queries, keys, values and the gate before its sigmoid, each ``[S, N, c_a]``."""
        layers = (self.linear_q, self.linear_k, self.linear_v, self.linear_g)
        if self.conditioned:
            a = self.norm(a, s)
            return tuple(layer(a) for layer in layers)
        # One LayerNorm feeds all four; only the queries have a bias.
        bias = self.linear_q.bias
        projected = ops.layer_norm_linear(
            a,
            self.norm.weight,
            self.norm.bias,
            torch.cat([layer.weight for layer in layers]),
            torch.cat([bias, bias.new_zeros(3 * len(bias))]),
            self.norm.eps,
        )
        return projected.chunk(4, dim=-1)

"""The MSA module (Algorithm 8): what the alignment tells the pair representation.

Shape letters: M alignment rows, N tokens.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.functional import one_hot

from megafold import ops
from megafold.model.blocks import Blocks
from megafold.model.config import ModelConfig
from megafold.model.dropout import dropout_mask
from megafold.model.primitives import LayerNormLinear, Transition, linear
from megafold.model.triangle import PairStack

if TYPE_CHECKING:
    from megafold.data.batch import Batch


class OuterProductMean(nn.Module):
    """Algorithm 9: mean over rows of the outer product of two projections of m."""

    def __init__(self, c_m: int, c_z: int, c: int) -> None:
        super().__init__()
        self.ab = LayerNormLinear(c_m, 2 * c)
        self.linear_out = linear(c * c, c_z, bias=True, init="final")

    def forward(self, m: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """m ``[M, N, c_m]``, mask ``[M, N]`` bool; returns ``[N, N, c_z]``."""
        weight, count = mask.to(m.dtype), mask.shape[0]
        # By the root of their number each: half precision has neither the sum nor a's part of it.
        a, b = (self.ab(m) * (weight * count**-0.5)[..., None]).chunk(2, dim=-1)
        # What rows are masked is made up for behind the projection, whose result is smaller.
        outer = torch.einsum("sic,sjd->ijcd", a, b).flatten(-2)
        update = F.linear(outer, self.linear_out.weight)
        # (Autocast on a GPU has reciprocals in fp32.)
        more = (count / (weight.T @ weight).clamp(min=1.0)).to(update.dtype)
        return torch.addcmul(self.linear_out.bias.to(update.dtype), update, more[..., None])


class PairWeightedAveraging(nn.Module):
    """Algorithm 10: each row averaged over tokens with weights from the pair alone."""

    def __init__(self, c_m: int, c_z: int, heads: int, c_head: int) -> None:
        super().__init__()
        self.heads = heads
        self.vg = LayerNormLinear(c_m, 2 * heads * c_head)
        self.pair_bias = LayerNormLinear(c_z, heads)
        self.linear_out = linear(heads * c_head, c_m, init="final")

    def forward(
        self,
        m: torch.Tensor,
        z: torch.Tensor,
        token_mask: torch.Tensor,
        dropout: torch.Tensor | None = None,
        *,
        residual: bool = False,
    ) -> torch.Tensor:
        """m ``[M, N, c_m]``, z ``[N, N, c_z]``, token_mask ``[N]`` bool; returns as m.

        The update of m, times ``dropout`` where there is one; added to m with ``residual``.
        """
        v, g = self.vg(m).chunk(2, dim=-1)
        logits = self.pair_bias(z)
        never = torch.finfo(logits.dtype).min  # not -inf: of padding alone that is no number
        logits = logits.masked_fill(~token_mask[None, :, None], never)
        weight = torch.softmax(logits, dim=1)
        v = v.unflatten(-1, (self.heads, -1))
        out = torch.einsum("ijh,sjhc->sihc", weight, v).flatten(-2)
        added = m if residual else None
        return ops.gated_linear(out, g, self.linear_out.weight, added, dropout)


class MSABlock(nn.Module):
    """One block: alignment to pair, pair to alignment, then the pair stack.

    Nothing reads the alignment after the last block, so that block does not update it.
    """

    def __init__(self, config: ModelConfig, *, last: bool) -> None:
        super().__init__()
        self.last = last
        self.dropout = config.msa_dropout
        self.outer_product_mean = OuterProductMean(config.c_m, config.c_z, config.c_outer_product)
        if not last:
            self.pair_weighted_averaging = PairWeightedAveraging(
                config.c_m, config.c_z, config.msa_heads, config.c_msa_head
            )
            self.transition = Transition(config.c_m)
        self.pair_stack = PairStack(config.c_z, config.triangle_heads, config.pair_dropout)

    def forward(
        self,
        m: torch.Tensor,
        z: torch.Tensor,
        msa_mask: torch.Tensor,
        token_mask: torch.Tensor,
        pair_mask: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """m ``[M, N, c_m]``, z ``[N, N, c_z]``, masks bool; returns both updated."""
        z = z + self.outer_product_mean(m, msa_mask)
        if not self.last:
            mask = dropout_mask(m, self.dropout, 0, self.training)
            m = self.pair_weighted_averaging(m, z, token_mask, mask, residual=True)
            m = self.transition(m, residual=True)
        return m, self.pair_stack(z, pair_mask)


class MSAModule(nn.Module):
    """Algorithm 8. Every call reads a fresh subset of rows; the query always stays."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.rows = config.msa_rows
        self.linear_m = linear(34, config.c_m)
        self.linear_s = linear(config.c_s_inputs, config.c_m)
        self.blocks = Blocks(
            (MSABlock(config, last=i == config.msa_blocks - 1) for i in range(config.msa_blocks)),
            checkpointing=config.checkpointing,
        )

    def forward(
        self,
        batch: Batch,
        rows: torch.Tensor,
        s_inputs: torch.Tensor,
        z: torch.Tensor,
        pair_mask: torch.Tensor,
    ) -> torch.Tensor:
        """rows from ``draw_rows``, s_inputs ``[N, c_s_inputs]``, z ``[N, N, c_z]``: a new z."""
        features = torch.cat(
            [
                one_hot(batch.msa[rows], 32).to(z.dtype),
                batch.has_deletion[rows, :, None].to(z.dtype),
                batch.deletion_value[rows, :, None].to(z.dtype),
            ],
            dim=-1,
        )
        m = self.linear_m(features) + self.linear_s(s_inputs)
        msa_mask = batch.msa_mask[rows] & batch.token_mask
        for block in self.blocks:
            m, z = self.blocks.run(block, m, z, msa_mask, batch.token_mask, pair_mask)
        return z

    def draw_rows(self, batch: Batch, generator: torch.Generator) -> torch.Tensor:
        """Alignment rows for one cycle, int64, the query first.

        Padding rows are drawn only where the others are fewer than a cycle reads; so as many
        rows come of every batch of one shape.
        """
        available, device = batch.msa.shape[0], batch.msa.device
        if available <= self.rows:
            return torch.arange(available, device=device)
        there = batch.msa_mask.any(-1).cpu()
        there[0] = True  # the query
        found, padding = there.nonzero().squeeze(1), (~there).nonzero().squeeze(1)
        if len(found) > self.rows:
            drawn = 1 + torch.randperm(len(found) - 1, generator=generator)[: self.rows - 1]
            found = found[torch.cat([torch.zeros(1, dtype=torch.long), drawn])]
        return torch.cat([found, padding])[: self.rows].to(device)

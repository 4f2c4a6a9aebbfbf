"""The template embedder (Algorithm 16). Shape letters: T template slots, N tokens."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.nn.functional import one_hot

from megafold.model.blocks import Blocks
from megafold.model.config import ModelConfig
from megafold.model.primitives import LayerNormLinear, linear
from megafold.model.triangle import PairStack

if TYPE_CHECKING:
    from megafold.data.batch import Batch

DISTOGRAM_BINS = 39
# Distogram, pseudo-beta mask, both restypes, unit vector, frame mask.
C_FEATURES = DISTOGRAM_BINS + 1 + 2 * 32 + 3 + 1


class TemplateEmbedder(nn.Module):
    """Adds what structures of related chains say about distances. Empty slots add nothing."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        c = config.c_template
        self.linear_z = LayerNormLinear(config.c_z, c)
        self.linear_a = linear(C_FEATURES, c)
        self.blocks = Blocks(
            (
                PairStack(c, config.template_heads, config.pair_dropout)
                for _ in range(config.template_blocks)
            ),
            checkpointing=config.checkpointing,
        )
        self.layer_norm_v = nn.LayerNorm(c)
        self.linear_out = linear(c, config.c_z, init="relu")

    def forward(self, batch: Batch, z: torch.Tensor, pair_mask: torch.Tensor) -> torch.Tensor:
        """z ``[N, N, c_z]``; returns the update ``[N, N, c_z]``."""
        same_chain = batch.asym_id[:, None] == batch.asym_id[None, :]
        from_z = self.linear_z(z)
        total = torch.zeros_like(from_z)
        for slot in range(batch.template_mask.shape[0]):
            features = _pair_features(batch, slot, same_chain).to(z.dtype)
            v = from_z + self.linear_a(features)
            for block in self.blocks:
                v = self.blocks.run(block, v, pair_mask)
            total = total + self.layer_norm_v(v) * batch.template_mask[slot]
        count = batch.template_mask.sum().clamp(min=1)
        return self.linear_out(torch.relu(total / count))


def _pair_features(batch: Batch, slot: int, same_chain: torch.Tensor) -> torch.Tensor:
    """One slot's features ``[N, N, C_FEATURES]``, zero between chains but for the restypes."""
    n = same_chain.shape[0]
    beta = batch.template_pseudo_beta_mask[slot]
    frame = batch.template_backbone_frame_mask[slot]
    beta_pair = (beta[:, None] & beta[None, :] & same_chain)[..., None]
    frame_pair = (frame[:, None] & frame[None, :] & same_chain)[..., None]
    restype = one_hot(batch.template_restype[slot], 32)
    return torch.cat(
        [
            one_hot(batch.template_distogram[slot], DISTOGRAM_BINS) * beta_pair,
            beta_pair,
            restype[:, None].expand(n, n, 32),
            restype[None, :].expand(n, n, 32),
            batch.template_unit_vector[slot] * frame_pair,
            frame_pair,
        ],
        dim=-1,
    )

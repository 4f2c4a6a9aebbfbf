"""The Pairformer: the trunk's stack of pair and single updates (Algorithm 17)."""

from __future__ import annotations

import torch
from torch import nn

from megafold.model.attention import AttentionPairBias
from megafold.model.blocks import Blocks
from megafold.model.config import ModelConfig
from megafold.model.primitives import Transition
from megafold.model.triangle import PairStack


class PairformerBlock(nn.Module):
    """One block. s ``[N, c_s]``, z ``[N, N, c_z]``."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.pair_stack = PairStack(config.c_z, config.triangle_heads, config.pair_dropout)
        self.attention_pair_bias = AttentionPairBias(
            config.c_s, config.c_z, config.pairformer_heads
        )
        self.transition = Transition(config.c_s)

    def forward(
        self, s: torch.Tensor, z: torch.Tensor, token_mask: torch.Tensor, pair_mask: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        z = self.pair_stack(z, pair_mask)
        one = s.unsqueeze(0)
        s = self.attention_pair_bias(one, z, token_mask, residual=one).squeeze(0)
        return self.transition(s, residual=True), z


class Pairformer(nn.Module):
    """A stack of ``blocks`` blocks: 48 in the trunk, 4 in the confidence head."""

    def __init__(self, config: ModelConfig, blocks: int) -> None:
        super().__init__()
        self.blocks = Blocks(
            (PairformerBlock(config) for _ in range(blocks)),
            checkpointing=config.checkpointing,
        )

    def forward(
        self, s: torch.Tensor, z: torch.Tensor, token_mask: torch.Tensor, pair_mask: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        for block in self.blocks:
            s, z = self.blocks.run(block, s, z, token_mask, pair_mask)
        return s, z

"""Input features to the first single and pair representations.

Shape letters: N tokens, A atoms.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.nn.functional import embedding, one_hot

from megafold.model.atoms import AtomAttentionEncoder
from megafold.model.config import ModelConfig
from megafold.model.primitives import linear
from megafold.model.windows import AtomWindows
from megafold.ops.checks import autocast

if TYPE_CHECKING:
    from megafold.data.batch import Batch

MAX_OFFSET = 32  # residues or tokens
MAX_CHAIN_OFFSET = 2
NUM_OFFSETS = 2 * MAX_OFFSET + 2  # the last class: other chain, or other residue
NUM_CHAIN_OFFSETS = 2 * MAX_CHAIN_OFFSET + 2  # the last class: same chain


@dataclass(frozen=True)
class RelativePosition:
    """Classes of each token pair, ``[N, N]`` int64; ``same_entity`` bool."""

    residue: torch.Tensor
    token: torch.Tensor
    chain: torch.Tensor
    same_entity: torch.Tensor

    @classmethod
    def of(cls, batch: Batch) -> RelativePosition:
        """Algorithm 3, lines 1 to 9."""

        def offset(x: torch.Tensor, limit: int) -> torch.Tensor:
            return (x[:, None] - x[None, :] + limit).clamp(0, 2 * limit)

        def same(x: torch.Tensor) -> torch.Tensor:
            return x[:, None] == x[None, :]

        same_chain, same_entity = same(batch.asym_id), same(batch.entity_id)
        same_residue = same_chain & same(batch.residue_index)
        residue = offset(batch.residue_index, MAX_OFFSET)
        token = offset(batch.token_index, MAX_OFFSET)
        chain = offset(batch.sym_id, MAX_CHAIN_OFFSET)
        return cls(
            residue=residue.masked_fill(~same_chain, NUM_OFFSETS - 1),
            token=token.masked_fill(~same_residue, NUM_OFFSETS - 1),
            chain=chain.masked_fill(same_chain, NUM_CHAIN_OFFSETS - 1),
            same_entity=same_entity,
        )


class RelativePositionEncoding(nn.Module):
    """Algorithm 3. A linear layer over one-hot classes, done by looking its columns up."""

    def __init__(self, c_z: int) -> None:
        super().__init__()
        self.linear = linear(2 * NUM_OFFSETS + 1 + NUM_CHAIN_OFFSETS, c_z)

    def forward(self, relative: RelativePosition) -> torch.Tensor:
        """Returns ``[N, N, c_z]``; under ``torch.autocast`` in its dtype, as linear layers do."""
        sizes = [NUM_OFFSETS, NUM_OFFSETS, 1, NUM_CHAIN_OFFSETS]
        columns = autocast(self.linear.weight).T.split(sizes)
        residue, token, entity, chain = columns
        return (
            embedding(relative.residue, residue)
            + embedding(relative.token, token)
            + relative.same_entity[..., None] * entity
            + embedding(relative.chain, chain)
        )


class InputEmbedder(nn.Module):
    """Algorithm 2 and lines 1 to 5 of Algorithm 1: s_inputs, s_init and z_init."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.atom_encoder = AtomAttentionEncoder(config, config.c_s)
        self.linear_s = linear(config.c_s_inputs, config.c_s)
        self.linear_z_i = linear(config.c_s_inputs, config.c_z)
        self.linear_z_j = linear(config.c_s_inputs, config.c_z)
        self.relative_position = RelativePositionEncoding(config.c_z)
        self.linear_bonds = linear(1, config.c_z)

    def forward(
        self, batch: Batch, windows: AtomWindows, relative: RelativePosition
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Returns s_inputs ``[N, c_s_inputs]``, s_init ``[N, c_s]``, z_init ``[N, N, c_z]``."""
        atoms = self.atom_encoder(batch, windows)
        a = atoms.tokens.squeeze(0)
        s_inputs = torch.cat(
            [
                a,
                one_hot(batch.restype, 32).to(a.dtype),
                batch.profile.to(a.dtype),
                batch.deletion_mean[:, None].to(a.dtype),
            ],
            dim=-1,
        )
        s = self.linear_s(s_inputs)
        z = self.linear_z_i(s_inputs)[:, None] + self.linear_z_j(s_inputs)[None]
        z = z + self.relative_position(relative)
        z = z + self.linear_bonds(batch.token_bonds[..., None].to(z.dtype))
        return s_inputs, s, z

"""Atoms to tokens and back (Algorithms 5, 6 and 7).

Shape letters: A atoms, N tokens, S noised copies, W windows of 32 queries and 128 keys.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.nn.functional import one_hot

from megafold import ops
from megafold.model.attention import AttentionPairBias
from megafold.model.blocks import Blocks
from megafold.model.config import ModelConfig
from megafold.model.gather import take
from megafold.model.prepared import Prepared, run
from megafold.model.primitives import ConditionedTransition, LayerNormLinear, linear
from megafold.model.windows import AtomWindows

if TYPE_CHECKING:
    from megafold.data.batch import Batch

# Position, charge, mask, element, four characters of the name.
C_REFERENCE = 3 + 1 + 1 + 128 + 4 * 64


@dataclass(frozen=True)
class AtomRepresentation:
    """What the encoder hands on: tokens to the transformer, the rest to the decoder."""

    tokens: torch.Tensor  # [S, N, c_token]
    q: torch.Tensor  # [S, A, c_atom]
    c: torch.Tensor  # [1, A, c_atom]
    p: torch.Tensor  # [W, 32, 128, c_atompair]


class AtomTransformerBlock(nn.Module):
    """One block of Algorithm 7 (Algorithm 23 over windows); shapes as in AtomTransformer."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        c = config.c_atom
        self.attention_pair_bias = AttentionPairBias(c, config.c_atompair, config.atom_heads, c_s=c)
        self.transition = ConditionedTransition(c, c)

    def forward(
        self,
        q: torch.Tensor,
        c: torch.Tensor,
        p: torch.Tensor,
        mask: torch.Tensor,
        windows: AtomWindows,
    ) -> torch.Tensor:
        q = self.attention_pair_bias(q, p, mask, c, windows, residual=q)
        return self.transition(q, c, residual=True)


class AtomTransformer(nn.Module):
    """Algorithm 7: attention among neighbouring atoms, linear in their number."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.blocks = Blocks(
            (AtomTransformerBlock(config) for _ in range(config.atom_blocks)),
            checkpointing=config.checkpointing,
        )

    def forward(
        self,
        q: torch.Tensor,
        c: torch.Tensor,
        p: torch.Tensor,
        mask: torch.Tensor,
        windows: AtomWindows,
        prepared: Prepared | None = None,
    ) -> torch.Tensor:
        """Returns the updated q.

        Args:
            q: ``[S, A, c_atom]``, the atoms.
            c: ``[1, A, c_atom]``, what conditions them.
            p: ``[W, 32, 128, c_atompair]``, pairs of a window's queries and keys.
            mask: ``[A]`` bool.
            windows: Over these atoms.
            prepared: with c and p, for steps without gradient; else None.
        """
        if prepared is not None:
            return run(self.blocks, prepared, q, mask, windows=windows)
        for block in self.blocks:
            q = self.blocks.run(block, q, c, p, mask, windows)
        return q


class AtomPairEmbedder(nn.Module):
    """Lines 1 to 6 of Algorithm 5: reference conformers to atom and atom-pair features."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.linear_c = linear(C_REFERENCE, config.c_atom)
        self.linear_offset = linear(3, config.c_atompair)
        self.linear_distance = linear(1, config.c_atompair)
        self.linear_valid = linear(1, config.c_atompair)

    def forward(self, batch: Batch, windows: AtomWindows) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns c ``[1, A, c_atom]`` and p ``[W, 32, 128, c_atompair]``."""
        # Of half weights, too: a distance is more than 16 bits hold.
        dtype = torch.promote_types(self.linear_c.weight.dtype, torch.float32)
        features = torch.cat(
            [
                batch.ref_pos,
                torch.asinh(batch.ref_charge)[:, None],
                batch.ref_mask[:, None],
                one_hot(batch.ref_element, 128),
                one_hot(batch.ref_atom_name_chars, 64).flatten(-2),
            ],
            dim=-1,
        ).to(dtype)
        c = self.linear_c(features) * batch.atom_mask[:, None]
        offset = _pairwise(batch.ref_pos, windows, torch.sub).to(dtype)
        valid = _pairwise(batch.ref_space_uid, windows, torch.eq)
        valid = (valid & windows.key_mask[:, None])[..., None].to(dtype)
        inverse = 1.0 / (1.0 + offset.square().sum(-1, keepdim=True))
        p = self.linear_offset(offset) + self.linear_distance(inverse)
        return c.unsqueeze(0), (p + self.linear_valid(valid)) * valid.to(p.dtype)


class AtomAttentionEncoder(nn.Module):
    """Algorithm 5. With ``conditioned`` it also reads the trunk and noisy coordinates."""

    def __init__(self, config: ModelConfig, c_token: int, *, conditioned: bool = False) -> None:
        super().__init__()
        self.pair_embedder = AtomPairEmbedder(config)
        self.conditioned = conditioned
        if conditioned:
            self.trunk_s = LayerNormLinear(config.c_s, config.c_atom, init="final")
            self.trunk_z = LayerNormLinear(config.c_z, config.c_atompair, init="final")
            self.linear_r = linear(3, config.c_atom)
        self.linear_p_l = linear(config.c_atom, config.c_atompair)
        self.linear_p_m = linear(config.c_atom, config.c_atompair)
        c = config.c_atompair
        self.pair_mlp = nn.Sequential(
            nn.ReLU(), linear(c, c, init="relu"),
            nn.ReLU(), linear(c, c, init="relu"),
            nn.ReLU(), linear(c, c, init="final"),
        )  # fmt: skip
        self.transformer = AtomTransformer(config)
        self.linear_token = linear(config.c_atom, c_token)

    def condition(
        self,
        batch: Batch,
        windows: AtomWindows,
        s: torch.Tensor | None = None,
        z: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """What does not depend on the noisy coordinates: q before them, c and p.

        s ``[N, c_s]`` and z ``[N, N, c_z]`` are the trunk's; an encoder that is not conditioned
        takes none. Returns q and c ``[1, A, c_atom]`` and p ``[W, 32, 128, c_atompair]``.
        """
        c, p = self.pair_embedder(batch, windows)
        q = c
        if self.conditioned:
            token = batch.atom_to_token
            c = c + take(self.trunk_s(s), token)
            p = p + _pair_of_tokens(self.trunk_z(z), token, windows)
        relu = torch.relu(c)
        p = p + windows.queries(self.linear_p_l(relu)).squeeze(1)[:, :, None]
        p = p + windows.keys(self.linear_p_m(relu)).squeeze(1)[:, None]
        return q, c, p + self.pair_mlp(p)

    def encode(
        self,
        batch: Batch,
        windows: AtomWindows,
        condition: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
        r_noisy: torch.Tensor | None = None,
        prepared: Prepared | None = None,
    ) -> AtomRepresentation:
        """r_noisy ``[S, A, 3]``, scaled to unit variance."""
        q, c, p = condition
        if r_noisy is not None:
            q = q + self.linear_r(r_noisy.to(q.dtype))
        q = self.transformer(q, c, p, batch.atom_mask, windows, prepared)
        a = _mean_over_atoms(torch.relu(self.linear_token(q)), batch)
        return AtomRepresentation(a, q, c, p)

    def forward(self, batch: Batch, windows: AtomWindows) -> AtomRepresentation:
        """Without noisy coordinates, as the input embedder uses it; S is 1."""
        return self.encode(batch, windows, self.condition(batch, windows))


class AtomAttentionDecoder(nn.Module):
    """Algorithm 6: tokens back to one position update per atom."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.linear_token = linear(config.c_token, config.c_atom)
        self.transformer = AtomTransformer(config)
        self.position = LayerNormLinear(config.c_atom, 3, init="final")

    def forward(
        self,
        a: torch.Tensor,
        layer_norm: nn.LayerNorm,
        atoms: AtomRepresentation,
        batch: Batch,
        windows: AtomWindows,
        prepared: Prepared | None = None,
    ) -> torch.Tensor:
        """a ``[S, N, c_token]``, normalised by ``layer_norm``; returns ``[S, A, 3]``."""
        token = ops.layer_norm_linear(
            a, layer_norm.weight, layer_norm.bias, self.linear_token.weight, eps=layer_norm.eps
        )
        q = take(token, batch.atom_to_token, dim=1) + atoms.q
        q = self.transformer(q, atoms.c, atoms.p, batch.atom_mask, windows, prepared)
        return self.position(q)


def _pairwise(x: torch.Tensor, windows: AtomWindows, function) -> torch.Tensor:
    """``function`` of x ``[A, ...]`` at each (query, key) of each window: ``[W, 32, 128, ...]``."""
    queries = windows.queries(x.unsqueeze(0)).squeeze(1)
    keys = windows.keys(x.unsqueeze(0)).squeeze(1)
    return function(queries[:, :, None], keys[:, None])


def _pair_of_tokens(
    z: torch.Tensor, atom_to_token: torch.Tensor, windows: AtomWindows
) -> torch.Tensor:
    """z ``[N, N, C]`` at the tokens of each (query, key) atom pair: ``[W, 32, 128, C]``."""
    queries = windows.queries(atom_to_token.unsqueeze(0)).squeeze(1)
    keys = windows.keys(atom_to_token.unsqueeze(0)).squeeze(1)
    return take(z.flatten(0, 1), queries[:, :, None] * z.shape[1] + keys[:, None])


def _mean_over_atoms(x: torch.Tensor, batch: Batch) -> torch.Tensor:
    """x ``[S, A, C]`` averaged over each token's atoms: ``[S, N, C]``."""
    weight = batch.atom_mask.to(x.dtype)
    total = x.new_zeros(x.shape[0], batch.num_tokens, x.shape[-1])
    total = total.index_add(1, batch.atom_to_token, x * weight[:, None])
    count = weight.new_zeros(batch.num_tokens).index_add(0, batch.atom_to_token, weight)
    return total / count.clamp(min=1.0)[:, None]

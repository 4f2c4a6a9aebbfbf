"""The diffusion module: noisy coordinates to denoised ones (Algorithms 20 to 23).

Shape letters: S noised copies, N tokens, A atoms.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import nn

from megafold.model.atoms import AtomAttentionDecoder, AtomAttentionEncoder
from megafold.model.attention import AttentionPairBias
from megafold.model.blocks import Blocks
from megafold.model.config import ModelConfig
from megafold.model.embedders import RelativePosition, RelativePositionEncoding
from megafold.model.prepared import Prepared, prepare, run
from megafold.model.primitives import (
    ConditionedTransition,
    LayerNormLinear,
    Transition,
)
from megafold.model.windows import AtomWindows

if TYPE_CHECKING:
    from megafold.data.batch import Batch

SIGMA_DATA = 16.0  # angstrom, the spread of the data


@dataclass(frozen=True)
class Trunk:
    """What the trunk hands to the diffusion module and the heads."""

    s_inputs: torch.Tensor  # [N, c_s_inputs]
    s: torch.Tensor  # [N, c_s]
    z: torch.Tensor  # [N, N, c_z]
    relative: RelativePosition
    windows: AtomWindows


@dataclass(frozen=True)
class DiffusionConditioning:
    """All that does not depend on the noise: computed once for many copies and steps."""

    s: torch.Tensor  # [N, c_s]
    z: torch.Tensor  # [N, N, c_z]
    atoms: tuple[torch.Tensor, torch.Tensor, torch.Tensor]
    # Of the transformers of tokens, of atoms to tokens and of tokens to atoms, where that is
    # computed before many steps: see `DiffusionModule.before_steps`.
    prepared: tuple[Prepared, ...] = ()


class FourierEmbedding(nn.Module):
    """Algorithm 22: fixed random frequencies and phases, drawn once."""

    def __init__(self, c: int) -> None:
        super().__init__()
        self.register_buffer("w", torch.randn(c))
        self.register_buffer("b", torch.randn(c))

    def forward(self, t: torch.Tensor) -> torch.Tensor:
        """t ``[S]`` -> ``[S, c]``."""
        return torch.cos(2 * math.pi * (t[:, None] * self.w + self.b))


class DiffusionTransformerBlock(nn.Module):
    """One block of Algorithm 23.

    a ``[S, N, c_token]``, s ``[S, N, c_s]``, z ``[N, N, c_z]``, token_mask ``[N]`` bool; returns
    the updated a.

    The supplement prints the second update without the residual of ``a``; the published
    code adds both in sequence, and so do we.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.attention_pair_bias = AttentionPairBias(
            config.c_token, config.c_z, config.diffusion_heads, c_s=config.c_s
        )
        self.transition = ConditionedTransition(config.c_token, config.c_s)

    def forward(
        self,
        a: torch.Tensor,
        s: torch.Tensor,
        z: torch.Tensor,
        token_mask: torch.Tensor,
    ) -> torch.Tensor:
        a = self.attention_pair_bias(a, z, token_mask, s, residual=a)
        return self.transition(a, s, residual=True)


class DiffusionModule(nn.Module):
    """Algorithm 20, split so that its noise-independent part is computed once."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        # Conditioning (Algorithm 21).
        self.relative_position = RelativePositionEncoding(config.c_z)
        self.pair_in = LayerNormLinear(2 * config.c_z, config.c_z)
        self.pair_transitions = Blocks(
            (Transition(config.c_z, n=2) for _ in range(2)), checkpointing=config.checkpointing
        )
        self.single_in = LayerNormLinear(config.c_s + config.c_s_inputs, config.c_s)
        self.fourier = FourierEmbedding(config.c_fourier)
        self.noise_in = LayerNormLinear(config.c_fourier, config.c_s)
        self.single_transitions = Blocks(
            (Transition(config.c_s, n=2) for _ in range(2)), checkpointing=config.checkpointing
        )
        # Atoms to tokens, tokens among themselves, tokens to atoms.
        self.atom_encoder = AtomAttentionEncoder(config, config.c_token, conditioned=True)
        self.token_in = LayerNormLinear(config.c_s, config.c_token, init="final")
        self.blocks = Blocks(
            (DiffusionTransformerBlock(config) for _ in range(config.diffusion_blocks)),
            checkpointing=config.checkpointing,
        )
        self.layer_norm_a = nn.LayerNorm(config.c_token)
        self.atom_decoder = AtomAttentionDecoder(config)

    def condition(self, batch: Batch, trunk: Trunk) -> DiffusionConditioning:
        """Everything that neither the noise level nor the noisy coordinates change."""
        relative = self.relative_position(trunk.relative)
        z = self.pair_in(torch.cat([trunk.z, relative], dim=-1))
        for transition in self.pair_transitions:
            z = z + self.pair_transitions.run(transition, z)
        s = self.single_in(torch.cat([trunk.s, trunk.s_inputs], dim=-1))
        atoms = self.atom_encoder.condition(batch, trunk.windows, trunk.s, z)
        return DiffusionConditioning(s, z, atoms)

    def before_steps(self, condition: DiffusionConditioning) -> DiffusionConditioning:
        """The same with what every step would compute again; for steps without gradient."""
        _, c, p = condition.atoms
        of_atoms = (part.transformer.blocks for part in (self.atom_encoder, self.atom_decoder))
        prepared = (
            prepare(self.blocks, condition.z),
            *(prepare(blocks, p, c) for blocks in of_atoms),
        )
        return replace(condition, prepared=prepared)

    def forward(
        self,
        x_noisy: torch.Tensor,
        t: torch.Tensor,
        batch: Batch,
        windows: AtomWindows,
        condition: DiffusionConditioning,
    ) -> torch.Tensor:
        """Denoise x_noisy ``[S, A, 3]`` angstrom with noise levels t ``[S]``."""
        noise = self.fourier(0.25 * torch.log(t / SIGMA_DATA))
        s = condition.s + self.noise_in(noise)[:, None]
        for transition in self.single_transitions:
            s = s + self.single_transitions.run(transition, s)

        # Preconditioning (Karras et al. 2022) in float32.
        level = t[:, None, None].float()
        variance = level.square() + SIGMA_DATA**2
        r_noisy = x_noisy / variance.sqrt()
        of_tokens, of_encoder, of_decoder = condition.prepared or (None,) * 3
        atoms = self.atom_encoder.encode(batch, windows, condition.atoms, r_noisy, of_encoder)
        a = atoms.tokens + self.token_in(s)
        if of_tokens is None:
            for block in self.blocks:
                a = self.blocks.run(block, a, s, condition.z, batch.token_mask)
        else:
            a = run(self.blocks, of_tokens, a, batch.token_mask, s)
        r_update = self.atom_decoder(a, self.layer_norm_a, atoms, batch, windows, of_decoder)
        skip = SIGMA_DATA**2 / variance
        scale = SIGMA_DATA * level / variance.sqrt()
        return skip * x_noisy + scale * r_update.float()

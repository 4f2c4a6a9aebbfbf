"""Heads: distances from the trunk, and confidence in a structure (Algorithm 31).

Shape letters: N tokens, A atoms, R rows of the pair representation.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.nn.functional import one_hot

from megafold import ops
from megafold.geometry import distances
from megafold.model.config import ModelConfig
from megafold.model.gather import take
from megafold.model.pairformer import Pairformer
from megafold.model.primitives import LayerNormLinear, linear

if TYPE_CHECKING:
    from megafold.data.batch import Batch

# Lower edges of the bins in which the confidence head sees distances, angstrom.
DISTANCE_EDGES = (3.375, 21.375, 15)  # first, last, number; the last bin is open
ERROR_BIN = 0.5  # angstrom, width of a PAE or PDE bin


class DistogramHead(nn.Module):
    """Logits over distance bins between representative atoms, symmetric in the pair."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.linear = linear(config.c_z, config.distogram_bins, bias=True, init="final")

    def forward(self, z: torch.Tensor) -> torch.Tensor:
        """z ``[N, N, c_z]``; returns logits ``[N, N, bins]``."""
        return self.rows(z, z.transpose(0, 1))

    def rows(self, z: torch.Tensor, z_transposed: torch.Tensor) -> torch.Tensor:
        """The same for some rows ``[R, N, c_z]`` of z and of its transpose."""
        return self.linear(z + z_transposed)


class AtomHead(nn.Module):
    """Logits of each atom from its token, with weights of its own for each place in a token."""

    def __init__(self, c_s: int, atoms: int, bins: int) -> None:
        super().__init__()
        self.layer_norm = nn.LayerNorm(c_s)
        self.weight = nn.Parameter(torch.zeros(atoms, c_s, bins))

    def forward(self, s: torch.Tensor, atom_to_token: torch.Tensor) -> torch.Tensor:
        """s ``[N, c_s]``; returns logits ``[A, bins]``."""
        places, _, bins = self.weight.shape
        # Every place of every token, then those that there are: less than a weight per atom.
        norm, weight = self.layer_norm, self.weight.transpose(1, 2).flatten(0, 1)
        logits = ops.layer_norm_linear(s, norm.weight, norm.bias, weight, eps=norm.eps)
        # Padding atoms may be more than there are places; what they get counts nowhere.
        place = place_in_token(atom_to_token).clamp(max=places - 1)
        return take(logits.view(-1, bins), atom_to_token * places + place)


@dataclass(frozen=True)
class ConfidenceRepresentation:
    """Single and pair representation of one structure, for the four confidence outputs."""

    s: torch.Tensor  # [N, c_s]
    z: torch.Tensor  # [N, N, c_z]


class ConfidenceHead(nn.Module):
    """Algorithm 31: how far off each atom, distance and placement will be.

    As in the published code, a LayerNorm stands before each output.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.linear_z_i = linear(config.c_s_inputs, config.c_z)
        self.linear_z_j = linear(config.c_s_inputs, config.c_z)
        self.linear_distance = linear(DISTANCE_EDGES[2], config.c_z)
        self.pairformer = Pairformer(config, config.confidence_blocks)
        self.pae = LayerNormLinear(config.c_z, config.pae_bins, init="final")
        self.pde = LayerNormLinear(config.c_z, config.pde_bins, init="final")
        self.plddt = AtomHead(config.c_s, config.atoms_per_token, config.plddt_bins)
        self.resolved = AtomHead(config.c_s, config.atoms_per_token, 2)

    def forward(
        self,
        batch: Batch,
        s_inputs: torch.Tensor,
        s: torch.Tensor,
        z: torch.Tensor,
        x: torch.Tensor,
    ) -> ConfidenceRepresentation:
        """Read one structure.

        Args:
            batch: What the structure is of.
            s_inputs: ``[N, c_s_inputs]``; it, s and z are detached here, as the head must
                not change the trunk.
            s: ``[N, c_s]``.
            z: ``[N, N, c_z]``.
            x: Coordinates ``[A, 3]`` angstrom, without gradient.
        """
        s_inputs, s, z, x = (value.detach() for value in (s_inputs, s, z, x))
        z = z + self.linear_z_i(s_inputs)[:, None] + self.linear_z_j(s_inputs)[None]
        position = x[batch.representative_atom].float()
        distance = distances(position, position)
        z = z + self.linear_distance(distance_classes(distance).to(s_inputs.dtype))
        pair_mask = batch.token_mask[:, None] & batch.token_mask[None, :]
        return ConfidenceRepresentation(*self.pairformer(s, z, batch.token_mask, pair_mask))

    def pae_rows(self, z: torch.Tensor, z_transposed: torch.Tensor) -> torch.Tensor:
        """Logits ``[R, N, bins]`` of the aligned error of rows z ``[R, N, c_z]``."""
        return self.pae(z)

    def pde_rows(self, z: torch.Tensor, z_transposed: torch.Tensor) -> torch.Tensor:
        """Logits ``[R, N, bins]`` of the distance error, of rows of z and of its transpose."""
        return self.pde(z + z_transposed)


def place_in_token(atom_to_token: torch.Tensor) -> torch.Tensor:
    """Number of each atom within its token, ``[A]`` int64; atom_to_token never decreases."""
    index = torch.arange(len(atom_to_token), device=atom_to_token.device)
    first = torch.searchsorted(atom_to_token, atom_to_token)
    return index - first


def distance_classes(distance: torch.Tensor) -> torch.Tensor:
    """One-hot classes ``[..., 15]`` int64 of distances in angstrom; zero below the first edge."""
    first, last, number = DISTANCE_EDGES
    edges = torch.linspace(first, last, number, device=distance.device, dtype=distance.dtype)
    return one_hot(torch.bucketize(distance, edges, right=True), number + 1)[..., 1:]


def distance_breaks(bins: int, device: torch.device | None = None) -> torch.Tensor:
    """The ``bins - 1`` inner edges between bins from 2 to 22 angstrom."""
    return torch.linspace(2.0, 22.0, bins + 1, device=device)[1:-1]

"""Losses of the confidence head: what it said against what is true (supplement, section 4.3).

The targets are worked out from one rolled-out structure and carry no gradient; the loss goes
into the head only.

Shape letters: N tokens, A atoms.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch.nn.functional import cross_entropy

from megafold.geometry import distances
from megafold.model.diffusion_losses import LDDT_RADIUS, LDDT_RADIUS_NUCLEIC
from megafold.model.frames import alignment_error, resolved_frames
from megafold.model.heads import (
    ERROR_BIN,
    ConfidenceHead,
    ConfidenceRepresentation,
    distance_breaks,
)
from megafold.model.pair_loss import Rows, pair_cross_entropy

if TYPE_CHECKING:
    from megafold.data.batch import Batch

MIN_RESOLUTION, MAX_RESOLUTION = 0.1, 4.0  # angstrom
LDDT_THRESHOLDS = (0.5, 1.0, 2.0, 4.0)  # angstrom


@dataclass(frozen=True)
class ConfidenceLosses:
    """Each a scalar tensor, a mean cross-entropy."""

    plddt: torch.Tensor
    pde: torch.Tensor
    resolved: torch.Tensor
    pae: torch.Tensor


def has_confidence_target(batch: Batch) -> bool:
    """Whether the structure is good enough to learn confidence from: 0.1 to 4 angstrom."""
    return MIN_RESOLUTION <= batch.resolution <= MAX_RESOLUTION  # False for NaN


def confidence_losses(
    head: ConfidenceHead,
    representation: ConfidenceRepresentation,
    x: torch.Tensor,
    batch: Batch,
) -> ConfidenceLosses:
    """How well the head judged ``x`` ``[A, 3]`` angstrom, given the truth in ``batch``."""
    s, z = representation.s, representation.z
    pae, pae_mask = pae_target(x, batch, head.pae.linear.out_features)
    pde, pde_mask = pde_target(x, batch, head.pde.linear.out_features)
    bins = head.plddt.weight.shape[-1]
    lddt, lddt_mask = plddt_target(x, batch, bins)
    return ConfidenceLosses(
        plddt=_atom_loss(head.plddt(s, batch.atom_to_token), lddt, lddt_mask),
        pde=pair_cross_entropy(head.pde_rows, z, pde, pde_mask, head.pde.linear.out_features),
        resolved=_atom_loss(
            head.resolved(s, batch.atom_to_token), batch.resolved.long(), batch.atom_mask
        ),
        pae=pair_cross_entropy(head.pae_rows, z, pae, pae_mask, head.pae.linear.out_features),
    )


@torch.no_grad()
def plddt_target(
    x: torch.Tensor, batch: Batch, bins: int = 50
) -> tuple[torch.Tensor, torch.Tensor]:
    """Bin of each atom's lDDT, ``[A]`` int64, and where there is one, ``[A]`` bool.

    An atom's lDDT is over the CA and C1' of polymer residues within 15 angstrom, C1' within 30.
    """
    score, mask = lddt_to_residues(x, batch)
    return (score * bins).long().clamp(0, bins - 1), mask


@torch.no_grad()
def lddt_to_residues(x: torch.Tensor, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    """lDDT of each atom, ``[A]`` 0 to 1, and where there is one; see ``plddt_target``."""
    nucleic = batch.is_rna | batch.is_dna
    # A modified residue is tokens of one atom each, and has no CA that is a centre by itself.
    single = torch.zeros_like(batch.token_mask, dtype=torch.long)
    single.index_add_(0, batch.atom_to_token, batch.atom_mask.long())
    residue = (batch.is_protein | nucleic) & batch.token_mask & (single > 1)
    # Of all tokens, not to wait for how many of them are residues.
    centre = batch.center_atom
    radius = torch.where(nucleic, LDDT_RADIUS_NUCLEIC, LDDT_RADIUS)
    true = distances(batch.positions, batch.positions[centre])  # [A, N]
    near = (true < radius) & batch.resolved[:, None] & (batch.resolved[centre] & residue)
    near &= torch.arange(batch.num_atoms, device=x.device)[:, None] != centre
    error = (distances(x.float(), x[centre].float()) - true).abs()
    score = sum((error < threshold).float() for threshold in LDDT_THRESHOLDS)
    score = (score * near).sum(-1) / (len(LDDT_THRESHOLDS) * near.sum(-1).clamp(min=1))
    return score, near.any(-1)


@torch.no_grad()
def pae_target(x: torch.Tensor, batch: Batch, bins: int = 64) -> tuple[torch.Tensor, torch.Tensor]:
    """Bin of the aligned error of each pair, ``[N, N]`` int64, and where there is one.

    Row i is the frame of a token, column j the centre atom of another.
    """
    error = alignment_error(x.float(), batch.positions, batch.frame_atoms, batch.center_atom)
    seen = batch.resolved[batch.center_atom] & batch.token_mask
    return _error_bin(error, bins), resolved_frames(batch)[:, None] & seen


@torch.no_grad()
def pde_target(x: torch.Tensor, batch: Batch, bins: int = 64) -> tuple[torch.Tensor, torch.Tensor]:
    """Bin of the error of the distance of each pair, ``[N, N]`` int64, and where there is one."""
    atom = batch.representative_atom
    predicted = distances(x[atom].float(), x[atom].float())
    error = (predicted - distances(batch.positions[atom], batch.positions[atom])).abs()
    known = batch.resolved[atom] & batch.token_mask
    return _error_bin(error, bins), known[:, None] & known


def distogram_loss(logits_of: Rows, z: torch.Tensor, batch: Batch, bins: int) -> torch.Tensor:
    """Cross-entropy of the binned distances between representative atoms (section 4.4)."""
    position = batch.positions[batch.representative_atom]
    known = batch.resolved[batch.representative_atom] & batch.token_mask
    target = torch.bucketize(distances(position, position), distance_breaks(bins, z.device))
    return pair_cross_entropy(logits_of, z, target, known[:, None] & known, bins)


def _error_bin(error: torch.Tensor, bins: int) -> torch.Tensor:
    return (error / ERROR_BIN).long().clamp(0, bins - 1)


def _atom_loss(logits: torch.Tensor, target: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    loss = cross_entropy(logits.float(), target, reduction="none")
    return (loss * mask).sum() / mask.sum().clamp(min=1)

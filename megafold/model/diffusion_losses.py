"""Losses of the denoised copies (supplement, section 3.7.1).

Shape letters: S noised copies, A atoms, L bonds.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from megafold.geometry import weighted_rigid_align
from megafold.model.gather import take
from megafold.model.smooth_lddt import smooth_lddt

if TYPE_CHECKING:
    from megafold.data.batch import Batch

LDDT_RADIUS, LDDT_RADIUS_NUCLEIC = 15.0, 30.0  # angstrom


def aligned_mse(x: torch.Tensor, x_true: torch.Tensor, batch: Batch) -> torch.Tensor:
    """Mean squared error after moving the truth onto the prediction, ``[S]`` (equations 2, 3).

    Nucleic acids weigh 6, ligands 11, proteins 1; unresolved atoms do not count.
    """
    token = batch.atom_to_token
    weight = 1.0 + 5.0 * (batch.is_dna | batch.is_rna)[token] + 10.0 * batch.is_ligand[token]
    weight = weight * batch.resolved
    aligned = weighted_rigid_align(x_true, x.detach(), weight)
    squared = (x - aligned).square().sum(-1)
    return (squared * weight).sum(-1) / (3.0 * batch.resolved.sum().clamp(min=1))


def bond_loss(x: torch.Tensor, batch: Batch) -> torch.Tensor:
    """Mean squared error of the lengths of bonds to ligands, ``[S]`` (equation 5).

    Without a bond between two resolved atoms it is 0.
    """
    first, second = batch.ligand_bonds.unbind(-1)
    known = (batch.resolved[first] & batch.resolved[second]).to(x.dtype)
    true = torch.linalg.vector_norm(batch.positions[first] - batch.positions[second], dim=-1)
    difference = take(x, first, dim=1) - take(x, second, dim=1)
    length = (difference.square().sum(-1) + 1e-10).sqrt()
    return ((length - true).square() * known).sum(-1) / known.sum().clamp(min=1.0)


def smooth_lddt_loss(x: torch.Tensor, batch: Batch) -> torch.Tensor:
    """Algorithm 27: one minus a smooth lDDT over all atom pairs near in the truth, ``[S]``.

    Each atom looks for neighbours within 15 angstrom, one of a nucleic acid within 30.
    """
    nucleic = (batch.is_dna | batch.is_rna)[batch.atom_to_token]
    radius = torch.where(nucleic, LDDT_RADIUS_NUCLEIC, LDDT_RADIUS)
    return smooth_lddt(x, batch.positions, batch.resolved, radius)

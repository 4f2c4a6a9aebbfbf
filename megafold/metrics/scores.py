"""All scores of a structure against the truth of its batch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from megafold.metrics.lddt import lddt
from megafold.metrics.superposition import rmsd, tm_score

if TYPE_CHECKING:
    from megafold.data.batch import Batch


@dataclass(frozen=True)
class Scores:
    """How well one structure agrees with the truth. NaN where there is nothing to judge by."""

    lddt: float  # all atoms, 0 to 1
    lddt_centre: float  # among centre atoms: alpha carbons, C1' of nucleotides, ligand atoms
    lddt_interface: float  # distances from one chain to another
    lddt_chain: dict[str, float]  # distances within each chain, by chain id
    tm_score: float  # centre atoms of polymers, 0 to 1
    rmsd: float  # angstrom, all atoms after superposition
    rmsd_centre: float  # angstrom, centre atoms


def score(batch: Batch, coordinates: torch.Tensor) -> Scores:
    """Compare ``coordinates`` ``[A, 3]`` angstrom with the resolved atoms of ``batch``.

    Atoms and chains are taken as they are named: permute the truth before, where names of
    identical ones may have changed places.
    """
    x, true, mask = coordinates, batch.positions, batch.resolved & batch.atom_mask
    nucleic = (batch.is_dna | batch.is_rna)[batch.atom_to_token]
    chain = batch.asym_id[batch.atom_to_token]
    centre_rows = batch.center_atom[batch.token_mask]
    centre = torch.zeros_like(mask)
    centre[centre_rows] = True
    polymer = ~batch.is_ligand[batch.token_mask] & mask[centre_rows]
    by_chain = {
        name: float(lddt(x, true, mask & (chain == asym), nucleic=nucleic))
        for asym, name in _chain_names(batch).items()
    }
    return Scores(
        lddt=float(lddt(x, true, mask, nucleic=nucleic)),
        lddt_centre=float(lddt(x, true, mask & centre, nucleic=nucleic)),
        lddt_interface=float(lddt(x, true, mask, nucleic=nucleic, chain=chain, pairs="between")),
        lddt_chain=by_chain,
        tm_score=float(tm_score(x[centre_rows], true[centre_rows], polymer)),
        rmsd=float(rmsd(x, true, mask)),
        rmsd_centre=float(rmsd(x, true, mask & centre)),
    )


def _chain_names(batch: Batch) -> dict[int, str]:
    """asym_id of each chain -> its id."""
    names: dict[int, str] = {}
    rows = batch.center_atom[batch.token_mask].tolist()
    for asym, row in zip(batch.asym_id[batch.token_mask].tolist(), rows, strict=True):
        names.setdefault(asym, str(batch.layout.chain_id[row]))
    return names

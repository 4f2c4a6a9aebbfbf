"""What the confidence head is taught: targets against their definitions, losses at their ends."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch

from megafold.geometry import random_rotations
from megafold.model.confidence_losses import (
    confidence_losses,
    has_confidence_target,
    lddt_to_residues,
    pae_target,
    pde_target,
    plddt_target,
)
from megafold.model.diffusion_losses import bond_loss
from megafold.model.heads import ConfidenceRepresentation
from megafold.model.pair_loss import pair_cross_entropy
from tests.model.seeds import seeded


def moved(x: torch.Tensor) -> torch.Tensor:
    return x @ random_rotations(1, seeded())[0].T + torch.tensor([5.0, -3.0, 8.0])


def blurred(x: torch.Tensor, sigma: float) -> torch.Tensor:
    return x + sigma * torch.randn(x.shape, generator=seeded())


def test_the_truth_is_right_in_every_bin(batch):
    x = moved(batch.positions)
    lddt, seen = plddt_target(x, batch)
    assert (lddt[seen] == 49).all()
    for target in (pae_target, pde_target):
        bins, mask = target(x, batch)
        assert mask.any()
        assert not bins[mask].any()


def test_lddt_is_to_the_alpha_carbons_of_whole_residues(batch):
    x = blurred(batch.positions, 1.0)
    score, seen = lddt_to_residues(x, batch)
    names = batch.layout.atom_name
    whole = torch.bincount(batch.atom_to_token) > 1
    alpha = [int(a) for a, w in zip(batch.center_atom, whole, strict=True) if w]
    assert {str(names[a]) for a in alpha} == {"CA"}
    assert len(alpha) < batch.num_tokens  # hydroxyprolines are tokens of single atoms
    for atom in (0, alpha[3], 100):
        terms = []
        for other in alpha:
            true = (batch.positions[atom] - batch.positions[other]).norm()
            if other != atom and true < 15.0:
                error = ((x[atom] - x[other]).norm() - true).abs()
                terms.append(sum(float(error < t) for t in (0.5, 1.0, 2.0, 4.0)) / 4)
        assert seen[atom] == bool(terms)
        assert float(score[atom]) == pytest.approx(sum(terms) / len(terms), abs=1e-6)


def test_nucleic_residues_are_looked_for_twice_as_far(batch):
    rna = dataclasses.replace(batch, is_protein=batch.is_protein & False, is_rna=batch.is_protein)
    x = blurred(batch.positions, 2.0)
    far, near = lddt_to_residues(x, rna)[0], lddt_to_residues(x, batch)[0]
    assert not torch.equal(far, near)
    alpha = batch.center_atom[torch.bincount(batch.atom_to_token) > 1]
    distance = torch.cdist(batch.positions, batch.positions[alpha])
    same = (distance < 15).all(1) == (distance < 30).all(1)
    torch.testing.assert_close(
        far[same & (distance < 15).all(1)], near[same & (distance < 15).all(1)]
    )


def test_errors_fall_into_bins_of_half_an_angstrom(batch):
    x = batch.positions.clone()
    atom = int(batch.center_atom[30])
    x[atom] += torch.tensor([0.0, 0.0, 7.7])
    touched = (batch.frame_atoms == atom).any(-1)
    bins, mask = pae_target(x, batch)
    assert (bins[mask[:, 30] & ~touched, 30] == 15).all()
    far = batch.positions + torch.where(torch.arange(batch.num_atoms)[:, None] == atom, 900.0, 0.0)
    assert (pae_target(far, batch)[0][mask[:, 30] & ~touched, 30] == 63).all()

    atom = int(batch.representative_atom[30])
    bins, mask = pde_target(batch.positions, batch)
    other = torch.arange(batch.num_tokens) != 30
    x = batch.positions.clone()
    x[atom] += 300.0
    assert (pde_target(x, batch)[0][30][other] == 63).all()
    assert torch.equal(mask, mask.T)


def test_what_is_not_resolved_is_not_judged(batch):
    resolved = batch.resolved.clone()
    atom = int(batch.center_atom[30])
    assert int(batch.representative_atom[30]) == atom  # a token of one atom
    resolved[atom] = False
    some = dataclasses.replace(batch, resolved=resolved)
    x = blurred(batch.positions, 1.0)
    assert not plddt_target(x, some)[1][atom]
    pae, pde = pae_target(x, some)[1], pde_target(x, some)[1]
    assert not pae[30].any()
    assert not pae[:, 30].any()
    assert not pde[30].any()
    assert pae.any()
    assert pde.any()


def test_a_flat_head_costs_the_logarithm_of_its_bins(model, batch):
    n, config = batch.num_tokens, model.config
    flat = ConfidenceRepresentation(torch.zeros(n, config.c_s), torch.zeros(n, n, config.c_z))
    head = model.confidence_head
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.zero_()
    losses = confidence_losses(head, flat, blurred(batch.positions, 1.0), batch)
    got = [losses.plddt, losses.pde, losses.resolved, losses.pae]
    expected = [math.log(bins) for bins in (50, 64, 2, 64)]
    torch.testing.assert_close(torch.stack(got), torch.tensor(expected))


def test_losses_are_those_of_all_logits_at_once(model, batch):
    n, config = batch.num_tokens, model.config
    g = seeded()
    seen = ConfidenceRepresentation(
        torch.randn(n, config.c_s, generator=g), torch.randn(n, n, config.c_z, generator=g)
    )
    head, x = model.confidence_head, blurred(batch.positions, 1.0)
    losses = confidence_losses(head, seen, x, batch)
    z, zt = seen.z, seen.z.transpose(0, 1)
    for got, logits, (target, mask) in (
        (losses.pae, head.pae_rows(z, zt), pae_target(x, batch)),
        (losses.pde, head.pde_rows(z, zt), pde_target(x, batch)),
        (losses.plddt, head.plddt(seen.s, batch.atom_to_token), plddt_target(x, batch)),
    ):
        expected = torch.nn.functional.cross_entropy(logits[mask], target[mask])
        torch.testing.assert_close(got, expected)
    logits = head.resolved(seen.s, batch.atom_to_token)
    expected = torch.nn.functional.cross_entropy(logits, batch.resolved.long())
    torch.testing.assert_close(losses.resolved, expected)


def test_confidence_needs_a_resolution_of_a_tenth_to_four_angstrom(batch):
    judged = [
        has_confidence_target(dataclasses.replace(batch, resolution=resolution))
        for resolution in (float("nan"), 0.09, 0.1, 2.0, 4.0, 4.01)
    ]
    assert judged == [False, False, True, True, True, False]


def test_bonds_of_the_right_length_cost_nothing_and_stretched_ones_their_square(batch):
    x = moved(batch.positions)[None]
    torch.testing.assert_close(bond_loss(x, batch), torch.zeros(1), atol=1e-8, rtol=0)
    first, second = batch.ligand_bonds[0]
    away = batch.positions[first] - batch.positions[second]
    x = batch.positions[None].clone()
    x[0, first] += 2.0 * away / away.norm()
    torch.testing.assert_close(bond_loss(x, batch), torch.tensor([4.0 / len(batch.ligand_bonds)]))


def test_without_a_resolved_bond_the_bond_loss_is_zero(batch):
    x = blurred(batch.positions, 1.0)[None]
    none = dataclasses.replace(batch, ligand_bonds=batch.ligand_bonds[:0])
    hidden = dataclasses.replace(batch, resolved=torch.zeros_like(batch.resolved))
    assert bond_loss(x, none) == 0
    assert bond_loss(x, hidden) == 0
    assert bond_loss(x, batch) > 0


def test_pair_logits_are_never_there_at_once(model, batch, monkeypatch):
    from megafold.model import pair_loss
    from tests.model.largest import LargestTensor

    monkeypatch.setattr(pair_loss, "CHUNK_ENTRIES", 64 * batch.num_tokens * 4)
    n = batch.num_tokens
    z = torch.randn(n, n, model.config.c_z, requires_grad=True)
    target, mask = pae_target(batch.positions, batch)
    with LargestTensor() as largest:
        for rows_of in (model.confidence_head.pae_rows, model.confidence_head.pde_rows,
                        model.distogram_head.rows):  # fmt: skip
            pair_cross_entropy(rows_of, z, target, mask, 64).backward()
    assert largest.entries < n * n * 64, largest.made_by

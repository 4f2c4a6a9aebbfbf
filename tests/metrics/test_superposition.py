"""Superposition, RMSD and TM-score: invariances, and agreement with biotite and TM-align."""

from __future__ import annotations

import biotite.structure
import numpy as np
import pytest
import tmtools
import torch

from megafold.geometry import random_rotations
from megafold.metrics import rmsd, superpose, tm_score
from megafold.metrics.superposition import tm_distance
from tests.metrics.points import ALL, points


def test_rmsd_is_what_is_left_after_superposition():
    true = points()
    rotation = random_rotations(1, torch.Generator().manual_seed(1))[0]
    assert rmsd(true @ rotation.T + 7.0, true, ALL) < 1e-4
    mirrored = true * torch.tensor([1.0, 1.0, -1.0])
    assert rmsd(mirrored, true, ALL) > 1.0


@pytest.mark.parametrize("sample_id", ["1CRN", "1LCD"])
@pytest.mark.parametrize("spread", [0.5, 5.0])
def test_rmsd_agrees_with_biotite(batch_of, perturbed, atoms_of, sample_id, spread):
    batch = batch_of(sample_id)
    x, seen = perturbed(batch, spread), batch.resolved.numpy()
    reference = atoms_of(batch, batch.positions)[seen]
    fitted, _ = biotite.structure.superimpose(reference, atoms_of(batch, x)[seen])
    expected = biotite.structure.rmsd(reference, fitted)
    assert rmsd(x, batch.positions, batch.resolved) == pytest.approx(expected, abs=1e-3)
    moved = superpose(x, batch.positions, batch.resolved)[batch.resolved]
    np.testing.assert_allclose(moved.numpy(), fitted.coord, atol=5e-3)


@pytest.mark.parametrize("sample_id", ["1CRN", "1A8O", "3NZD"])
@pytest.mark.parametrize("spread", [0.5, 2.0, 5.0])
def test_tm_score_agrees_with_tm_align_at_the_same_alignment(
    batch_of, perturbed, sample_id, spread
):
    batch = batch_of(sample_id)
    alpha = torch.from_numpy(batch.layout.atom_name == "CA") & batch.resolved
    x, true = perturbed(batch, spread)[alpha], batch.positions[alpha]
    sequence = "A" * len(x)
    theirs = tmtools.tm_align(
        x.double().numpy(), true.double().numpy(), sequence, sequence, [sequence, sequence]
    )
    ours = tm_score(x, true, torch.ones(len(x), dtype=torch.bool))
    # Both search: neither may find much less than the other.
    assert float(ours) == pytest.approx(theirs.tm_norm_chain2, abs=0.01)
    assert float(ours) >= theirs.tm_norm_chain2 - 0.003


def test_tm_score_of_a_superposed_structure_is_the_formula(batch_of):
    batch = batch_of("1CRN")
    alpha = batch.layout.atom_name == "CA"
    true = batch.positions[torch.from_numpy(alpha)]
    x = true + 0.01 * torch.randn(true.shape, generator=torch.Generator().manual_seed(0))
    arrays = []
    for coordinates in (true, x):
        array = biotite.structure.AtomArray(len(true))
        array.coord = coordinates.numpy()
        array.atom_name[:], array.res_name[:] = "CA", "ALA"
        array.res_id[:] = np.arange(len(true))
        arrays.append(array)
    expected = biotite.structure.tm_score(*arrays, *[np.arange(len(true))] * 2)
    got = tm_score(x, true, torch.ones(len(true), dtype=torch.bool))
    assert float(got) == pytest.approx(expected, abs=1e-4)


def test_tm_score_does_not_see_where_a_structure_stands_but_sees_its_hand(batch_of):
    batch = batch_of("1A8O")
    true = batch.positions[batch.center_atom]
    known = batch.resolved[batch.center_atom]
    rotation = random_rotations(1, torch.Generator().manual_seed(1))[0]
    assert float(tm_score(true @ rotation.T + 7.0, true, known)) == pytest.approx(1.0, abs=1e-5)
    assert tm_score(true * torch.tensor([1.0, 1.0, -1.0]), true, known) < 0.7


def test_half_of_a_structure_displaced_leaves_half_a_tm_score():
    generator = torch.Generator().manual_seed(0)
    true = 20 * torch.randn(200, 3, generator=generator)
    x = true.clone()
    x[:100] += 1000.0
    everything = torch.ones(200, dtype=torch.bool)
    assert float(tm_score(x, true, everything)) == pytest.approx(0.5, abs=0.01)
    # Normalised by the whole sequence, what is not known counts as wrong.
    known = everything.clone()
    known[100:] = False
    assert float(tm_score(true, true, known, length=200)) == pytest.approx(0.5)


def test_d0_is_that_of_zhang_and_skolnick():
    assert tm_distance(15) == tm_distance(21) == 0.5
    assert tm_distance(100) == pytest.approx(1.24 * 85 ** (1 / 3) - 1.8)


def test_several_structures_at_once():
    true = points()
    many = torch.stack([true, true + 5.0 * torch.randn_like(true)])
    assert rmsd(many, true, ALL).shape == (2,)
    assert superpose(many, true, ALL).shape == many.shape
    both = tm_score(many, true, ALL)
    assert both[0] > both[1]


def test_what_has_no_superposition_has_no_score():
    two = torch.zeros(40, dtype=torch.bool)
    two[:2] = True
    assert tm_score(points(), points(), two).isnan()
    assert rmsd(points(), points(), torch.zeros_like(two)).isnan()


def test_bad_input_is_named():
    with pytest.raises(ValueError, match="length is 39, but 40 residues are known"):
        tm_score(points(), points(), ALL, length=39)
    with pytest.raises(ValueError, match="mask must be bool"):
        superpose(points(), points(), torch.ones(40))


@pytest.mark.parametrize("score", [superpose, rmsd, tm_score])
@pytest.mark.parametrize("which", [0, 1])
def test_coordinates_that_are_not_finite_are_refused(score, which):
    given = [points(), points()]
    given[which][3, 1] = torch.nan
    with pytest.raises(FloatingPointError, match="coordinates that are not finite"):
        score(*given, ALL)

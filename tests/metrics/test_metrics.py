"""Metrics: invariances, and agreement with an independent implementation."""

from __future__ import annotations

import biotite.structure
import pytest
import torch

from megafold.geometry import random_rotations
from megafold.metrics import lddt, lddt_per_atom, rmsd, superpose


def points(seed: int = 0, n: int = 40) -> torch.Tensor:
    return 8 * torch.randn(n, 3, generator=torch.Generator().manual_seed(seed))


ALL = torch.ones(40, dtype=torch.bool)


def test_the_truth_has_lddt_one_wherever_it_stands():
    x = points()
    rotation = random_rotations(1, torch.Generator().manual_seed(1))[0]
    assert lddt(x @ rotation.T + 7.0, x, ALL) == 1.0


def test_lddt_agrees_with_biotite():
    true = points()
    predicted = true + torch.randn(40, 3, generator=torch.Generator().manual_seed(1))
    arrays = []
    for x in (true, predicted):
        array = biotite.structure.AtomArray(40)
        array.coord = x.numpy()
        arrays.append(array)
    expected = biotite.structure.lddt(
        *arrays, aggregation="atom", exclude_same_residue=False, inclusion_radius=15
    )
    got = lddt_per_atom(predicted, true, ALL)
    torch.testing.assert_close(
        got, torch.as_tensor(expected, dtype=got.dtype), atol=1e-5, rtol=0, equal_nan=True
    )


def test_masked_atoms_neither_count_nor_score():
    true, mask = points(), ALL.clone()
    mask[:10] = False
    predicted = true.clone()
    predicted[:10] += 100.0
    assert lddt(predicted, true, mask) == 1.0
    assert lddt_per_atom(predicted, true, mask)[:10].isnan().all()


def test_nucleic_atoms_look_further():
    true = torch.tensor([[0.0, 0, 0], [20.0, 0, 0]])
    both = torch.ones(2, dtype=torch.bool)
    assert lddt_per_atom(true, true, both).isnan().all()
    assert lddt(true, true, both, nucleic=both) == 1.0


def test_several_structures_at_once():
    true = points()
    many = torch.stack([true, true + torch.randn_like(true)])
    assert lddt(many, true, ALL).shape == (2,)
    assert rmsd(many, true, ALL).shape == (2,)
    assert superpose(many, true, ALL).shape == many.shape


def test_rmsd_is_what_is_left_after_superposition():
    true = points()
    rotation = random_rotations(1, torch.Generator().manual_seed(1))[0]
    assert rmsd(true @ rotation.T + 7.0, true, ALL) < 1e-4
    mirrored = true * torch.tensor([1.0, 1.0, -1.0])
    assert rmsd(mirrored, true, ALL) > 1.0


def test_bad_shapes_are_named():
    with pytest.raises(ValueError, match=r"predicted must be \[..., A, 3\]"):
        lddt(points(n=3), points(n=4), torch.ones(4, dtype=torch.bool))
    with pytest.raises(ValueError, match="mask must be bool"):
        lddt(points(), points(), torch.ones(40))

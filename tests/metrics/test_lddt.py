"""lDDT: invariances, and agreement with biotite on real structures."""

from __future__ import annotations

import importlib

import biotite.structure
import pytest
import torch

from megafold.geometry import random_rotations
from megafold.metrics import lddt, lddt_per_atom
from tests.metrics.points import ALL, points

SAMPLES = ("1CRN", "1A8O", "1LCD")  # one chain; two chains; protein, DNA and ions


def biotite_lddt(reference, subject, mask, nucleic, aggregation="atom", **options) -> torch.Tensor:
    """Biotite's lDDT: radius 30 for atoms of nucleic acids, 15 for the others."""
    options |= {"aggregation": aggregation, "exclude_same_residue": False}
    scores = [
        biotite.structure.lddt(
            reference, subject, atom_mask=(mask & rows).numpy(), partner_mask=mask.numpy(),
            inclusion_radius=radius, **options,
        )
        for rows, radius in ((~nucleic, 15.0), (nucleic, 30.0))
    ]  # fmt: skip
    first, second = (torch.as_tensor(score, dtype=torch.float32) for score in scores)
    return torch.where(nucleic, second, first)


def test_the_truth_has_lddt_one_wherever_it_stands():
    x = points()
    rotation = random_rotations(1, torch.Generator().manual_seed(1))[0]
    assert lddt(x @ rotation.T + 7.0, x, ALL) == 1.0


@pytest.mark.parametrize("sample_id", SAMPLES)
@pytest.mark.parametrize("spread", [0.3, 2.0])
@pytest.mark.parametrize("pairs", ["all", "between"])
def test_every_atom_agrees_with_biotite(batch_of, perturbed, atoms_of, sample_id, spread, pairs):
    batch = batch_of(sample_id)
    x = perturbed(batch, spread)
    nucleic = (batch.is_dna | batch.is_rna)[batch.atom_to_token]
    chain = batch.asym_id[batch.atom_to_token]
    arguments = (x, batch.positions, batch.resolved)
    got = lddt_per_atom(*arguments, nucleic=nucleic, chain=chain, pairs=pairs)
    arrays = atoms_of(batch, batch.positions), atoms_of(batch, x)
    expected = biotite_lddt(*arrays, batch.resolved, nucleic, exclude_same_chain=pairs == "between")
    assert got.isnan().all() == (pairs == "between" and sample_id == "1CRN")
    assert torch.equal(got.isnan(), expected.isnan())
    # In float32 a distance may fall on either side of a threshold: of few pairs, in few atoms.
    difference = (got - expected).abs().nan_to_num()
    assert difference.max() < 0.01
    assert (difference > 1e-5).float().mean() < 0.01


def test_alpha_carbons_agree_with_biotite(batch_of, perturbed, atoms_of):
    batch = batch_of("1A8O")
    x = perturbed(batch, 1.0)
    alpha = torch.from_numpy(batch.layout.atom_name == "CA") & batch.resolved
    expected = biotite.structure.lddt(
        atoms_of(batch, batch.positions)[alpha.numpy()], atoms_of(batch, x)[alpha.numpy()],
        aggregation="atom", inclusion_radius=15,
    ).mean()  # fmt: skip
    assert lddt(x, batch.positions, alpha) == pytest.approx(expected, abs=1e-4)


def test_all_pairs_are_those_within_and_between_chains(batch_of, perturbed):
    batch = batch_of("1A8O")
    x, chain = perturbed(batch, 1.0), batch.asym_id[batch.atom_to_token]
    alone = torch.stack(
        [
            lddt_per_atom(x, batch.positions, batch.resolved & (chain == c)).nan_to_num()
            for c in chain.unique()
        ]
    ).sum(0)
    within = lddt_per_atom(x, batch.positions, batch.resolved, chain=chain, pairs="within")
    torch.testing.assert_close(within, alone)


def test_rows_are_taken_a_part_at_a_time_without_a_trace(monkeypatch, batch_of, perturbed):
    batch = batch_of("1CRN")
    x = torch.stack([perturbed(batch, 1.0), perturbed(batch, 2.0)])
    whole = lddt_per_atom(x, batch.positions, batch.resolved)
    module = importlib.import_module("megafold.metrics.lddt")  # hidden by the function
    monkeypatch.setattr(module, "_ROWS", 50)
    assert torch.equal(lddt_per_atom(x, batch.positions, batch.resolved), whole)


def test_far_from_the_origin_it_is_the_same(batch_of, perturbed):
    batch = batch_of("1CRN")
    x = perturbed(batch, 1.0)
    near = lddt(x, batch.positions, batch.resolved)
    far = lddt(x + 2000.0, batch.positions + 2000.0, batch.resolved)
    torch.testing.assert_close(far, near, atol=1e-3, rtol=0)


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
    assert lddt_per_atom(many[:, :0], true[:0], ALL[:0]).shape == (2, 0)


def test_bad_input_is_named():
    four = torch.ones(4, dtype=torch.bool)
    with pytest.raises(ValueError, match=r"predicted must be \[..., A, 3\]"):
        lddt(points(n=3), points(n=4), four)
    with pytest.raises(ValueError, match="mask must be bool"):
        lddt(points(), points(), torch.ones(40))
    with pytest.raises(ValueError, match=r"needs chain \[4\], got none"):
        lddt(points(n=4), points(n=4), four, pairs="within")
    with pytest.raises(ValueError, match="all, within or between, got 'interface'"):
        lddt(points(n=4), points(n=4), four, pairs="interface")
    with pytest.raises(ValueError, match=r"nucleic must be bool \[4\]"):
        lddt(points(n=4), points(n=4), four, nucleic=torch.ones(3, dtype=torch.bool))

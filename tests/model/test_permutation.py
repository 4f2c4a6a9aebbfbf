"""The truth renamed to fit a prediction: chains, ligands and atoms."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from megafold import data
from megafold.data.batch import Batch
from megafold.geometry import random_rotations
from megafold.metrics import rmsd
from megafold.model import training_loss
from megafold.model.permutation import permute_atoms, permute_chains, permute_truth
from tests.model.seeds import seeded


def moved(x: torch.Tensor) -> torch.Tensor:
    return x @ random_rotations(1, seeded(3))[0].T + torch.tensor([40.0, -3.0, 8.0])


def blurred(x: torch.Tensor, sigma: float = 0.5) -> torch.Tensor:
    return x + sigma * torch.randn(x.shape, generator=seeded(7))


@pytest.fixture
def pair(dimer) -> Batch:
    """Two identical chains; not related by symmetry, as the crystal's are, nearly."""
    copies = dimer.copy_positions.clone()
    copies[1] = moved(copies[1])
    own, atom = (dimer.sym_id - 1)[dimer.atom_to_token], torch.arange(dimer.num_atoms)
    return dataclasses.replace(dimer, copy_positions=copies, positions=copies[own, atom])


def relabelled(batch: Batch) -> Batch:
    """The same two identical chains, each with the truth of the other."""
    other = (2 - batch.sym_id)[batch.atom_to_token]  # sym_id 1 takes copy 1, 2 takes copy 0
    atom = torch.arange(batch.num_atoms)
    return dataclasses.replace(
        batch,
        positions=batch.copy_positions[other, atom],
        resolved=batch.copy_resolved[other, atom],
        copy_positions=batch.copy_positions.flip(0),
        copy_resolved=batch.copy_resolved.flip(0),
    )


def test_a_prediction_with_exchanged_chains_exchanges_the_truth(pair):
    swapped = relabelled(pair)
    x = moved(blurred(swapped.positions))
    assert rmsd(x, pair.positions, pair.resolved) > 5.0
    got = permute_chains(pair, x)
    assert torch.equal(got.positions, swapped.positions)
    assert torch.equal(got.resolved, swapped.resolved)


def test_a_prediction_that_fits_exchanges_nothing(pair, batch):
    for some in (pair, batch):
        got = permute_truth(some, moved(some.positions))
        assert torch.equal(got.positions, some.positions)
        assert torch.equal(got.resolved, some.resolved)


@pytest.mark.parametrize("seed", range(5))
def test_no_permutation_makes_the_fit_worse(pair, seed):
    x = 15 * torch.randn(pair.num_atoms, 3, generator=seeded(seed))
    centre = pair.center_atom

    def misfit(batch: Batch) -> torch.Tensor:
        return rmsd(x[centre], batch.positions[centre], batch.resolved[centre])

    assert misfit(permute_chains(pair, x)) <= misfit(pair) + 1e-4


def test_a_chain_may_take_the_truth_of_a_copy_that_the_crop_left_out(capsid):
    first = capsid.select(np.flatnonzero((capsid.sym_id == 1) & (capsid.residue_index > 30)))
    batch = data.make_batch(first, generator=np.random.default_rng(0), whole=capsid)
    # One chain lies on the other but for roundings: make another structure of the second.
    copies = batch.copy_positions.clone()
    copies[1] = blurred(copies[1], 0.5)
    batch = dataclasses.replace(batch, copy_positions=copies)
    got = permute_chains(batch, moved(copies[1]))
    assert torch.equal(got.positions, copies[1])
    own = permute_chains(batch, moved(copies[0]))
    assert torch.equal(own.positions, copies[0])


def test_three_identical_ligands_find_their_places(pair):
    batch = with_ligands(pair, 3)
    order = [2, 0, 1]
    ligand = batch.is_ligand[batch.atom_to_token]
    x = batch.positions.clone()
    x[ligand] = batch.positions[ligand][order]
    got = permute_chains(batch, moved(blurred(x, 0.2)))
    assert torch.equal(got.positions[ligand], batch.positions[ligand][order])
    assert torch.equal(got.positions[~ligand], batch.positions[~ligand])


def with_ligands(batch: Batch, count: int) -> Batch:
    """The last tokens made ions: each a chain of its own, of one entity."""
    n = batch.num_tokens
    first_atom = int((batch.atom_to_token >= n - count).nonzero()[0])
    rows = torch.cat([torch.arange(first_atom), batch.center_atom[-count:]])
    ion = torch.arange(n) >= n - count
    number = torch.arange(1, count + 1)
    atoms = len(rows)
    center = batch.center_atom.clone()
    center[ion] = torch.arange(first_atom, atoms)
    asym, entity, sym = batch.asym_id.clone(), batch.entity_id.clone(), batch.sym_id.clone()
    asym[ion], entity[ion], sym[ion] = 10 + number, 9, number
    position = batch.positions[rows]
    copies = torch.zeros(count, atoms, 3)
    known = torch.zeros(count, atoms, dtype=torch.bool)
    polymer = torch.arange(atoms) < first_atom
    copies[:2, polymer] = batch.copy_positions[:, rows][:, polymer]
    known[:2, polymer] = batch.copy_resolved[:, rows][:, polymer]
    copies[:, ~polymer] = position[~polymer][:, None]  # copy k of any of them is the k-th
    known[:, ~polymer] = True
    return dataclasses.replace(
        batch,
        atom_to_token=batch.atom_to_token[rows],
        atom_mask=batch.atom_mask[rows],
        positions=position,
        resolved=batch.resolved[rows],
        copy_positions=copies,
        copy_resolved=known,
        center_atom=center,
        asym_id=asym,
        entity_id=entity,
        sym_id=sym,
        is_ligand=ion,
        is_protein=batch.is_protein & ~ion,
        symmetric_atoms=(),
    )


def test_equivalent_atoms_take_the_names_that_fit(crambin):
    rings = next(orders for orders in crambin.symmetric_atoms if orders.shape[1:] == (2, 4))
    x = crambin.positions.clone()
    first = rings[0]
    x[first[0]] = crambin.positions[first[1]]  # one ring named the other way round
    got = permute_atoms(crambin, moved(blurred(x, 0.2)))
    torch.testing.assert_close(got.positions, x)


def test_each_residue_chooses_for_itself(crambin):
    x = crambin.positions.clone()
    for orders in crambin.symmetric_atoms:
        half = orders[::2]
        x[half[:, 0]] = crambin.positions[half[:, -1]]
    got = permute_atoms(crambin, moved(x))
    torch.testing.assert_close(got.positions, x)


def test_unresolved_atoms_keep_with_their_names(crambin):
    orders = next(orders for orders in crambin.symmetric_atoms if orders.shape[1:] == (2, 2))
    here = orders[0, 0]
    resolved = crambin.resolved.clone()
    resolved[here[0]] = False
    batch = dataclasses.replace(crambin, resolved=resolved)
    x = crambin.positions.clone()
    x[here] = crambin.positions[here.flip(0)]
    got = permute_atoms(batch, x)
    assert got.resolved[here].tolist() == [True, False]
    assert int(got.resolved.sum()) == int(resolved.sum())


def test_the_loss_does_not_depend_on_how_chains_are_called(model, pair):
    """Nothing that the model reads differs between the copies but their names."""
    losses = [training_loss(model, b, generator=seeded()) for b in (pair, relabelled(pair))]
    for one, two in zip(*(vars(loss).values() for loss in losses), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-6)


def test_the_loss_does_not_depend_on_how_equivalent_atoms_are_called(model, crambin):
    positions = crambin.positions.clone()
    for orders in crambin.symmetric_atoms:
        positions[orders[:, 0]] = crambin.positions[orders[:, 1]]
    renamed = dataclasses.replace(crambin, positions=positions)
    losses = [training_loss(model, b, generator=seeded()) for b in (crambin, renamed)]
    for one, two in zip(*(vars(loss).values() for loss in losses), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-3, atol=1e-5)


def test_padding_and_a_truth_without_atoms_are_no_trouble(pair):
    padded = data.pad_batch(pair, pair.num_tokens + 3, pair.num_atoms + 4)
    x = torch.nn.functional.pad(relabelled(pair).positions, (0, 0, 0, 4))
    got = permute_truth(padded, x)
    assert torch.equal(got.positions[:-4], relabelled(pair).positions)
    assert not got.resolved[-4:].any()
    nothing = dataclasses.replace(
        pair,
        resolved=torch.zeros_like(pair.resolved),
        copy_resolved=torch.zeros_like(pair.copy_resolved),
    )
    assert not permute_truth(nothing, pair.positions).resolved.any()

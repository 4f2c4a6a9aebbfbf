"""Scores of structures and chains from predicted errors."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch

from megafold.model import ranking


def test_the_scale_of_the_tm_score_is_that_of_its_paper():
    tokens = torch.tensor([10, 19, 100, 400])
    expected = [1.24 * (max(n, 19) - 15) ** (1 / 3) - 1.8 for n in tokens.tolist()]
    torch.testing.assert_close(ranking.tm_scale(tokens), torch.tensor(expected).double())


def test_tokens_of_two_chains_are_counted_once_each():
    asym_id = torch.tensor([1, 1, 2, 2, 2, 3])
    mask = torch.tensor([True] * 5 + [False])
    expected = torch.tensor([[2, 5], [5, 3]])
    assert torch.equal(ranking.interface_tokens(asym_id, mask)[[0, 2]][:, [1, 3]], expected)


def test_predicted_tm_is_the_best_row_over_its_pairs():
    tm = torch.tensor([[1.0, 0.2], [0.5, 0.9]])
    pairs = torch.tensor([[True, True], [False, True]])
    assert ranking.predicted_tm(tm, pairs) == pytest.approx(0.9)
    assert ranking.predicted_tm(tm, torch.eye(2, dtype=torch.bool)) == pytest.approx(1.0)
    assert math.isnan(ranking.predicted_tm(tm, torch.zeros(2, 2, dtype=torch.bool)))


def test_chains_without_frames_have_no_score_of_their_own():
    asym_id = torch.tensor([5, 5, 7])
    frames = torch.tensor([True, True, False])
    everywhere = torch.ones(3, dtype=torch.bool)
    table = ranking.chain_pair_tm(torch.full((3, 3), 0.5), frames, asym_id, everywhere)
    assert table[0, 0] == table[0, 1] == table[1, 0] == 0.5
    assert table[1, 1].isnan()


def test_the_global_distance_error_is_weighted_by_contacts():
    pde = torch.tensor([[0.0, 4.0], [4.0, 8.0]])
    contacts = torch.tensor([[0.0, 0.5], [0.5, 1.0]])
    assert ranking.global_pde(pde, contacts) == pytest.approx((2 + 2 + 8) / 2)


def test_ranking_score():
    assert ranking.ranking_score(0.5, 1.0, 0.2, False) == pytest.approx(0.8 + 0.1 + 0.1)
    assert ranking.ranking_score(0.5, 1.0, 0.2, True) == pytest.approx(-99.0)
    assert ranking.ranking_score(0.5, math.nan, 0.0, False) == pytest.approx(0.5)


def test_a_real_structure_has_no_clash(batch, dimer):
    assert not ranking.has_clash(batch, batch.positions)
    assert not ranking.has_clash(dimer, dimer.positions)


def test_a_chain_laid_over_another_clashes(dimer):
    # Both chains at the place of the first, but for half an angstrom.
    x = dimer.copy_positions[0] + 0.2 * dimer.sym_id[dimer.atom_to_token].float()[:, None]
    assert ranking.has_clash(dimer, x)


@pytest.mark.parametrize(("size", "allowed"), [(None, 100), (20, 10)])
def test_a_chain_clashes_beyond_a_hundred_or_half_of_its_atoms(dimer, size, allowed):
    chain = dimer.asym_id[dimer.atom_to_token]
    first, second = ((chain == c).nonzero().squeeze(1)[:size] for c in chain.unique().tolist())
    assert size or min(len(first), len(second)) > 2 * allowed
    mask = torch.zeros_like(dimer.atom_mask)
    mask[first] = mask[second] = True
    batch = dataclasses.replace(dimer, atom_mask=mask)
    apart = 5.0 * torch.arange(len(mask))[:, None].expand(-1, 3).float()
    for number in (allowed, allowed + 1):
        x = apart.clone()
        x[second[:number]] = x[first[:number]] + 0.6  # 1.04 angstrom away
        assert ranking.has_clash(batch, x) == (number > allowed)
    x[second[:number]] = x[first[:number]] + 0.65  # 1.13
    assert not ranking.has_clash(batch, x)


def test_ligands_and_neighbouring_residues_do_not_clash(batch):
    ligand = dataclasses.replace(batch, is_ligand=torch.ones_like(batch.is_ligand))
    assert not ranking.has_clash(ligand, torch.zeros_like(batch.positions))
    neighbours = torch.where(batch.residue_index % 2 == 0, 1, 2)
    close = dataclasses.replace(batch, residue_index=neighbours)
    assert not ranking.has_clash(close, torch.zeros_like(batch.positions))
    assert ranking.has_clash(batch, torch.zeros_like(batch.positions))

"""All scores of a structure at once."""

from __future__ import annotations

import math

import pytest
import torch

from megafold.data.batch import pad_batch
from megafold.metrics import score
from megafold.metrics.lddt import lddt


def test_the_truth_is_perfect(batch_of):
    batch = batch_of("1LCD")
    scores = score(batch, batch.positions)
    assert scores.lddt == scores.lddt_centre == scores.lddt_interface == 1.0
    assert scores.tm_score == pytest.approx(1.0, abs=1e-5)
    assert scores.rmsd < 1e-3
    chains = dict.fromkeys(batch.layout.chain_id.tolist())
    assert list(scores.lddt_chain) == list(chains)
    assert all(value == 1.0 for value in scores.lddt_chain.values() if not math.isnan(value))


def test_a_displaced_chain_spoils_the_interface_alone(batch_of):
    batch = batch_of("1A8O")
    x = batch.positions.clone()
    x[batch.asym_id[batch.atom_to_token] == 2] += 50.0
    scores = score(batch, x)
    assert all(value == pytest.approx(1.0, abs=1e-4) for value in scores.lddt_chain.values())
    assert scores.lddt_interface == 0.0
    assert scores.tm_score == pytest.approx(0.5, abs=0.05)


def test_a_single_chain_has_no_interface(batch_of, perturbed):
    batch = batch_of("1CRN")
    scores = score(batch, perturbed(batch, 1.0))
    assert math.isnan(scores.lddt_interface)
    assert scores.lddt_chain["A"] == scores.lddt


def test_padding_changes_no_score(batch_of, perturbed):
    batch = batch_of("1CRN")
    x = perturbed(batch, 1.0)
    padded = pad_batch(batch, batch.num_tokens + 5, batch.num_atoms + 11)
    filled = torch.cat([x, torch.full((11, 3), 1e3)])
    ours, theirs = score(batch, x), score(padded, filled)
    assert theirs.lddt == ours.lddt == float(lddt(x, batch.positions, batch.resolved))
    assert theirs.tm_score == pytest.approx(ours.tm_score, abs=1e-5)
    assert theirs.rmsd == pytest.approx(ours.rmsd, abs=1e-5)

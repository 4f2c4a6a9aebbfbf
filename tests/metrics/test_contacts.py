"""Precision of predicted contacts."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from megafold.metrics import contact_precision


def arguments_of(batch) -> tuple[torch.Tensor, ...]:
    known = batch.resolved[batch.representative_atom]
    return batch.positions[batch.representative_atom], known, batch.residue_index, batch.asym_id


def test_true_contacts_are_all_right_and_distances_reversed_all_wrong(batch_of):
    positions, *rest = arguments_of(batch_of("1A8O"))
    distance = torch.cdist(positions, positions)
    assert contact_precision(-distance, positions, *rest, per_token=0.2) == 1.0
    assert contact_precision(distance, positions, *rest, per_token=0.2) == 0.0


@pytest.mark.parametrize("separation", [6, 24])
@pytest.mark.parametrize("per_token", [0.2, 1.0])
def test_it_agrees_with_a_count_pair_by_pair(batch_of, separation, per_token):
    batch = batch_of("1LCD")
    positions, known, residue, chain = arguments_of(batch)
    n = len(known)
    rng = np.random.default_rng(0)
    distance = np.linalg.norm(positions.numpy()[:, None] - positions.numpy(), axis=-1)
    probability = np.exp(-distance / 8.0) + 3.0 * rng.random((n, n))
    pairs = []
    for i in range(n):
        for j in range(i + 1, n):
            apart = abs(int(residue[i]) - int(residue[j])) >= separation or chain[i] != chain[j]
            if apart and known[i] and known[j]:
                pairs.append((probability[i, j], distance[i, j] < 8.0))
    pairs.sort(reverse=True)
    chosen = pairs[: round(per_token * int(known.sum()))]
    expected = sum(close for _, close in chosen) / len(chosen)
    assert 0 < expected < 1
    got = contact_precision(
        torch.from_numpy(probability), positions, known, residue, chain,
        separation=separation, per_token=per_token,
    )  # fmt: skip
    assert got == pytest.approx(expected)


def test_without_a_pair_there_is_no_precision(batch_of):
    batch = batch_of("1CRN")
    positions, known, residue, chain = arguments_of(batch)
    n = len(known)
    assert math.isnan(
        contact_precision(torch.rand(n, n), positions, known, residue, chain, separation=99)
    )


def test_bad_input_is_named(batch_of):
    positions, known, residue, chain = arguments_of(batch_of("1CRN"))
    with pytest.raises(ValueError, match=r"probability must be \[46, 46\]"):
        contact_precision(torch.rand(45, 45), positions, known, residue, chain)
    with pytest.raises(ValueError, match="per_token must be above 0"):
        contact_precision(torch.rand(46, 46), positions, known, residue, chain, per_token=0)

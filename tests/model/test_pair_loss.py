"""Cross-entropy over pairs in chunks: the same numbers, without all logits at once."""

from __future__ import annotations

import torch
from torch.nn.functional import cross_entropy

from megafold.model import pair_loss
from megafold.model.pair_loss import pair_cross_entropy
from tests.model.largest import LargestTensor
from tests.model.seeds import seeded

BINS = 11


def example(n: int = 23):
    g = seeded()
    z = torch.randn(n, n, 5, generator=g, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(BINS, 5, generator=g, dtype=torch.float64, requires_grad=True)
    target = torch.randint(0, BINS, (n, n), generator=g)
    mask = torch.rand(n, n, generator=g) < 0.7
    return z, weight, target, mask


def test_chunks_change_neither_loss_nor_gradients(monkeypatch):
    z, weight, target, mask = example()

    def rows_of(rows, columns):
        return torch.relu(rows + 2 * columns) @ weight.T

    logits = rows_of(z, z.transpose(0, 1)).float()
    losses = cross_entropy(logits.flatten(0, 1), target.flatten(), reduction="none")
    expected = (losses * mask.flatten()).sum() / mask.sum()
    gradients = torch.autograd.grad(expected, (z, weight))
    for entries in (1, 1000, 1 << 22):
        monkeypatch.setattr(pair_loss, "CHUNK_ENTRIES", entries)
        loss = pair_cross_entropy(rows_of, z, target, mask, BINS)
        torch.testing.assert_close(loss, expected)
        got = torch.autograd.grad(loss, (z, weight))
        torch.testing.assert_close(got, gradients, rtol=1e-5, atol=1e-9)


def test_all_logits_are_never_there_at_once(monkeypatch):
    monkeypatch.setattr(pair_loss, "CHUNK_ENTRIES", 3000)
    z, weight, target, mask = example(60)
    with LargestTensor() as largest:
        pair_cross_entropy(lambda r, c: (r + c) @ weight.T, z, target, mask, BINS).backward()
    assert largest.entries <= z.numel() < 60 * 60 * BINS, largest.made_by


def test_without_pairs_it_is_zero():
    z, weight, target, mask = example(4)
    loss = pair_cross_entropy(lambda r, c: r @ weight.T, z, target, mask & False, BINS)
    loss.backward()
    assert loss == 0
    assert not z.grad.any()

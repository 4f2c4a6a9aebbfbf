"""What a training step draws, detaches, drops and weighs."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from megafold.model import CONFIGS, AlphaFold3, dropout, losses, training_loss
from tests.model.seeds import seeded


class Enough(Exception):
    """What was looked for has been seen."""


def test_one_to_four_cycles_are_drawn(batch, monkeypatch):
    model = AlphaFold3(dataclasses.replace(CONFIGS["tiny"], cycles=4))
    drawn = []

    def forward(batch, *, generator, cycles):
        drawn.append(cycles)
        raise Enough

    monkeypatch.setattr(model, "forward", forward)
    for seed in range(60):
        with pytest.raises(Enough):
            training_loss(model, batch, generator=seeded(seed))
    assert set(drawn) == {1, 2, 3, 4}


def test_recycled_states_carry_no_gradient_and_every_cycle_reads_other_rows(
    model, batch, monkeypatch
):
    deep = {
        name: getattr(batch, name)[:1].repeat(200, 1)
        for name in ("msa", "msa_mask", "has_deletion", "deletion_value")
    }
    batch = dataclasses.replace(batch, **deep)
    cycle, seen = model.cycle.forward, []

    def recorded(batch, rows, initial, s, z, pair_mask):
        out = cycle(batch, rows, initial, s, z, pair_mask)
        seen.append((rows, s.requires_grad, z.requires_grad, out[1].requires_grad))
        return out

    monkeypatch.setattr(model.cycle, "forward", recorded)
    model(batch, generator=seeded(), cycles=3)
    assert [flags for _, *flags in seen] == [[False, False, False]] * 2 + [[False, False, True]]
    rows = {tuple(rows.tolist()) for rows, *_ in seen}
    assert len(rows) == 3
    assert all(one[0] == 0 for one in rows)  # the query


def test_dropout_has_the_rates_and_axes_of_the_supplement(model, batch, monkeypatch):
    made = []

    def mask(x, rate, dim):
        made.append((rate, dim, x.dim()))
        return torch.ones(())

    monkeypatch.setattr(dropout, "shared_mask", mask)
    model.train()
    stack = [(0.25, 0, 3), (0.25, 0, 3), (0.25, 0, 3), (0.25, 1, 3)]  # rows, then columns
    pair_mask = batch.token_mask[:, None] & batch.token_mask
    z = torch.randn(batch.num_tokens, batch.num_tokens, model.config.c_z)
    model.pairformer.blocks[0].pair_stack(z, pair_mask)
    assert made == stack
    made.clear()
    m = torch.randn(2, batch.num_tokens, model.config.c_m)
    msa_mask = batch.token_mask.expand(2, -1)
    model.msa_module.blocks[0](m, z, msa_mask, batch.token_mask, pair_mask)
    assert made == [(0.15, 0, 3), *stack]


def test_squared_error_and_bonds_are_weighted_by_noise_and_the_smooth_lddt_is_not(
    model, batch, monkeypatch
):
    levels, noised = [], losses._noised_copies

    def copies(*args):
        out = noised(*args)
        levels.append(out[2])
        return out

    def ones(x, *_):
        return x.new_ones(len(x))

    monkeypatch.setattr(losses, "_noised_copies", copies)
    for name in ("aligned_mse", "bond_loss", "smooth_lddt_loss"):
        monkeypatch.setattr(losses, name, ones)
    for weighting in ("karras", "printed"):
        found = training_loss(model, batch, generator=seeded(), noise_weighting=weighting)
        t = levels.pop()
        scale = 16 * t if weighting == "karras" else 16 + t
        expected = ((t**2 + 16**2) / scale**2).mean()
        torch.testing.assert_close((found.mse, found.bond), (expected, expected))
        assert found.smooth_lddt == 1


def test_distances_teach_the_trunk_and_neither_diffusion_nor_confidence(model, batch):
    training_loss(model, batch, generator=seeded()).distogram.backward()
    taught = {
        name.split(".")[0]
        for name, parameter in model.named_parameters()
        if parameter.grad is not None and parameter.grad.any()
    }
    assert {"input_embedder", "template_embedder", "msa_module", "pairformer"} < taught
    assert "distogram_head" in taught
    assert not taught & {"diffusion", "confidence_head"}

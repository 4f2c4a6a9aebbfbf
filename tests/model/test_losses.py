"""The losses: what they are zero for, what they ignore, what they agree with."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch

from megafold.data.batch import pad_batch
from megafold.geometry import random_rotations
from megafold.model import losses
from megafold.model.confidence_losses import confidence_losses, distogram_loss
from megafold.model.heads import ConfidenceRepresentation, distance_breaks
from tests.model.seeds import seeded


def moved(x: torch.Tensor) -> torch.Tensor:
    rotation = random_rotations(1, seeded())
    return x @ rotation.transpose(-1, -2) + torch.tensor([5.0, -3.0, 8.0])


def rows_of(z: torch.Tensor, z_transposed: torch.Tensor) -> torch.Tensor:
    """A head whose logits are z itself."""
    return z


def test_the_aligned_error_of_a_moved_truth_is_zero_and_of_its_mirror_image_is_not(batch):
    x = batch.positions[None]
    torch.testing.assert_close(
        losses.aligned_mse(moved(x), x, batch), torch.zeros(1), atol=1e-6, rtol=0
    )
    assert losses.aligned_mse(moved(-x), x, batch) > 1.0


def test_ligand_and_nucleic_atoms_weigh_more(batch):
    # A shift that superposition cannot undo: breathe about the centre.
    x = batch.positions[None]
    grown = 1.1 * (x - x.mean(1)) + x.mean(1)
    plain = losses.aligned_mse(grown, x, batch)
    none, every = torch.zeros_like(batch.is_dna), torch.ones_like(batch.is_dna)
    dna = dataclasses.replace(batch, is_dna=every, is_ligand=none)
    ligand = dataclasses.replace(batch, is_dna=none, is_ligand=every)
    protein = dataclasses.replace(batch, is_dna=none, is_ligand=none)
    base = losses.aligned_mse(grown, x, protein)
    # Superposed in fp32 of coordinates of tens of angstrom, whose roundings differ by the weights.
    close = {"rtol": 1e-4, "atol": 0}
    torch.testing.assert_close(losses.aligned_mse(grown, x, dna), 6 * base, **close)
    torch.testing.assert_close(losses.aligned_mse(grown, x, ligand), 11 * base, **close)
    assert base <= plain


def test_unresolved_atoms_do_not_count(batch):
    x = batch.positions[None]
    resolved = batch.resolved.clone()
    resolved[:10] = False
    some = dataclasses.replace(batch, resolved=resolved)
    wrong = x.clone()
    wrong[:, :10] += 100.0
    torch.testing.assert_close(
        losses.aligned_mse(wrong, x, some), torch.zeros(1), atol=1e-6, rtol=0
    )
    torch.testing.assert_close(
        losses.smooth_lddt_loss(wrong, some), losses.smooth_lddt_loss(x, some)
    )


def test_smooth_lddt_of_the_truth_is_its_floor_wherever_the_truth_stands(batch):
    floor = 1 - sum(1 / (1 + math.exp(-t)) for t in (0.5, 1.0, 2.0, 4.0)) / 4
    loss = losses.smooth_lddt_loss(moved(batch.positions[None]), batch)
    torch.testing.assert_close(loss, torch.tensor([floor]), atol=1e-4, rtol=0)


def test_smooth_lddt_is_algorithm_27_over_all_ordered_pairs(batch):
    nucleic = torch.arange(batch.num_tokens) < 10
    mixed = dataclasses.replace(batch, is_dna=nucleic)
    x = batch.positions[None] + torch.randn(3, batch.num_atoms, 3, generator=seeded())
    true, predicted = torch.cdist(batch.positions, batch.positions), torch.cdist(x, x)
    error = (predicted - true).abs()
    score = sum(torch.sigmoid(t - error) for t in (0.5, 1.0, 2.0, 4.0)) / 4
    radius = torch.where(nucleic[batch.atom_to_token], 30.0, 15.0)
    near = (true < radius[:, None]) & ~torch.eye(batch.num_atoms, dtype=torch.bool)
    near &= batch.resolved[:, None] & batch.resolved[None]
    expected = 1 - (score * near).sum((1, 2)) / near.sum()
    torch.testing.assert_close(losses.smooth_lddt_loss(x, mixed), expected, atol=1e-4, rtol=1e-4)


def test_a_certain_and_right_distogram_costs_nothing(batch):
    position = batch.positions[batch.representative_atom]
    bins = torch.bucketize(torch.cdist(position, position), distance_breaks(64))
    logits = 50.0 * torch.nn.functional.one_hot(bins, 64).float()
    assert distogram_loss(rows_of, logits, batch, 64) < 1e-6
    flat = distogram_loss(rows_of, torch.zeros_like(logits), batch, 64)
    torch.testing.assert_close(flat, torch.tensor(math.log(64.0)))


def test_distance_bins_run_from_2_to_22_angstrom():
    breaks = distance_breaks(64)
    assert len(breaks) == 63
    torch.testing.assert_close(breaks[[0, -1]], torch.tensor([2.3125, 21.6875]))


def test_noise_weights():
    t = torch.tensor([1.0, 16.0])
    torch.testing.assert_close(losses.noise_weight(t), torch.tensor([257 / 256, 2 / 256]))
    torch.testing.assert_close(losses.noise_weight(t, "printed"), torch.tensor([257 / 289, 0.5]))
    with pytest.raises(ValueError, match="known: karras, printed"):
        losses.noise_weight(t, "none")


@pytest.mark.parametrize("name", ["aligned_mse", "smooth_lddt_loss", "bond_loss"])
def test_a_turned_prediction_has_the_same_loss_and_a_turned_gradient(batch, name):
    def loss(x):
        if name == "aligned_mse":
            return losses.aligned_mse(x, batch.positions[None], batch)
        return getattr(losses, name)(x, batch)

    noise = torch.randn(1, batch.num_atoms, 3, generator=seeded(1))
    x = (batch.positions + noise).requires_grad_()
    turned = moved(x.detach()).requires_grad_()
    one, two = loss(x), loss(turned)
    torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-5)
    (gradient,), (other,) = torch.autograd.grad(one, x), torch.autograd.grad(two, turned)
    rotation = random_rotations(1, seeded())
    expected = gradient @ rotation.transpose(-1, -2)
    torch.testing.assert_close(other, expected, rtol=1e-3, atol=1e-3 * float(expected.abs().max()))


def test_padding_changes_no_loss(model, batch):
    x = batch.positions + torch.randn(2, batch.num_atoms, 3, generator=seeded())
    n, c = batch.num_tokens, model.config
    s, z = torch.randn(n, c.c_s, generator=seeded()), torch.randn(n, n, c.c_z, generator=seeded())

    def every_loss(tokens, atoms):
        padded = pad_batch(batch, n + tokens, batch.num_atoms + atoms)
        y = torch.nn.functional.pad(x, (0, 0, 0, atoms), value=3.0)
        true = padded.positions.expand_as(y)
        pair = torch.nn.functional.pad(z, (0, 0, 0, tokens, 0, tokens), value=2.0)
        single = torch.nn.functional.pad(s, (0, 0, 0, tokens), value=2.0)
        seen = ConfidenceRepresentation(single, pair)
        logits = model.distogram_head.rows
        return {
            "mse": losses.aligned_mse(y, true, padded),
            "bond": losses.bond_loss(y, padded),
            "smooth lddt": losses.smooth_lddt_loss(y, padded),
            "distogram": distogram_loss(logits, pair, padded, c.distogram_bins),
            **vars(confidence_losses(model.confidence_head, seen, y[0], padded)),
        }

    expected = every_loss(0, 0)
    # Also more padding atoms than a token has, which all belong to the last one.
    for tokens, atoms in ((3, 9), (0, 60), (3, 60)):
        torch.testing.assert_close(every_loss(tokens, atoms), expected)

"""Rigid motions: rotations are rotations, superposition undoes them."""

from __future__ import annotations

import numpy as np
import torch
from Bio.SVDSuperimposer import SVDSuperimposer

from megafold.geometry import (
    centre_random_augmentation,
    distances,
    random_rotations,
    weighted_rigid_align,
)
from tests.numerics import DEVICE


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def test_random_rotations_are_proper_and_spread_evenly():
    r = random_rotations(4000, generator())
    eye = torch.eye(3).expand(4000, 3, 3)
    torch.testing.assert_close(r @ r.transpose(1, 2), eye, atol=1e-5, rtol=0)
    torch.testing.assert_close(torch.linalg.det(r), torch.ones(4000), atol=1e-5, rtol=0)
    assert r.mean(0).abs().max() < 0.05


def test_alignment_undoes_a_random_motion():
    x = 10 * torch.randn(5, 30, 3, generator=generator())
    mask = torch.ones(30, dtype=torch.bool)
    placed = centre_random_augmentation(x, mask, generator())
    back = weighted_rigid_align(placed, x, torch.ones(30))
    torch.testing.assert_close(back, x, atol=1e-4, rtol=0)


def test_alignment_never_mirrors():
    x = 10 * torch.randn(1, 30, 3, generator=generator())
    aligned = weighted_rigid_align(-x, x, torch.ones(30))
    assert (aligned - x).square().sum(-1).mean() > 10


def test_only_weighted_points_decide():
    x = 10 * torch.randn(1, 30, 3, generator=generator())
    weight = (torch.arange(30) < 20).float()
    spoilt = x.clone()
    spoilt[:, 20:] += 50.0
    back = weighted_rigid_align(spoilt, x, weight)
    torch.testing.assert_close(back[:, :20], x[:, :20], atol=1e-4, rtol=0)


def test_alignment_agrees_with_biopython():
    g = generator()
    x, y = (10 * torch.randn(1, 30, 3, generator=g) for _ in range(2))
    other = SVDSuperimposer()
    other.set(y[0].numpy().astype(np.float64), x[0].numpy().astype(np.float64))
    other.run()
    expected = torch.from_numpy(other.get_transformed()).float()
    got = weighted_rigid_align(x, y, torch.ones(30))
    torch.testing.assert_close(got[0], expected, atol=1e-3, rtol=1e-4)


def test_augmentation_centres_on_the_masked_atoms():
    x = 10 * torch.randn(3, 30, 3, generator=generator()) + 100.0
    mask = torch.arange(30) < 12
    placed = centre_random_augmentation(x, mask, generator(), spread=0.0)
    torch.testing.assert_close(placed[:, :12].mean(1), torch.zeros(3, 3), atol=1e-4, rtol=0)


def test_autocast_rounds_no_coordinates():
    g = torch.Generator().manual_seed(0)
    x = 100 * torch.randn(1, 50, 3, generator=g)
    everywhere = torch.ones(50, dtype=torch.bool)

    def placed():
        g = torch.Generator().manual_seed(1)
        moved = centre_random_augmentation(x, everywhere, g)
        return moved, weighted_rigid_align(moved, x, everywhere.float())

    expected = placed()
    with torch.autocast("cpu", torch.bfloat16):
        got = placed()
    for one, two in zip(got, expected, strict=True):
        assert torch.equal(one, two)


def test_distances_are_exact_far_from_the_origin_and_have_a_gradient_where_they_are_none():
    a = (torch.randn(7, 3, generator=torch.Generator().manual_seed(4)) + 1000.0).to(DEVICE)
    a.requires_grad_()
    b = torch.cat([a.detach()[:2], a.detach() + 1.0])
    found = distances(a.expand(2, 7, 3), b)
    exact = (a.double()[:, None] - b.double()).square().sum(-1).sqrt()
    torch.testing.assert_close(found, exact.float().expand(2, 7, 9))
    found.sum().backward()
    assert a.grad.isfinite().all()

"""Rigid motions: rotations are rotations, superposition undoes them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from Bio.SVDSuperimposer import SVDSuperimposer

from megafold.geometry import (
    best_rotations,
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


def by_svd(covariance: torch.Tensor) -> torch.Tensor:
    """Kabsch's rotations, and the sum of the singular values that each can reach."""
    u, s, vh = torch.linalg.svd(covariance)
    sign = torch.linalg.det(u @ vh).sign()
    return s[..., 0] + s[..., 1] + sign * s[..., 2]


def near_ties(count: int, difference: float) -> torch.Tensor:
    """Mirror images whose two least singular values differ by little: two rotations are as good."""
    q, p = (
        torch.linalg.qr(torch.randn(count, 3, 3, generator=generator()).double())[0] for _ in "qp"
    )
    c = q @ torch.diag(torch.tensor([1.0, 0.5, 0.5 - difference]).double()) @ p
    return torch.where(torch.linalg.det(c)[:, None, None] > 0, -c, c)


@pytest.mark.parametrize("name", ["any", "lines", "planes", "mirrored", "ties", "large", "small"])
def test_no_rotation_fits_better(name):
    g = generator()

    def draw(*size: int) -> torch.Tensor:
        return torch.randn(*size, generator=g).double()

    covariance = {
        "any": lambda: draw(500, 3, 3),
        "lines": lambda: draw(50, 3, 1) @ draw(50, 1, 3),
        "planes": lambda: draw(50, 3, 2) @ draw(50, 2, 3),
        "mirrored": lambda: 1e-3 * draw(50, 3, 3) - torch.eye(3).double(),
        "ties": lambda: torch.cat([near_ties(50, d) for d in (1e-4, 1e-7, 1e-10, 0.0)]),
        "large": lambda: 1e12 * draw(50, 3, 3),
        "small": lambda: 1e-12 * draw(50, 3, 3),
    }[name]()
    r = best_rotations(covariance)
    eye = torch.eye(3).double().expand_as(r)
    torch.testing.assert_close(r @ r.mT, eye, atol=1e-12, rtol=0)
    torch.testing.assert_close(torch.linalg.det(r), torch.ones(len(r)).double())
    reached, best = (r * covariance).sum((-1, -2)), by_svd(covariance)
    size = torch.linalg.matrix_norm(covariance)
    assert ((best - reached) / size).abs().max() < 1e-7


def test_rotations_of_nothing_and_of_what_is_not_finite():
    assert torch.equal(best_rotations(torch.zeros(2, 3, 3)), torch.eye(3).expand(2, 3, 3))
    assert best_rotations(torch.zeros(0, 3, 3)).shape == (0, 3, 3)
    for value in (torch.nan, torch.inf):
        spoilt = torch.eye(3).expand(2, 3, 3).clone()
        spoilt[1, 0, 2] = value
        r = best_rotations(spoilt)
        assert r[1].isnan().all()
        torch.testing.assert_close(r[0], torch.eye(3))


def test_alignment_of_coordinates_that_are_not_finite_is_nan():
    x = torch.randn(2, 5, 3, generator=generator())
    spoilt = x.clone()
    spoilt[1, 0, 0] = torch.nan
    moved = weighted_rigid_align(spoilt, x, torch.ones(5))
    assert moved[1].isnan().all()
    torch.testing.assert_close(moved[0], x[0], atol=1e-5, rtol=0)


@pytest.mark.gpu
def test_alignment_is_recorded_in_a_graph():
    x, y = (torch.randn(48, 200, 3, device="cuda") for _ in range(2))
    weight = torch.rand(200, device="cuda")
    weighted_rigid_align(x, y, weight)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        moved = weighted_rigid_align(x, y, weight)
    for _ in range(2):
        x.copy_(torch.randn_like(x))
        graph.replay()
        assert torch.equal(moved, weighted_rigid_align(x, y, weight))
        expected = weighted_rigid_align(x.cpu(), y.cpu(), weight.cpu())
        torch.testing.assert_close(moved.cpu(), expected, atol=1e-4, rtol=1e-4)


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

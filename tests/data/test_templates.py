"""Pair features of templates, from coordinates."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from megafold.data import Features
from megafold.data.templates import template_features


@pytest.fixture
def templated(features_of) -> Features:
    """Crambin with itself as a template, once as it is and once moved."""
    f = features_of("1CRN")
    backbone = np.stack(
        [f.positions[f.layout.atom_name == name] for name in ("N", "CA", "C")], axis=1
    )
    turn = np.array([[0, -1, 0], [1, 0, 0], [0, 0, 1]], dtype=np.float32)
    both = np.stack([backbone, backbone @ turn.T + 5])
    beta = f.positions[f.representative_atom]
    return replace(
        f,
        template_restype=np.tile(f.restype.astype(np.uint8), (2, 1)),
        template_pseudo_beta=np.stack([beta, beta @ turn.T + 5]),
        template_pseudo_beta_mask=np.ones((2, 46), dtype=bool),
        template_backbone=both.astype(np.float32),
        template_backbone_mask=np.ones((2, 46), dtype=bool),
    )


def test_they_do_not_change_when_the_template_moves(templated) -> None:
    arrays = template_features(templated)
    np.testing.assert_allclose(*arrays["template_unit_vector"], atol=1e-5)
    np.testing.assert_array_equal(*arrays["template_distogram"])


def test_unit_vectors_have_length_one_but_towards_oneself(templated) -> None:
    length = np.linalg.norm(template_features(templated)["template_unit_vector"], axis=-1)
    np.testing.assert_allclose(length, np.broadcast_to(1 - np.eye(46), (2, 46, 46)), atol=1e-5)


def test_the_first_axis_points_from_ca_to_c() -> None:
    """A residue in the plane z = 0; another lies where its carbonyl points."""
    from megafold.data.templates import _unit_vectors

    backbone = np.zeros((1, 2, 3, 3), dtype=np.float32)
    backbone[0, :, 0] = [[-0.5, 1.4, 0], [3.5, 1.4, 0]]  # N
    backbone[0, :, 1] = [[0, 0, 0], [4, 0, 0]]  # CA
    backbone[0, :, 2] = [[1.5, 0, 0], [5.5, 0, 0]]  # C
    np.testing.assert_allclose(_unit_vectors(backbone)[0, 0, 1], [1, 0, 0], atol=1e-6)
    np.testing.assert_allclose(_unit_vectors(backbone)[0, 1, 0], [-1, 0, 0], atol=1e-6)


@pytest.mark.parametrize(
    ("distance", "expected"), [(0.5, 0), (3.3, 0), (4.4, 0), (4.6, 1), (50.7, 37), (51.0, 38)]
)
def test_distances_fall_into_39_bins(distance, expected, templated) -> None:
    """38 bins of 1.25 angstrom from 3.25 to 50.75, and one beyond."""
    beta = np.zeros((1, 46, 3), dtype=np.float32)
    beta[0, 1:, 0] = distance
    one = {
        name: getattr(templated, name)[:1]
        for name in ("template_restype", "template_pseudo_beta_mask", "template_backbone",
                     "template_backbone_mask")
    }  # fmt: skip
    arrays = template_features(replace(templated, template_pseudo_beta=beta, **one))
    assert arrays["template_distogram"][0, 0, 1] == expected


def test_templates_follow_a_crop(templated) -> None:
    rows = np.arange(10, 30)
    whole, part = template_features(templated), template_features(templated.select(rows))
    np.testing.assert_array_equal(
        part["template_distogram"], whole["template_distogram"][:, 10:30, 10:30]
    )
    np.testing.assert_allclose(
        part["template_unit_vector"], whole["template_unit_vector"][:, 10:30, 10:30], atol=1e-6
    )

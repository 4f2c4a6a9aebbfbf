"""What holds for every crop: of 6 entries, by 3 methods, of 4 sizes, from 3 seeds."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from megafold.data import Features, make_batch
from megafold.data.cropping import INTERFACE_DISTANCE, METHODS
from megafold.data.features import COLUMN_FIELDS, TOKEN_FIELDS

# Symmetry, nucleic acids and ions, a modified residue, an alignment and haem, RNA, glycans.
ENTRIES = ("1A8O", "1LCD", "1AS5", "102M", "4P5J", "5UGO")
SIZES = (1, 13, 64, 200)


def _with_templates(features: Features) -> Features:
    """Two templates whose numbers say which token they are of."""
    n = features.num_tokens
    number = np.arange(n, dtype=np.float32)
    return replace(
        features,
        template_restype=np.tile((np.arange(n) % 20).astype(np.uint8), (2, 1)),
        template_pseudo_beta=np.tile(number[:, None], (2, 1, 3)),
        template_pseudo_beta_mask=np.ones((2, n), dtype=bool),
        template_backbone=np.tile(number[:, None, None], (2, 1, 3, 3)),
        template_backbone_mask=np.ones((2, n), dtype=bool),
    )


def _crops(features: Features):
    """Each crop as its rows and its features."""
    for method in METHODS.values():
        for size in SIZES:
            for seed in range(3):
                rows = method(features, size, np.random.default_rng(seed))
                yield method, size, rows, features.select(rows)


@pytest.fixture(params=ENTRIES)
def whole(request, features_of) -> Features:
    return _with_templates(features_of(request.param))


def test_tokens_are_distinct_in_order_and_no_more_than_asked_for(whole) -> None:
    for method, size, rows, part in _crops(whole):
        assert (np.diff(rows) > 0).all()
        assert 0 <= rows[0] <= rows[-1] < whole.num_tokens
        np.testing.assert_array_equal(part.token_index, rows)
        resolved = int(whole.resolved[whole.center_atom].sum())
        available = whole.num_tokens if method is METHODS["contiguous"] else resolved
        assert part.num_tokens == min(size, available)


def test_no_token_is_broken_and_atoms_follow(whole) -> None:
    atoms_of = np.bincount(whole.atom_to_token, minlength=whole.num_tokens)
    for _, _, rows, part in _crops(whole):
        counts = np.bincount(part.atom_to_token, minlength=part.num_tokens)
        np.testing.assert_array_equal(counts, atoms_of[rows])
        atoms = np.isin(whole.atom_to_token, rows)
        for name in ("positions", "resolved", "ref_pos", "ref_element", "ref_space_uid"):
            np.testing.assert_array_equal(getattr(part, name), getattr(whole, name)[atoms])
        np.testing.assert_array_equal(part.layout.atom_name, whole.layout.atom_name[atoms])
        for name in ("center_atom", "representative_atom"):
            ours, theirs = getattr(part, name), getattr(whole, name)[rows]
            np.testing.assert_array_equal(part.positions[ours], whole.positions[theirs])
            np.testing.assert_array_equal(part.atom_to_token[ours], np.arange(len(rows)))


def test_every_number_of_a_token_is_its_own(whole) -> None:
    for _, _, rows, part in _crops(whole):
        for name in TOKEN_FIELDS:
            np.testing.assert_array_equal(getattr(part, name), getattr(whole, name)[rows])


def test_columns_of_the_alignment_and_templates_follow(whole) -> None:
    for _, _, rows, part in _crops(whole):
        for name in COLUMN_FIELDS:
            np.testing.assert_array_equal(getattr(part, name), getattr(whole, name)[:, rows])


def test_bonds_between_tokens_that_are_left_follow_and_no_others(whole) -> None:
    for _, _, rows, part in _crops(whole):
        kept = {
            (a, b) for a, b in whole.bonds.tolist() if a in set(rows.tolist()) and b in set(rows)
        }
        assert {(rows[a], rows[b]) for a, b in part.bonds.tolist()} == kept
        atoms = np.flatnonzero(np.isin(whole.atom_to_token, rows))
        inside = np.isin(whole.ligand_bonds, atoms).all(axis=1)
        np.testing.assert_array_equal(atoms[part.ligand_bonds], whole.ligand_bonds[inside])


def test_a_crop_of_an_interface_has_one(whole) -> None:
    """Of two tokens the nearest to an interface token may be of its own chain; of 64, not."""
    if not whole.is_interface.any():
        return
    for method, size, rows, _ in _crops(whole):
        if method is not METHODS["interface"] or size < 64:
            continue
        centres = whole.positions[whole.center_atom[rows]]
        distance = np.linalg.norm(centres[:, None] - centres[None], axis=-1)
        chain = whole.asym_id[rows]
        near = (distance < INTERFACE_DISTANCE) & (chain[:, None] != chain[None])
        assert near.any()


def test_a_batch_can_be_made_of_every_crop(whole) -> None:
    for _, size, rows, part in _crops(whole):
        if size == 13:
            batch = make_batch(part, generator=np.random.default_rng(0), msa_rows=8, whole=whole)
            assert batch.num_tokens == len(rows)
            assert batch.template_mask.sum() == 2
            chosen = batch.template_restype[0].numpy()
            np.testing.assert_array_equal(chosen, rows % 20)

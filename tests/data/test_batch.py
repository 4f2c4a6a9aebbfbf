"""``make_batch`` and ``pad_batch``: shapes, the random part, padding."""

from __future__ import annotations

import re
from dataclasses import replace

import numpy as np
import pytest
import torch

from megafold.data import Batch, crop, make_batch, pad_batch
from megafold.data import batch as batch_module
from megafold.data.batch import TENSOR_FIELDS
from megafold.data.constants import NUM_RESTYPES

_SHAPES = {
    name: (shape, dtype)
    for name, shape, dtype in re.findall(
        r"^    (\w+): torch\.Tensor  # \[(.*?)\] (\w+)",
        open(batch_module.__file__, encoding="utf-8").read(),  # noqa: SIM115
        re.MULTILINE,
    )
}


def _batch(features, seed: int = 0, **options) -> Batch:
    return make_batch(features, generator=np.random.default_rng(seed), **options)


def _tensors(batch: Batch) -> dict[str, torch.Tensor]:
    return {name: getattr(batch, name) for name in TENSOR_FIELDS}


def test_every_field_has_the_shape_and_type_its_documentation_gives(
    any_sample, features_of
) -> None:
    features = crop(features_of(any_sample), 128, generator=np.random.default_rng(0))
    batch = _batch(features, msa_rows=16)
    sizes = {
        "N": batch.num_tokens,
        "A": batch.num_atoms,
        "M": len(batch.msa),
        "T": len(batch.template_mask),
        "K": len(batch.copy_positions),
        "L": len(batch.ligand_bonds),
    }
    tensors = _tensors(batch)
    assert _SHAPES.keys() == tensors.keys()
    for name, tensor in tensors.items():
        letters, dtype = _SHAPES[name]
        expected = [sizes[d] if d in sizes else int(d) for d in letters.split(", ")]
        assert list(tensor.shape) == expected, name
        assert tensor.dtype == getattr(torch, dtype), name
        assert torch.isfinite(tensor.float()).all(), name
    assert len(batch.layout) == batch.num_atoms


def test_classes_stay_within_their_ranges(any_sample, features_of) -> None:
    batch = _batch(crop(features_of(any_sample), 256, generator=np.random.default_rng(1)))
    for name, top in (
        ("restype", NUM_RESTYPES), ("msa", NUM_RESTYPES), ("ref_element", 128),
        ("ref_atom_name_chars", 64), ("template_distogram", 39),
    ):  # fmt: skip
        values = getattr(batch, name)
        assert 0 <= int(values.min()) <= int(values.max()) < top, name


def test_the_same_generator_gives_the_same_batch(features_of) -> None:
    one, two = (_tensors(_batch(features_of("102M"), msa_rows=32)) for _ in range(2))
    for name in one:
        assert torch.equal(one[name], two[name]), name


def test_another_seed_changes_only_what_is_random(features_of) -> None:
    one, two = (_tensors(_batch(features_of("102M"), seed, msa_rows=32)) for seed in (0, 1))
    changed = {name for name in one if not torch.equal(one[name], two[name])}
    assert changed == {"msa", "has_deletion", "deletion_value", "ref_pos"}


def test_the_query_is_always_the_first_row(features_of) -> None:
    f = features_of("102M")
    for rows in (1, 2, 50, 10_000):
        batch = _batch(f, msa_rows=rows)
        assert torch.equal(batch.msa[0], batch.restype)
        assert len(batch.msa) == min(rows, len(f.msa))


def test_drawn_rows_are_distinct_and_in_order(features_of) -> None:
    f = features_of("102M")
    numbered = np.arange(len(f.msa), dtype=np.uint16)
    f = replace(f, deletions=np.broadcast_to(numbered[:, None], f.msa.shape))
    drawn = _batch(f, msa_rows=100).deletion_value[:, 0]
    assert (drawn.diff() > 0).all()


def test_deletions_are_squashed_as_in_alphafold(features_of) -> None:
    f = features_of("1CRN")
    f = replace(f, deletions=np.full_like(f.deletions, 3))
    batch = _batch(f)
    torch.testing.assert_close(batch.deletion_value, torch.full_like(batch.deletion_value, 0.5))
    assert (batch.has_deletion == 1).all()


def test_placing_a_conformer_moves_it_as_a_rigid_body(features_of) -> None:
    f = features_of("1CRN")
    batch = _batch(f)
    for uid in range(5):
        here = f.ref_space_uid == uid
        before, after = torch.tensor(f.ref_pos[here]), batch.ref_pos[here]
        torch.testing.assert_close(
            torch.cdist(after, after), torch.cdist(before, before), atol=1e-4, rtol=0
        )
        assert (after.mean(dim=0) - before.mean(dim=0)).norm() > 1e-3


def test_placing_a_conformer_keeps_its_hand(features_of) -> None:
    f = features_of("1CRN")
    moved = _batch(f).ref_pos.numpy()

    def volumes(positions: np.ndarray) -> np.ndarray:
        starts = np.flatnonzero(f.layout.atom_name == "N")
        n, ca, c, o = (positions[starts + i] for i in range(4))
        return np.einsum("ai,ai->a", np.cross(n - ca, c - ca), o - ca)

    before, after = volumes(f.ref_pos), volumes(moved)
    np.testing.assert_allclose(after, before, atol=1e-3)


def test_rotations_are_uniform() -> None:
    rotations = batch_module._random_rotations(20_000, np.random.default_rng(0))
    np.testing.assert_allclose(
        rotations @ rotations.swapaxes(1, 2), np.broadcast_to(np.eye(3), (20_000, 3, 3)), atol=1e-9
    )
    np.testing.assert_allclose(np.linalg.det(rotations), 1)
    np.testing.assert_allclose(rotations.mean(axis=0), np.zeros((3, 3)), atol=0.02)
    # The trace of a uniform rotation, 1 + 2 cos(angle), has mean 0 and variance 1.
    assert np.trace(rotations, axis1=1, axis2=2).var() == pytest.approx(1, abs=0.03)


def test_token_bonds_are_symmetric_and_have_no_diagonal(features_of) -> None:
    bonds = _batch(features_of("102M")).token_bonds
    assert torch.equal(bonds, bonds.T)
    assert not bonds.diagonal().any()
    assert int(bonds.sum()) == 2 * len(features_of("102M").bonds)


def test_without_templates_there_is_one_empty_slot(features_of) -> None:
    batch = _batch(features_of("1CRN"))
    assert batch.template_mask.tolist() == [False]
    assert not batch.template_backbone_frame_mask.any()


def test_padding_stands_at_the_end_and_is_masked(features_of) -> None:
    batch = _batch(features_of("1LCD"))
    padded = pad_batch(batch, 100, 1000)
    assert padded.num_tokens == 100
    assert padded.num_atoms == 1000
    for name, tensor in _tensors(batch).items():
        inner = getattr(padded, name)[tuple(slice(n) for n in tensor.shape)]
        assert torch.equal(inner, tensor), name
    assert not padded.token_mask[batch.num_tokens :].any()
    assert not padded.atom_mask[batch.num_atoms :].any()
    assert not padded.msa_mask[:, batch.num_tokens :].any()
    assert not padded.resolved[batch.num_atoms :].any()
    assert (padded.atom_to_token.diff() >= 0).all()
    assert not torch.isin(padded.ref_space_uid[batch.num_atoms :], batch.ref_space_uid).any()


def test_every_field_is_padded_where_its_shape_says(features_of) -> None:
    padded = pad_batch(_batch(features_of("1LCD")), 100, 1000)
    sizes = {"N": 100, "A": 1000}
    for name, (letters, _) in _SHAPES.items():
        for axis, letter in enumerate(letters.split(", ")):
            if letter in sizes:
                assert getattr(padded, name).shape[axis] == sizes[letter], name


def test_padding_to_less_than_there_is_is_refused(features_of) -> None:
    with pytest.raises(ValueError, match="46 tokens and 327 atoms; it cannot be padded to 45"):
        pad_batch(_batch(features_of("1CRN")), 45, 400)


def test_fewer_than_one_row_is_refused(features_of) -> None:
    with pytest.raises(ValueError, match="msa_rows is 0"):
        _batch(features_of("1CRN"), msa_rows=0)


def test_loading_the_batch_module_loads_no_chemistry() -> None:
    import subprocess
    import sys

    code = (
        "import sys, megafold.data.batch; "
        "print(sorted({'biotite', 'rdkit', 'Bio'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"

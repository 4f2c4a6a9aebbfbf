"""Fixed shapes: the smallest bucket that is large enough."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from megafold.data import Buckets, crop, make_batch
from megafold.data.batch import TENSOR_FIELDS

BUCKETS = Buckets(tokens=(32, 64), atoms=(256, 512, 1024), rows=16)
FREE = {"copy_positions", "copy_resolved", "ligand_bonds"}  # of the losses; their own sizes


def _batch(features, size: int, rows: int = 8):
    generator = np.random.default_rng(0)
    return make_batch(crop(features, size, generator=generator), generator=generator, msa_rows=rows)


@pytest.mark.parametrize(
    ("tokens", "atoms", "expected"),
    [(1, 1, (32, 256)), (32, 256, (32, 256)), (33, 257, (64, 512)), (64, 1024, (64, 1024))],
)
def test_the_smallest_that_is_large_enough(tokens, atoms, expected) -> None:
    assert BUCKETS.shape(tokens, atoms) == expected


def test_batches_of_one_bucket_have_one_shape(features_of) -> None:
    buckets = Buckets(tokens=(64,), atoms=(512,), rows=16)
    one, two = (
        buckets.pad(_batch(features_of(name), 40, rows))
        for name, rows in (("102M", 16), ("1CRN", 3))
    )
    for name in TENSOR_FIELDS:
        if name not in FREE:
            assert getattr(one, name).shape == getattr(two, name).shape, name


def test_what_is_added_is_false_in_every_mask_and_the_rest_is_untouched(features_of) -> None:
    batch = _batch(features_of("102M"), 40)
    padded = BUCKETS.pad(batch)
    n, a, m, t = batch.num_tokens, batch.num_atoms, len(batch.msa), len(batch.template_mask)
    assert torch.equal(padded.msa[:m, :n], batch.msa)
    assert torch.equal(padded.ref_pos[:a], batch.ref_pos)
    assert not padded.token_mask[n:].any()
    assert not padded.atom_mask[a:].any()
    assert not padded.msa_mask[m:].any()
    assert not padded.template_mask[t:].any()


def test_what_fits_no_bucket_is_refused(features_of) -> None:
    with pytest.raises(ValueError, match="a batch of 65 tokens fits no bucket; the largest has 64"):
        BUCKETS.pad(_batch(features_of("102M"), 65))
    with pytest.raises(ValueError, match="20 alignment rows fits no bucket; they have 16"):
        BUCKETS.pad(_batch(features_of("102M"), 30, rows=20))


@pytest.mark.parametrize("tokens", [(), (64, 32), (32, 32), (0, 32)])
def test_sizes_must_increase(tokens) -> None:
    with pytest.raises(ValueError, match="tokens must be positive and increase"):
        Buckets(tokens=tokens, atoms=(256,), rows=1)

"""Batches in order, the same with any number of workers, from any step on."""

from __future__ import annotations

from itertools import islice

import numpy as np
import pytest
import torch

from megafold.data import (
    Batch,
    BatchLoader,
    Cache,
    DataError,
    SampledDataset,
    build_cache,
    make_batch,
    sample_path,
)
from megafold.data.batch import TENSOR_FIELDS
from megafold.data.loader import pack_batch, unpack_batch

STEPS = 9


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Cache:
    out = tmp_path_factory.mktemp("loader") / "cache"
    build_cache([sample_path(name) for name in ("1A8O", "1LCD", "4CUP")], out)
    return Cache(out)


@pytest.fixture(scope="module")
def dataset(cache) -> SampledDataset:
    return SampledDataset(cache, 40, steps=STEPS, seed=5)


@pytest.fixture(scope="module")
def expected(dataset) -> list[Batch]:
    return [dataset[step] for step in range(STEPS)]


def _assert_equal(one: Batch, two: Batch) -> None:
    for name in TENSOR_FIELDS:
        ours, theirs = getattr(one, name), getattr(two, name)
        assert ours.dtype == theirs.dtype, name
        assert torch.equal(ours, theirs), name
    assert len(one.symmetric_atoms) == len(two.symmetric_atoms)
    for ours, theirs in zip(one.symmetric_atoms, two.symmetric_atoms, strict=True):
        assert torch.equal(ours, theirs)
    np.testing.assert_equal(one.resolution, two.resolution)
    np.testing.assert_array_equal(one.layout.atom_name, two.layout.atom_name)


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_any_number_of_workers_gives_the_same_batches_in_order(workers, dataset, expected) -> None:
    loaded = list(BatchLoader(dataset, workers=workers))
    assert len(loaded) == STEPS
    for batch, alone in zip(loaded, expected, strict=True):
        _assert_equal(batch, alone)


@pytest.mark.parametrize("sample_id", ["4CUP", "1LCD"])
def test_a_batch_comes_out_of_one_block_as_it_went_in(sample_id, features_of) -> None:
    batch = make_batch(features_of(sample_id), generator=np.random.default_rng(0))
    packed = pack_batch(batch)
    unpacked = unpack_batch(packed)
    _assert_equal(unpacked, batch)
    assert unpacked.msa.untyped_storage().data_ptr() == packed.block.untyped_storage().data_ptr()


@pytest.mark.parametrize(("before", "after"), [(0, 2), (2, 0), (2, 1)])
def test_it_goes_on_after_the_last_batch_handed_out(before, after, cache, dataset, expected):
    """What workers had made ahead is made again, whoever makes it."""
    loader = BatchLoader(dataset, workers=before)
    seen = list(islice(loader, 4))
    state = loader.state_dict()
    again = BatchLoader(SampledDataset(Cache(cache.folder), 40, steps=STEPS, seed=5), workers=after)
    again.load_state_dict(state)
    assert len(again) == STEPS - 4
    rest = list(again)
    assert len(seen) + len(rest) == STEPS
    for batch, alone in zip([*seen, *rest], expected, strict=True):
        _assert_equal(batch, alone)


def test_a_state_is_plain_enough_for_a_checkpoint(dataset) -> None:
    import json

    state = BatchLoader(dataset).state_dict()
    assert json.loads(json.dumps(state)) == state


@pytest.mark.parametrize(
    ("change", "said"),
    [({"seed": 6}, "seed was 5 and is 6"), ({"crop_size": 30}, "crop_size was 40 and is 30")],
)
def test_a_state_of_other_examples_is_refused(change, said, cache, dataset) -> None:
    arguments = {"crop_size": 40, "seed": 5} | change
    other = BatchLoader(SampledDataset(cache, steps=STEPS, **arguments))
    with pytest.raises(DataError, match=said):
        other.load_state_dict(BatchLoader(dataset).state_dict())
    assert other.step == 0


@pytest.mark.parametrize("workers", [0, 1])
def test_a_damaged_entry_is_an_error_that_names_it(workers, tmp_path) -> None:
    build_cache(sample_path("1CRN"), tmp_path / "cache")
    cache = Cache(tmp_path / "cache")
    dataset = SampledDataset(cache, 20, steps=3)
    path = cache.entry_path(cache.index["1CRN"]["key"])
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(DataError, match=rf"{path.name}: damaged cache entry"):
        list(BatchLoader(dataset, workers=workers))


@pytest.mark.parametrize("arguments", [{"workers": -1}, {"prefetch": 0}])
def test_impossible_numbers_are_refused(arguments, dataset) -> None:
    with pytest.raises(ValueError, match="at least"):
        BatchLoader(dataset, **arguments)

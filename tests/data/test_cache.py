"""The cache: what goes in comes out, and only what is needed is read."""

from __future__ import annotations

import pickle
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
import torch

from megafold.data import (
    AtomLayout,
    Batch,
    Cache,
    CachedDataset,
    DataError,
    Features,
    build_cache,
    cache_key,
    crop,
    make_batch,
    sample_alignments,
    sample_path,
)
from megafold.data.batch import TENSOR_FIELDS
from megafold.data.features import ARRAY_FIELDS

KEY = "ab" * 32


@pytest.fixture
def cache(tmp_path: Path) -> Cache:
    return Cache.create(tmp_path / "cache")


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Cache:
    """A cache of two entries, one with a real alignment."""
    out = tmp_path_factory.mktemp("built") / "cache"
    alignments = sample_alignments("102M")["A"].parent
    build_cache(sample_path("102M"), out, alignments=alignments)
    build_cache(sample_path("1LCD"), out)
    return Cache(out)


def _assert_equal(ours: Features, theirs: Features) -> None:
    for name in ARRAY_FIELDS:
        one, two = getattr(ours, name), getattr(theirs, name)
        assert one.dtype == two.dtype, name
        np.testing.assert_array_equal(one, two, err_msg=name)
    for field in fields(AtomLayout):
        one, two = getattr(ours.layout, field.name), getattr(theirs.layout, field.name)
        assert one.dtype == two.dtype, field.name
        np.testing.assert_array_equal(one, two, err_msg=field.name)


def test_every_sample_comes_back_bit_for_bit(any_sample, cache, features_of) -> None:
    cache.put(KEY, features_of(any_sample))
    _assert_equal(cache.get(KEY), features_of(any_sample))


@pytest.mark.parametrize("sample_id", ["102M", "1LCD"])
def test_a_batch_from_the_cache_is_a_batch_without_it(sample_id, built, features_of) -> None:
    def batch(features: Features) -> Batch:
        generator = np.random.default_rng(7)
        return make_batch(crop(features, 60, generator=generator), generator=generator, msa_rows=99)

    cached, fresh = batch(built.load(sample_id)), batch(features_of(sample_id))
    for name in TENSOR_FIELDS:
        assert torch.equal(getattr(cached, name), getattr(fresh, name)), name
    assert cached.resolution == fresh.resolution or sample_id == "1LCD"  # NMR: NaN
    for ours, theirs in zip(cached.symmetric_atoms, fresh.symmetric_atoms, strict=True):
        assert torch.equal(ours, theirs)


def test_an_entry_is_a_memory_map(built) -> None:
    features = built.load("102M")
    array = features.msa
    while array.base is not None and not isinstance(array, np.memmap):
        array = array.base
    assert isinstance(array, np.memmap)
    with pytest.raises(ValueError, match="read-only"):
        features.msa[0, 0] = 1


def test_the_columns_of_a_run_of_tokens_are_one_run_of_bytes(built) -> None:
    msa = built.load("102M").msa
    assert msa[:, 10:20].T.flags.c_contiguous


def test_alignments_take_one_byte_for_each_letter(built) -> None:
    assert built.load("102M").msa.dtype == np.uint8


def test_an_entry_holds_no_pickle_and_opens_with_safetensors(built) -> None:
    from safetensors.numpy import load_file

    arrays = load_file(built.entry_path(built.index["102M"]["key"]))
    assert set(ARRAY_FIELDS) < set(arrays)


def test_a_cache_is_cheap_to_send_to_a_worker(built) -> None:
    fresh = Cache(built.folder)
    assert len(pickle.dumps(fresh)) < 1000
    assert pickle.loads(pickle.dumps(built)).names == built.names


class TestKey:
    """What decides an entry."""

    def test_it_depends_on_the_content_not_the_name(self, tmp_path) -> None:
        one, two, other = (tmp_path / name for name in "abc")
        one.write_text("x")
        two.write_text("x")
        other.write_text("y")
        assert cache_key(one) == cache_key(two) != cache_key(other)

    def test_it_depends_on_the_kind_of_file(self, tmp_path) -> None:
        endings = (".cif", ".bcif", ".cif.gz", ".bcif.gz")
        paths = [tmp_path / f"1.0_{name}{end}" for end in endings for name in ("x", "y")]
        for path in paths:
            path.write_text("x")
        assert len({cache_key(path) for path in paths}) == len(endings)

    def test_it_depends_on_the_alignments_and_their_chains(self, tmp_path) -> None:
        structure, msa, longer = (tmp_path / name for name in "abc")
        structure.write_text("x")
        msa.write_text(">q\nA\n")
        longer.write_text(">q\nA\n>h\nC\n")
        inputs = [None, {}, {"A": msa}, {"B": msa}, {"A": longer}]
        assert len({cache_key(structure, alignments) for alignments in inputs}) == 5

    @pytest.mark.parametrize("what", ["FEATURE_VERSION", "version"])
    def test_it_depends_on_the_software(self, what, tmp_path, monkeypatch) -> None:
        from megafold.data import cache as module

        path = tmp_path / "a"
        path.write_text("x")
        before = cache_key(path)
        value = 10**6 if what == "FEATURE_VERSION" else lambda package: "another"
        monkeypatch.setattr(module, what, value)
        assert cache_key(path) != before


class TestErrors:
    """What a cache says when something is wrong with it."""

    def test_a_folder_that_is_no_cache(self, tmp_path) -> None:
        (tmp_path / "notes.txt").write_text("mine")
        with pytest.raises(DataError, match=r"not a feature cache.*megafold cache build"):
            Cache(tmp_path)
        with pytest.raises(DataError, match="not a cache and not empty"):
            Cache.create(tmp_path)
        assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]

    @pytest.mark.parametrize(
        ("version", "advice"),
        [("1", "Build it again"), ("99", "Use the MegaFold that made it, or build it again")],
    )
    def test_a_cache_of_another_version(self, version, advice, cache) -> None:
        about = cache.folder / "cache.json"
        about.write_text(about.read_text().replace('"version": 2', f'"version": {version}'))
        with pytest.raises(DataError, match=rf"for format 2\. {advice} into a new .*cache build"):
            Cache(cache.folder)

    @pytest.mark.parametrize("index", ["[1]", '{"1CRN": {"status": "ok"}}', "{", '{"1CRN": 3}'])
    def test_a_damaged_index(self, index, cache) -> None:
        (cache.folder / "index.json").write_text(index)
        with pytest.raises(DataError, match=r"index.json: damaged .*delete it and build again"):
            Cache(cache.folder).names  # noqa: B018

    def test_an_entry_that_is_not_there(self, cache) -> None:
        with pytest.raises(DataError, match="no entry abababababab"):
            cache.get(KEY)
        with pytest.raises(DataError, match="no structure '1CRN'"):
            cache.load("1CRN")

    @pytest.mark.parametrize("key", ["", "../../etc", "x" * 64])
    def test_what_is_no_key(self, key, cache) -> None:
        with pytest.raises(DataError, match="no cache key"):
            cache.get(key)

    @pytest.mark.parametrize("keep", [0, 4, 100, -1])
    def test_a_damaged_entry(self, keep, cache, features_of) -> None:
        path = cache.put(KEY, features_of("1CRN"))
        path.write_bytes(path.read_bytes()[:keep])
        with pytest.raises(DataError, match=r"damaged cache entry .*build the cache again"):
            cache.get(KEY)

    @pytest.mark.parametrize(("part", "bytes_of_it"), [("header", 3000), ("content", 30_000)])
    def test_a_changed_byte_anywhere_in_an_entry(
        self, part, bytes_of_it, cache, features_of
    ) -> None:
        """What changes no value, such as a space of the header's padding, may pass."""
        path = cache.put(KEY, features_of("1CRN"))
        whole, right = path.read_bytes(), cache.verify(KEY)
        first = 8 if part == "header" else 8 + int.from_bytes(whole[:8], "little")
        rng, found = np.random.default_rng(0), 0
        for at in rng.integers(first, min(first + bytes_of_it, len(whole)), size=200):
            changed = bytearray(whole)
            changed[at] ^= 1 << int(rng.integers(8))
            path.write_bytes(changed)
            try:
                _assert_equal(cache.verify(KEY), right)
            except DataError as error:
                found += "damaged cache entry" in str(error) or "of version" in str(error)
        assert found >= (200 if part == "content" else 190)

    def test_an_entry_of_another_version(self, cache, features_of, monkeypatch) -> None:
        from megafold.data import entry as module

        monkeypatch.setattr(module, "FEATURE_VERSION", 10**6)
        cache.put(KEY, features_of("1CRN"))
        monkeypatch.undo()
        with pytest.raises(DataError, match=r"version 1000000, .*Build the cache again"):
            cache.get(KEY)


class TestAtomic:
    """Nothing half-written is ever seen."""

    def test_a_write_that_fails_leaves_nothing(self, cache, features_of, monkeypatch) -> None:
        import safetensors.numpy

        def broken(arrays, path, metadata) -> None:
            Path(path).write_bytes(b"half")
            raise OSError("no space left on device")

        monkeypatch.setattr(safetensors.numpy, "save_file", broken)
        with pytest.raises(OSError, match="no space left"):
            cache.put(KEY, features_of("1CRN"))
        assert KEY not in cache
        assert not [path for path in cache.folder.rglob("*") if path.suffix == ".tmp"]

    def test_what_a_killed_build_was_writing_is_deleted_an_hour_later(self, cache) -> None:
        import os

        old = [cache.folder / ".index.json.x.tmp", cache.folder / "entries" / f".{KEY}.x.tmp"]
        new = cache.folder / ".index.json.y.tmp"
        old[1].parent.mkdir()
        for path in (*old, new):
            path.write_bytes(b"half")
        for path in old:
            os.utime(path, (0, 0))
        cache.remove_leftovers()
        assert sorted(cache.folder.rglob("*.tmp")) == [new]

    def test_a_build_killed_before_it_said_what_the_folder_is(self, tmp_path) -> None:
        (tmp_path / ".cache.json.x.tmp").write_bytes(b"{")
        assert Cache.create(tmp_path).names == []

    def test_a_write_that_fails_leaves_the_old_file(self, tmp_path, monkeypatch) -> None:
        import os

        from megafold.atomic import atomic_write

        path = atomic_write(tmp_path / "file", b"old")
        monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            atomic_write(path, b"new")
        assert path.read_bytes() == b"old"
        assert list(tmp_path.iterdir()) == [path]


class TestDataset:
    """Entry -> crop -> batch."""

    def test_one_batch_for_each_structure(self, built) -> None:
        dataset = CachedDataset(built, 50)
        assert [batch.num_tokens for batch in dataset] == [50, 50]

    def test_seed_epoch_and_index_decide_a_batch(self, built) -> None:
        def positions(seed: int, epoch: int) -> bytes:
            dataset = CachedDataset(built, 50, seed=seed)
            dataset.set_epoch(epoch)
            return dataset[0].ref_pos.numpy().tobytes()

        assert positions(0, 0) == positions(0, 0)
        assert len({positions(s, e) for s in (0, 1) for e in (0, 1)}) == 4

    def test_workers_give_what_one_process_gives(self, built) -> None:
        from torch.utils.data import DataLoader

        dataset = CachedDataset(built, 50)
        loaded = list(DataLoader(dataset, batch_size=None, num_workers=2))
        for batch, alone in zip(loaded, dataset, strict=True):
            assert torch.equal(batch.ref_pos, alone.ref_pos)
            assert torch.equal(batch.msa, alone.msa)

    def test_the_number_of_rows_varies_up_to_the_limit(self, built) -> None:
        dataset = CachedDataset(built, 20, names=["102M"], msa_rows=400)
        depths = []
        for epoch in range(20):
            dataset.set_epoch(epoch)
            depths.append(len(dataset[0].msa))
        assert max(depths) == 400
        assert min(depths) < 200

    def test_a_name_that_is_not_there(self, built) -> None:
        with pytest.raises(DataError, match="no structure 9ZZZ"):
            CachedDataset(built, 50, names=["9ZZZ", "102M"])

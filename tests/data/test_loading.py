"""Measuring what the cache saves."""

from __future__ import annotations

import sys

import pytest

from megafold.data import Cache, build_cache, sample_alignments, sample_path
from megafold.data.loading import loading_cost, resident_bytes


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Cache:
    out = tmp_path_factory.mktemp("loading") / "cache"
    build_cache(sample_path("3NZD"), out, alignments=sample_alignments("3NZD")["A"].parent)
    return Cache(out)


def test_a_cached_crop_is_faster_than_a_fresh_one(cache) -> None:
    cost = loading_cost(cache, "3NZD", 32, repeats=3)
    assert (cost.tokens, cost.alignment_rows) == (266, 3507)
    assert 0 < cost.cached_ms < cost.fresh_ms
    assert 0 < cost.crop_mb < cost.entry_mb


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_what_is_not_looked_at_is_not_in_memory(cache) -> None:
    path = cache.entry_path(cache.index["3NZD"]["key"])
    assert resident_bytes(path) == 0
    features = cache.load("3NZD")
    opened = resident_bytes(path)
    assert 0 < opened < path.stat().st_size
    features.msa.sum()
    assert resident_bytes(path) > opened + 500_000

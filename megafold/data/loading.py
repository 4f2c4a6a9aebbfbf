"""What it costs to load a crop: features made afresh, and features from the cache."""

from __future__ import annotations

import re
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megafold.data.bundled import example_features
from megafold.data.cache import Cache
from megafold.data.cropping import crop
from megafold.data.features import ARRAY_FIELDS, Features


@dataclass(frozen=True)
class LoadingCost:
    """One bundled entry, cropped. Times are medians, from the call to the cropped features."""

    name: str
    tokens: int
    alignment_rows: int
    fresh_ms: float  # parse, tokenise, featurise, crop
    cached_ms: float  # open, crop
    entry_mb: float  # size of the cache's file
    read_mb: float  # of it that came into memory for one crop; NaN where the system cannot say
    crop_mb: float  # size of the cropped features


def loading_cost(cache: Cache, sample_id: str, size: int, *, repeats: int = 5) -> LoadingCost:
    """Measure a bundled entry that ``cache`` holds.

    Fresh times are taken after one run that is not counted, so that the component dictionary
    is loaded and conformers are made: what a long-running worker would see at best. Every
    repeat draws another crop; fresh and cached draw the same ones.

    Args:
        cache: With an entry of the sample's name, made from the same files.
        sample_id: A bundled entry.
        size: Tokens of the crop.
        repeats: Timed runs of each kind.
    """

    def timed(load: Callable[[], Features]) -> float:
        times = []
        for seed in range(repeats):
            begin = time.perf_counter()
            crop(load(), size, generator=np.random.default_rng(seed))
            times.append(time.perf_counter() - begin)
        return 1e3 * statistics.median(times)

    whole = example_features(sample_id)
    path = cache.entry_path(cache.index[sample_id]["key"])
    before = resident_bytes(path)
    features = cache.load(sample_id)
    part = crop(features, size, generator=np.random.default_rng(0))
    after = resident_bytes(path)
    del features
    return LoadingCost(
        name=sample_id,
        tokens=whole.num_tokens,
        alignment_rows=len(whole.msa),
        fresh_ms=timed(lambda: example_features(sample_id)),
        cached_ms=timed(lambda: cache.load(sample_id)),
        entry_mb=path.stat().st_size / 1e6,
        read_mb=float("nan") if after is None else (after - before) / 1e6,
        crop_mb=sum(getattr(part, name).nbytes for name in ARRAY_FIELDS) / 1e6,
    )


def resident_bytes(path: Path) -> int | None:
    """How much of a mapped file this process has in memory; None where Linux is not there.

    The kernel brings in neighbouring pages along with the one asked for, so this is a little
    more than what was looked at.
    """
    table = Path("/proc/self/smaps")
    if not table.is_file():
        return None
    total = 0
    for mapping in re.split(r"\n(?=[0-9a-f]+-[0-9a-f]+ )", table.read_text()):
        if mapping.split("\n", 1)[0].endswith(str(path.resolve())):
            total += 1024 * int(re.search(r"^Rss:\s+(\d+)", mapping, re.MULTILINE)[1])
    return total

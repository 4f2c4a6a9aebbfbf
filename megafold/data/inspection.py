"""What is in a cache, and what is in one entry of it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from megafold.data.cache import FORMAT_VERSION, Cache
from megafold.data.entry import entry_arrays
from megafold.data.errors import DataError
from megafold.data.features import FEATURE_VERSION


@dataclass(frozen=True)
class CacheSummary:
    """A cache in numbers. Of the inputs, only those that are ``ok`` count for the sums."""

    format_version: int
    feature_version: int  # of the MegaFold that looks; entries of another are refused
    inputs: int
    ok: int
    tokens: int
    atoms: int
    deepest_alignment: int  # rows
    entries: int  # files, those that the index does not name included
    unused_entries: int  # that the index does not name, such as those of changed inputs
    megabytes: float  # of all entries, 10^6 bytes


@dataclass(frozen=True)
class StoredArray:
    """One array of an entry, as it lies in the file."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    kilobytes: float  # 10^3 bytes


def summarize_cache(cache: Cache) -> CacheSummary:
    """Count what a cache holds; reads the index and the sizes of files only."""
    records = [cache.index[name] for name in cache.names]
    sizes = {
        path.stem: path.stat().st_size for path in (cache.folder / "entries").glob("*.safetensors")
    }
    return CacheSummary(
        format_version=FORMAT_VERSION,
        feature_version=FEATURE_VERSION,
        inputs=len(cache.index),
        ok=len(records),
        tokens=sum(record["tokens"] for record in records),
        atoms=sum(record["atoms"] for record in records),
        deepest_alignment=max((record["rows"] for record in records), default=0),
        entries=len(sizes),
        unused_entries=len(sizes.keys() - {record["key"] for record in records}),
        megabytes=sum(sizes.values()) / 1e6,
    )


def stored_arrays(cache: Cache, name: str) -> list[StoredArray]:
    """The arrays of the entry called ``name``, the largest first.

    Raises:
        DataError: It is not in the cache, was not cached, or its file is damaged.
    """
    if name not in cache.index:
        raise DataError(f"{cache.folder}: no structure {name!r}; it has {len(cache)} others")
    cache.load(name)  # says why where it was not cached
    arrays: dict[str, np.ndarray] = entry_arrays(cache.entry_path(cache.index[name]["key"]))
    rows = [
        StoredArray(key, array.shape, str(array.dtype), array.nbytes / 1e3)
        for key, array in arrays.items()
    ]
    return sorted(rows, key=lambda row: (-row.kilobytes, row.name))

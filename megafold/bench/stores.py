"""Stores that the features could be kept in, behind one interface, to be measured.

``Safetensors`` is the one that ``megafold.data`` uses: a file for each entry, memory-mapped.
The others are here for the comparison only (``megafold bench-data``) and need the packages lmdb
and zarr, which the library itself does not.
"""

from __future__ import annotations

import gzip
import hashlib
import pickle
import warnings
from abc import ABC, abstractmethod
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from megafold.data.batch import draw_rows
from megafold.data.cache import Cache
from megafold.data.cropping import crop_tokens
from megafold.data.dataset import draw_crop
from megafold.data.entry import from_arrays, to_arrays, view_arrays
from megafold.data.features import COLUMN_FIELDS, FEATURE_VERSION, ROW_FIELDS, Features


class Store(ABC):
    """Features by name in a folder of its own."""

    name: str

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @abstractmethod
    def put(self, name: str, features: Features) -> None:
        """Write one entry."""

    @abstractmethod
    def __contains__(self, name: str) -> bool:
        """Whether there is something of that name, valid or not."""

    @abstractmethod
    def load(self, name: str) -> Features:
        """All features of an entry; views where the store can give them."""

    def draw(self, name: str, size: int, rows: int, generator: np.random.Generator) -> Features:
        """A crop of ``size`` tokens with ``rows`` rows of the alignment."""
        return draw_crop(self.load(name), size, msa_rows=rows, generator=generator)

    def close(self) -> None:  # noqa: B027  (most have nothing open)
        """Let go of what is open."""


class Safetensors(Store):
    """The feature cache as it is."""

    name = "safetensors"

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self._cache = Cache.create(folder)

    def put(self, name: str, features: Features) -> None:
        self._cache.put(_key(name), features)

    def __contains__(self, name: str) -> bool:
        return _key(name) in self._cache

    def load(self, name: str) -> Features:
        return self._cache.get(_key(name))


class Lmdb(Store):
    """One LMDB file for all entries; a value is what would be the safetensors file."""

    name = "lmdb"

    def __init__(self, folder: Path) -> None:
        import lmdb

        super().__init__(folder)
        self._environment = lmdb.open(str(folder), map_size=1 << 36)

    def put(self, name: str, features: Features) -> None:
        from safetensors.numpy import save

        value = save(to_arrays(features), {"feature_version": str(FEATURE_VERSION)})
        with self._environment.begin(write=True) as transaction:
            transaction.put(name.encode(), value)

    def __contains__(self, name: str) -> bool:
        with self._environment.begin() as transaction:
            return transaction.get(name.encode()) is not None

    def load(self, name: str) -> Features:
        with self._environment.begin(buffers=True) as transaction:
            arrays = self._arrays(transaction, name)
            return from_arrays({key: array.copy() for key, array in arrays.items()})

    def draw(self, name: str, size: int, rows: int, generator: np.random.Generator) -> Features:
        with self._environment.begin(buffers=True) as transaction:
            arrays = self._arrays(transaction, name)
            # Views of the map are not valid after the transaction, so only what is drawn from is
            # left a view; the rest is small.
            views = {k: a if k in ROW_FIELDS else a.copy() for k, a in arrays.items()}
            return draw_crop(from_arrays(views), size, msa_rows=rows, generator=generator)

    def _arrays(self, transaction: Any, name: str) -> dict[str, np.ndarray]:
        value = transaction.get(name.encode())
        if value is None:
            raise KeyError(name)
        return view_arrays(np.frombuffer(value, dtype=np.uint8))[0]

    def close(self) -> None:
        self._environment.close()


class Zarr(Store):
    """A Zarr group for each entry: chunks of 64 tokens by all rows, compressed with Zstandard."""

    name = "zarr"

    def put(self, name: str, features: Features) -> None:
        import zarr

        group = zarr.open_group(self.folder / name, mode="w")
        for key, array in to_arrays(features).items():
            chunks = (64, *array.shape[1:]) if key in COLUMN_FIELDS else array.shape
            made = group.create_array(
                key,
                shape=array.shape,
                dtype=array.dtype,
                chunks=tuple(max(1, n) for n in chunks),
            )
            if array.size:
                made[...] = array
        with warnings.catch_warnings():  # that other programs may not read it: none has to
            warnings.simplefilter("ignore")
            zarr.consolidate_metadata(group.store)

    def __contains__(self, name: str) -> bool:
        return (self.folder / name).exists()

    def load(self, name: str) -> Features:
        return from_arrays({key: array[...] for key, array in self._group(name).items()})

    def draw(self, name: str, size: int, rows: int, generator: np.random.Generator) -> Features:
        group = self._group(name)
        small = {key: array[...] for key, array in group.items() if key not in ROW_FIELDS}
        tokens = len(small["restype"])
        depth = group["msa"].shape[1]
        nothing = {key: np.zeros((tokens, 0), dtype=group[key].dtype) for key in ROW_FIELDS}
        whole = from_arrays(small | nothing)
        chosen = crop_tokens(whole, size, generator=generator)
        drawn = draw_rows(depth, rows, generator)
        columns = {key: group[key].oindex[chosen, :][:, drawn].T for key in ROW_FIELDS}
        return replace(whole.select(chosen), **columns)

    def _group(self, name: str) -> dict[str, Any]:
        import zarr

        return dict(zarr.open_consolidated(self.folder / name, mode="r").members())


class GzipPickle(Store):
    """The paper's design: a compressed pickle for each entry, read whole, written in place.

    It is the one place where a pickle is read, and only one that this process wrote.
    """

    name = "gzip pickle"

    def put(self, name: str, features: Features) -> None:
        with gzip.open(self.folder / f"{name}.pkl.gz", "wb") as file:
            pickle.dump(to_arrays(features), file)

    def __contains__(self, name: str) -> bool:
        return (self.folder / f"{name}.pkl.gz").exists()

    def load(self, name: str) -> Features:
        with gzip.open(self.folder / f"{name}.pkl.gz", "rb") as file:
            return from_arrays(pickle.load(file))


STORES: dict[str, type[Store]] = {kind.name: kind for kind in (Safetensors, Lmdb, Zarr, GzipPickle)}


def open_store(kind: str, folder: Path) -> Store:
    """A store in ``folder``, which is made where there is none.

    Raises:
        ValueError: There is no store of that kind.
    """
    if kind not in STORES:
        raise ValueError(f"no store {kind!r}; there are {', '.join(STORES)}")
    folder.mkdir(parents=True, exist_ok=True)
    return STORES[kind](folder)


def _key(name: str) -> str:
    return hashlib.sha256(name.encode()).hexdigest()

"""Features on disk: one memory-mapped file per structure.

A folder holds ``cache.json`` (what it is), ``index.json`` (name -> key, or why there is none) and
``entries/<key>.safetensors``. A key is the hash of everything an entry depends on, so an entry
is never wrong, only unused. Every file appears whole or not at all.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import time
from collections.abc import Mapping
from contextlib import suppress
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from megafold.atomic import atomic_create, atomic_write
from megafold.data.errors import DataError
from megafold.data.features import ARRAY_FIELDS, COLUMN_FIELDS, FEATURE_VERSION, Features
from megafold.data.layout import AtomLayout

FORMAT = "megafold feature cache"
FORMAT_VERSION = 1

_LEFTOVER_AGE = 3600.0  # seconds; no file takes so long to write
_KEY = re.compile(r"[0-9a-f]{64}")
# Text is kept as rows of character codes, since safetensors holds numbers only.
_TEXT_FIELDS = ("chain_id", "residue_name", "atom_name", "element", "chain_type")
_LAYOUT = "layout."
_CHECKSUM = "sha256"  # [32] uint8
_ARRAY_NAMES = {
    _CHECKSUM,
    *ARRAY_FIELDS,
    *(_LAYOUT + name for name in AtomLayout.__dataclass_fields__),
}


def cache_key(structure: Path, alignments: Mapping[str, Path] | None = None) -> str:
    """Hash of all that decides an entry: the files' bytes, the configuration, the version.

    The ends of the files' names are part of it, since they say how the bytes are read.
    RDKit and biotite are part of it: conformers and components come from them. So is whether
    alignments were asked for at all (``None`` if not), since then a missing one is an error.

    Raises:
        DataError: A file is missing or cannot be read.
    """
    recipe: dict[str, Any] = {
        "feature_version": FEATURE_VERSION,
        "rdkit": version("rdkit"),
        "biotite": version("biotite"),
        "structure": _file_recipe(structure),
        "alignments": None,
    }
    if alignments is not None:
        recipe["alignments"] = {chain: _file_recipe(path) for chain, path in alignments.items()}
    return hashlib.sha256(json.dumps(recipe, sort_keys=True).encode()).hexdigest()


def _file_recipe(path: Path) -> dict[str, str]:
    path = Path(path)
    if not os.path.isfile(path):  # as for a name that no file can have; Path.is_file raises
        raise DataError(f"{path}: no such file")
    try:
        with open(path, "rb") as file:
            content = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from error
    inner = path.name.removesuffix(".gz")
    return {"kind": Path(inner).suffix + path.name.removeprefix(inner), "content": content}


class Cache:
    """A folder of cached features. ``Cache(folder)`` opens one, ``Cache.create`` makes one.

    Cheap to send to another process: it holds a path, and the index once that was asked for.
    """

    def __init__(self, folder: str | Path) -> None:
        """Open a cache.

        Raises:
            DataError: The folder is not a cache, or one of another version.
        """
        self.folder = Path(folder)
        about = self._read_json("cache.json")
        if about is None or about.get("format") != FORMAT:
            raise DataError(
                f"{self.folder}: not a feature cache (no cache.json that says so). Make one with "
                "megafold cache build STRUCTURES --out CACHE"
            )
        if about.get("version") != FORMAT_VERSION:
            raise DataError(
                f"{self.folder}: feature cache of format {about.get('version')}, this is MegaFold "
                f"for format {FORMAT_VERSION}. Build it again into a new folder"
            )

    @cached_property
    def index(self) -> dict[str, dict[str, Any]]:
        """name -> status (ok, failed, excluded, or stale: not built yet), and key or reason."""
        return self._read_json("index.json") or {}

    @classmethod
    def create(cls, folder: str | Path) -> Cache:
        """Open a cache, making it first where there is none.

        Raises:
            DataError: The folder has other things in it, or is a cache of another version.
        """
        folder = Path(folder)
        if folder.exists() and not folder.is_dir():
            raise DataError(f"{folder}: a file, not a folder for a cache")
        if not (folder / "cache.json").exists():
            # A build that was killed in its first moment leaves a temporary file at most.
            if folder.is_dir() and set(folder.iterdir()) - set(_leftovers(folder)):
                raise DataError(f"{folder}: not a cache and not empty; choose another folder")
            about = {"format": FORMAT, "version": FORMAT_VERSION}
            atomic_write(folder / "cache.json", _to_json(about))
        return cls(folder)

    @property
    def names(self) -> list[str]:
        """Names of the structures that can be loaded."""
        return sorted(n for n, record in self.index.items() if record["status"] == "ok")

    @property
    def failures(self) -> dict[str, str]:
        """Why a structure could not be cached, by name."""
        failed = {n: r for n, r in self.index.items() if r["status"] == "failed"}
        return {name: failed[name]["reason"] for name in sorted(failed)}

    def __len__(self) -> int:
        return len(self.names)

    def __contains__(self, key: str) -> bool:
        return self.entry_path(key).is_file()

    def __repr__(self) -> str:
        return f"Cache({self.folder}: {len(self)} structures, {len(self.failures)} failed)"

    def entry_path(self, key: str) -> Path:
        """Where the entry ``key`` stands, or would."""
        if not _KEY.fullmatch(key):
            raise DataError(f"{key!r} is no cache key: expected 64 hexadecimal digits")
        return self.folder / "entries" / f"{key}.safetensors"

    def put(self, key: str, features: Features) -> Path:
        """Write one entry."""
        from safetensors.numpy import save_file

        path = self.entry_path(key)
        arrays = _to_arrays(features)
        # An array and not metadata, of which safetensors writes more than one in random order.
        arrays[_CHECKSUM] = _checksum(arrays)
        metadata = {"feature_version": str(FEATURE_VERSION)}
        return atomic_create(path, lambda file: save_file(arrays, file, metadata))

    def get(self, key: str) -> Features:
        """The entry ``key``, memory-mapped: what is not looked at is not read.

        Raises:
            DataError: There is no such entry, or its file is cut, malformed or of another version.
        """
        return _from_arrays(self._map(key))

    def verify(self, key: str) -> Features:
        """The same, all of it read and held against the checksum it was written with.

        Raises:
            DataError: As ``get``, or a byte has changed.
        """
        arrays = self._map(key)
        if not np.array_equal(arrays.pop(_CHECKSUM), _checksum(arrays)):
            raise _damaged(self.entry_path(key), "its content has changed since it was written")
        return _from_arrays(arrays)

    def _map(self, key: str) -> dict[str, np.ndarray]:
        path = self.entry_path(key)
        if not path.is_file():
            raise DataError(f"{self.folder}: no entry {key[:12]}...; build the cache again")
        arrays, feature_version = _map_file(path)
        if feature_version != str(FEATURE_VERSION):
            raise DataError(
                f"{path}: features of version {feature_version}, this is MegaFold for version "
                f"{FEATURE_VERSION}. Build the cache again; it makes only what has changed"
            )
        if missing := _ARRAY_NAMES - arrays.keys():
            raise _damaged(path, f"no {min(missing)}")
        return arrays

    def load(self, name: str) -> Features:
        """The features of the structure called ``name``.

        Raises:
            DataError: It is not in the cache, or was not cached (the reason is given).
        """
        record = self.index.get(name)
        if record is None:
            raise DataError(f"{self.folder}: no structure {name!r}; it has {len(self)} others")
        if record["status"] != "ok":
            raise DataError(f"{self.folder}: {name} was not cached: {record['reason']}")
        return self.get(record["key"])

    def save_index(self) -> None:
        """Write ``index`` to disk."""
        atomic_write(self.folder / "index.json", _to_json(self.index))

    def remove_leftovers(self) -> None:
        """Delete what killed builds were writing; not what another build may be writing now."""
        for path in [*_leftovers(self.folder), *_leftovers(self.folder / "entries")]:
            with suppress(FileNotFoundError):  # whoever wrote it was quicker
                if time.time() - path.stat().st_mtime > _LEFTOVER_AGE:
                    path.unlink()

    def _read_json(self, name: str) -> dict[str, Any] | None:
        path = self.folder / name
        if not path.is_file():
            return None
        try:
            return json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise DataError(f"{path}: damaged ({error}); delete it and build again") from error


def _leftovers(folder: Path) -> list[Path]:
    """Temporary files of ``megafold.atomic``."""
    return list(folder.glob(".*.tmp"))


def _to_json(value: Any) -> bytes:
    return (json.dumps(value, indent=1, sort_keys=True) + "\n").encode()


def _to_arrays(features: Features) -> dict[str, np.ndarray]:
    arrays = {}
    for name in ARRAY_FIELDS:
        value = getattr(features, name)
        # Tokens first, so that a crop's columns are runs of bytes.
        arrays[name] = value.swapaxes(0, 1) if name in COLUMN_FIELDS else value
    for name in AtomLayout.__dataclass_fields__:
        value = getattr(features.layout, name)
        if name in _TEXT_FIELDS:
            value = _to_codes(value)
        arrays[_LAYOUT + name] = value
    return {name: np.ascontiguousarray(value) for name, value in arrays.items()}


def _from_arrays(arrays: Mapping[str, np.ndarray]) -> Features:
    values: dict[str, Any] = {}
    for name in ARRAY_FIELDS:
        value = arrays[name]
        values[name] = value.swapaxes(0, 1) if name in COLUMN_FIELDS else value
    layout = {}
    for name in AtomLayout.__dataclass_fields__:
        value = np.asarray(arrays[_LAYOUT + name])
        if name in _TEXT_FIELDS:
            value = _to_text(value)
        layout[name] = value
    return Features(**values, layout=AtomLayout(**layout))


def _checksum(arrays: Mapping[str, np.ndarray]) -> np.ndarray:
    """Hash of what the arrays mean, however they lie in a file. [32] uint8."""
    digest = hashlib.sha256()
    for name, array in sorted(arrays.items()):
        digest.update(f"{name} {array.dtype} {array.shape}\n".encode())
        digest.update(np.ascontiguousarray(array).data)
    return np.frombuffer(digest.digest(), dtype=np.uint8)


def _to_codes(text: np.ndarray) -> np.ndarray:
    """Character codes, zero after the end. [A, width] uint8.

    Raises:
        DataError: A character is not ASCII, as all names in the PDB are.
    """
    codes = np.ascontiguousarray(text).view(np.uint32).reshape(len(text), -1)
    if codes.max(initial=0) > 127:
        raise DataError(f"{text[(codes > 127).any(axis=-1)][0]!r} is not ASCII")
    return codes.astype(np.uint8)


def _to_text(codes: np.ndarray) -> np.ndarray:
    wide = np.ascontiguousarray(codes, dtype=np.uint32)
    return wide.view(f"U{codes.shape[1]}")[:, 0]


_DTYPES = {
    "BOOL": np.bool_, "U8": np.uint8, "I32": np.int32, "I64": np.int64, "F32": np.float32,
}  # fmt: skip


def _map_file(path: Path) -> tuple[dict[str, np.ndarray], str]:
    """The tensors of a safetensors file as views of one memory map, and their version.

    The safetensors package maps files too, but copies each tensor whole when asked for it.
    The format: 8 bytes of header length, a JSON header with dtype, shape and offsets, bytes.
    """
    size = path.stat().st_size
    try:
        with open(path, "rb") as file:
            start = 8 + int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(start - 8)) if start <= size else {}
        feature_version = header.pop("__metadata__")["feature_version"]
        end = start + max(entry["data_offsets"][1] for entry in header.values())
        if end != size:
            raise ValueError(f"{size} bytes, its header says {end}")
        raw = np.memmap(path, dtype=np.uint8, mode="r")
        arrays = {}
        for name, entry in header.items():
            first, last = (start + offset for offset in entry["data_offsets"])
            flat = raw[first:last].view(_DTYPES[entry["dtype"]])
            arrays[name] = np.asarray(flat).reshape(entry["shape"])
    except (ValueError, LookupError, TypeError, AttributeError, OverflowError) as error:
        raise _damaged(path, str(error)) from error
    return arrays, feature_version


def _damaged(path: Path, why: str) -> DataError:
    return DataError(f"{path}: damaged cache entry ({why}); build the cache again")

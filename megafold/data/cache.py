"""Features on disk: one memory-mapped file per structure.

A folder holds ``cache.json`` (what it is), ``index.json`` (name -> key, or why there is none) and
``entries/<key>.safetensors`` (see ``megafold.data.entry``). A key is the hash of everything an
entry depends on, so an entry is never wrong, only unused. Every file appears whole or not at
all, and one build at a time writes (``build.lock``).
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import platform
import re
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any

from megafold.atomic import atomic_create, atomic_write
from megafold.data.entry import read_entry, write_entry
from megafold.data.errors import DataError
from megafold.data.features import FEATURE_VERSION, Features

FORMAT = "megafold feature cache"
FORMAT_VERSION = 2

_LEFTOVER_AGE = 3600.0  # seconds; no file takes so long to write
_KEY = re.compile(r"[0-9a-f]{64}")
_LOCK = "build.lock"
# What the index has of each input at least.
_RECORD = {"status", "reason", "key", "tokens", "atoms", "rows", "folder", "path", "alignments"}


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
        if (found := about.get("version")) != FORMAT_VERSION:
            older = isinstance(found, int) and found < FORMAT_VERSION
            advice = "Build" if older else "Use the MegaFold that made it, or build"
            raise DataError(
                f"{self.folder}: feature cache of format {found}, this is MegaFold for format "
                f"{FORMAT_VERSION}. {advice} it again into a new folder: "
                "megafold cache build STRUCTURES --out NEW"
            )

    @cached_property
    def index(self) -> dict[str, dict[str, Any]]:
        """name -> status (ok, failed, excluded, or stale: not built yet), and key or reason.

        Raises:
            DataError: The file is damaged.
        """
        index = self._read_json("index.json")
        if index is None:
            return {}
        for name, record in index.items() if isinstance(index, dict) else [("", None)]:
            if not isinstance(record, dict) or not record.keys() >= _RECORD:
                raise DataError(
                    f"{self.folder / 'index.json'}: damaged (at {name!r}); delete it and build "
                    "again: entries are kept, and found by their keys"
                )
        return index

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
        return atomic_create(self.entry_path(key), lambda path: write_entry(path, features))

    def get(self, key: str) -> Features:
        """The entry ``key``, memory-mapped: what is not looked at is not read.

        Raises:
            DataError: There is no such entry, or its file is cut, malformed or of another version.
        """
        return read_entry(self._existing(key))

    def verify(self, key: str) -> Features:
        """The same, all of it read and held against the checksum it was written with.

        Raises:
            DataError: As ``get``, or a byte has changed.
        """
        return read_entry(self._existing(key), verify=True)

    def _existing(self, key: str) -> Path:
        path = self.entry_path(key)
        if not path.is_file():
            raise DataError(f"{self.folder}: no entry {key[:12]}...; build the cache again")
        return path

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

    def inputs(self, name: str) -> tuple[Path, dict[str, Path] | None]:
        """The files that an entry was made of: its structure, and its alignments by chain.

        The index has them as they were called when the cache was built, and where the cache
        stood then. So they are found where the cache has stayed, where it was moved alone, and
        where it was moved or copied together with them; of two candidates the one that lies
        to the cache as it did before is taken.
        """
        record = self.index[name]

        def found(path: str) -> Path:
            beside = os.path.relpath(path, record["folder"])
            moved = Path(os.path.normpath(self.folder / beside))
            return moved if os.path.lexists(moved) else Path(path)

        alignments = record["alignments"]
        if alignments is not None:
            alignments = {chain: found(path) for chain, path in alignments.items()}
        return found(record["path"]), alignments

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Keep other builds away from this cache for a while; the system ends it with the process.

        Raises:
            DataError: Another build is at work here.
        """
        path = self.folder / _LOCK
        with open(path, "a+b") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                file.seek(0)
                holder = file.read(200).decode(errors="replace") or "starting"
                raise DataError(
                    f"{self.folder}: another build is at work here ({holder}); "
                    "wait until it has ended, or build into another folder and merge"
                ) from error
            except OSError as error:
                raise DataError(
                    f"{path}: this file system has no locks ({error.strerror}); "
                    "build on another and copy the cache"
                ) from error
            file.truncate(0)
            file.write(f"process {os.getpid()} on {platform.node()}".encode())
            file.flush()
            yield

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

"""Several caches made into one, such as those of a build that was split over machines."""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from megafold.atomic import atomic_create
from megafold.data.building import BuildReport, EntryReport, index_record
from megafold.data.cache import Cache
from megafold.data.errors import DataError

_UNMERGED = "not merged yet: if no merge is at work, one was killed; merge again"


def merge_caches(sources: Iterable[str | Path], out: str | Path) -> BuildReport:
    """Bring what is in some caches into ``out``, made where there is none.

    Every input of every source is in ``out`` afterwards, with what became of it. A name that
    several have must be of the same content in all, but that an entry takes the place of one
    not built yet. Each entry is read whole and held against its checksum; a damaged one is
    listed as stale. The sources stay as they are.

    Raises:
        DataError: A source is not a cache, two of them disagree about a name (nothing is
            written then), or a build is at work in ``out``.
    """
    opened = [Cache(source) for source in sources]
    if not opened:
        raise DataError("no cache to merge")
    origin: dict[str, Cache] = {}
    target = Cache(out) if (Path(out) / "cache.json").exists() else None
    for source in [*([] if target is None else [target]), *opened]:
        for name in source.index:
            if name not in origin or _replaces(name, source, origin[name]):
                origin[name] = source
    target = Cache.create(out)
    with target.writing():
        reports = _merge(origin, target)
    return BuildReport(tuple(reports))


def _replaces(name: str, new: Cache, old: Cache) -> bool:
    """Whether the record of ``new`` is to be taken; an error where the two exclude each other."""
    one, two = old.index[name], new.index[name]
    if two["status"] == "stale" or (one["status"], one["key"]) == (two["status"], two["key"]):
        return False
    if one["status"] == "stale":
        return True
    raise DataError(
        f"{old.folder} and {new.folder} disagree about {name}: {_in_words(one)}, and "
        f"{_in_words(two)}. Build it again in one of them from the files that are right, or "
        "give it another name"
    )


def _in_words(record: dict[str, Any]) -> str:
    return f"{record['status']} from {record['path']}" + (
        f" ({record['key'][:12]})" if record["key"] else ""
    )


def _merge(origin: dict[str, Cache], target: Cache) -> list[EntryReport]:
    target.remove_leftovers()
    for name, source in origin.items():  # first of all, so that a killed merge misses none
        if source is not target and name not in target.index:
            path, files = source.inputs(name)
            report = EntryReport(name, str(path), "stale", _UNMERGED)
            target.index[name] = index_record(report, target.folder, path, files)
    target.save_index()
    reports = []
    try:
        for name, source in sorted(origin.items()):
            record = source.index[name]
            path, files = source.inputs(name)
            numbers = {key: record[key] for key in ("tokens", "atoms", "rows")}
            status, reason, reused = record["status"], record["reason"], False
            if status == "ok":
                try:
                    reused = _bring(record["key"], source, target)
                except DataError as error:
                    status, reason = "stale", str(error)
            key = record["key"] if status == "ok" else ""
            report = EntryReport(name, str(path), status, reason, key, reused, **numbers)
            reports.append(report)
            target.index[name] = index_record(report, target.folder, path, files)
    finally:
        target.save_index()
    return reports


def _bring(key: str, source: Cache, target: Cache) -> bool:
    """Copy an entry that is not there yet, in one step; True if it was there."""
    try:
        target.verify(key)
    except DataError:
        source.verify(key)
        path = source.entry_path(key)
        atomic_create(target.entry_path(key), lambda copy: shutil.copyfile(path, copy))
        return False
    return True

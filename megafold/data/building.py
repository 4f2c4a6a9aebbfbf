"""Building a cache from many structures: in parallel, past failures, with counts that add up."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from joblib import Parallel, delayed

from megafold.data.cache import Cache, cache_key
from megafold.data.errors import DataError, ExcludedError
from megafold.data.features import Features
from megafold.data.featurization import featurize
from megafold.data.layouts import find_alignments, missing_alignment, read_inputs
from megafold.data.read import SUFFIXES, read_structure, structure_name
from megafold.data.targets import target_fault

_SAVE_EVERY = 5.0  # seconds between writes of the index
_UNBUILT = "not built yet: if no build is at work, one was killed; build the cache again"
_CHANGED = "its inputs or the software have changed; build the cache again"
STATUSES = ("ok", "failed", "excluded", "stale")


@dataclass(frozen=True)
class EntryReport:
    """What became of one input."""

    name: str
    path: str
    status: str  # of STATUSES
    reason: str = ""  # of all but ok
    key: str = ""
    reused: bool = False  # it was in the cache already
    tokens: int = 0
    atoms: int = 0
    rows: int = 0  # of the alignment
    seconds: float = 0.0


@dataclass(frozen=True)
class BuildReport:
    """What became of all inputs.

    ``inputs == ok + failed + excluded``, and ``reused`` are among the ok. After a merge some may
    be stale, too.
    """

    entries: tuple[EntryReport, ...]  # in the order of the inputs

    @property
    def inputs(self) -> int:
        return len(self.entries)

    @property
    def ok(self) -> int:
        return sum(entry.status == "ok" for entry in self.entries)

    @property
    def failed(self) -> int:
        return sum(entry.status == "failed" for entry in self.entries)

    @property
    def excluded(self) -> int:
        return sum(entry.status == "excluded" for entry in self.entries)

    @property
    def stale(self) -> int:
        return sum(entry.status == "stale" for entry in self.entries)

    @property
    def reused(self) -> int:
        return sum(entry.reused for entry in self.entries)

    def __str__(self) -> str:
        lines = [
            one_line(f"{e.name}: {e.status}: {e.reason}") for e in self.entries if e.status != "ok"
        ]
        total = f"{self.inputs} inputs = {self.ok} ok ({self.reused} already there)"
        total += f" + {self.failed} failed"
        if self.excluded:
            total += f" + {self.excluded} excluded"
        if self.stale:
            total += f" + {self.stale} stale"
        return "\n".join([*lines, total])


def one_line(text: str) -> str:
    """Text as it can be printed: what a terminal cannot show, as in a Python string.

    File names may hold line ends, control characters and bytes that are no UTF-8.
    """
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def build_cache(
    structures: str | Path | Iterable[str | Path],
    out: str | Path,
    *,
    alignments: str | Path | None = None,
    targets_only: bool = False,
    jobs: int | None = None,
    progress: Callable[[EntryReport], object] | None = None,
) -> BuildReport:
    """Featurise structures into a cache. One bad input never stops the others.

    Args:
        structures: A folder of mmCIF, BinaryCIF or PDB files, or files and folders.
        out: The cache; made where there is none. What it has already is not made again.
        alignments: A folder with ``<name>_<chain>.a3m`` (``.gz`` or not), or of another layout
            (``megafold.data.layouts``). Then every distinct protein sequence needs one for one
            of its chains: a missing file is a failure. A protein without homologs has an a3m
            of one row.
        targets_only: Exclude what AlphaFold 3 does not train on (``target_fault``).
        jobs: Processes; None leaves it to joblib: one, or within
            ``joblib.parallel_config("dask")`` all workers of the Dask cluster.
        progress: Called with each report as it comes in.

    Raises:
        DataError: There is no input, two inputs have one name, two files are the alignment of
            one chain, ``out`` is not a cache, or another build is at work there.
    """
    paths = find_structures(structures)
    files: dict[str, dict[str, Path] | None] = dict.fromkeys(map(structure_name, paths))
    if alignments is not None:
        found = find_alignments(alignments)
        files = {name: found.get(name, {}) for name in files}
    cache = Cache.create(out)
    with cache.writing():
        return _build(cache, paths, files, targets_only, jobs, progress)


def _build(
    cache: Cache,
    paths: list[Path],
    files: Mapping[str, dict[str, Path] | None],
    targets_only: bool,
    jobs: int | None,
    progress: Callable[[EntryReport], object] | None,
) -> BuildReport:
    cache.remove_leftovers()
    for path in paths:  # first of all, so that none is missing from the index of a killed build
        unbuilt = EntryReport(structure_name(path), str(path), "stale", _UNBUILT)
        record = index_record(unbuilt, cache.folder, path, files[unbuilt.name])
        cache.index.setdefault(unbuilt.name, record)
    cache.save_index()
    worker = Cache(cache.folder.absolute())  # without the index, which workers do not need
    given = {structure_name(path): path for path in paths}
    tasks = (
        delayed(build_entry)(worker, path.absolute(), _absolute(files[name]), targets_only)
        for name, path in given.items()
    )
    reports: dict[str, EntryReport] = {}
    saved = time.monotonic()
    try:
        for found in Parallel(n_jobs=jobs, return_as="generator_unordered")(tasks):
            report = _as_given(found, given[found.name])
            reports[report.name] = report
            cache.index[report.name] = index_record(
                report, cache.folder, given[report.name], files[report.name]
            )
            if progress is not None:
                progress(report)
            if time.monotonic() - saved > _SAVE_EVERY:
                cache.save_index()
                saved = time.monotonic()
    finally:
        cache.save_index()
    return BuildReport(tuple(reports[name] for name in given))


def _as_given(report: EntryReport, path: Path) -> EntryReport:
    """A worker's report, with the files called as they were called here."""
    reason = report.reason
    if not path.is_absolute():
        reason = reason.replace(f"{os.getcwd()}{os.sep}", "")
    return replace(report, path=str(path), reason=reason)


def _absolute(files: Mapping[str, Path] | None) -> dict[str, Path] | None:
    """The same files for a worker, which may stand in another folder."""
    return None if files is None else {chain: path.absolute() for chain, path in files.items()}


def find_structures(structures: str | Path | Iterable[str | Path]) -> list[Path]:
    """The structure files named, those of folders included, sorted by name.

    Raises:
        DataError: There is none, one is missing, or two have one name.
    """
    given = [structures] if isinstance(structures, (str, Path)) else list(structures)
    endings = (*SUFFIXES, *(f"{suffix}.gz" for suffix in SUFFIXES))
    found: dict[str, Path] = {}
    for path in map(Path, given):
        is_folder = os.path.isdir(path)  # false for a name that none can have; Path.is_dir raises
        for file in path.iterdir() if is_folder else [path]:
            if is_folder and not file.name.endswith(endings):
                continue
            name = structure_name(file)
            if name in found:
                raise DataError(f"{file} and {found[name]} are both called {name}")
            found[name] = file
    if not found:
        where = ", ".join(map(str, given)) or "an empty list"
        raise DataError(f"{where}: no structure file ({', '.join(endings)})")
    return [found[name] for name in sorted(found)]


def build_entry(
    cache: Cache,
    path: Path,
    alignments: Mapping[str, Path] | None = None,
    targets_only: bool = False,
) -> EntryReport:
    """Featurise one structure into the cache; a failure is reported, not raised.

    Args:
        cache: Where to.
        path: The structure.
        alignments: Files as ``find_alignments`` gives them; None where none were asked for.
            Those of chains that cleaning took away are left aside.
        targets_only: Exclude what AlphaFold 3 does not train on.
    """
    name, begin = structure_name(path), time.perf_counter()
    try:
        if targets_only and (fault := target_fault(read_structure(path))):
            raise ExcludedError(f"{path}: no target for training: {fault}")
        key = cache_key(path, alignments)
        features, reused = _existing(cache, key), True
        if features is None:
            cache.put(key, _featurize(path, alignments))
            features, reused = cache.get(key), False  # shows that what was written can be read
    except Exception as error:
        reason = str(error) if isinstance(error, DataError) else f"{type(error).__name__}: {error}"
        status = "excluded" if isinstance(error, ExcludedError) else "failed"
        return EntryReport(name, str(path), status, reason, seconds=time.perf_counter() - begin)
    return EntryReport(
        name,
        str(path),
        "ok",
        key=key,
        reused=reused,
        tokens=features.num_tokens,
        atoms=features.num_atoms,
        rows=len(features.msa),
        seconds=time.perf_counter() - begin,
    )


def _existing(cache: Cache, key: str) -> Features | None:
    """The entry, or None where there is none or it is damaged: then it is made again."""
    try:
        return cache.verify(key)
    except DataError:
        return None


def _featurize(path: Path, alignments: Mapping[str, Path] | None) -> Features:
    structure = read_structure(path)
    if alignments is None:
        return featurize(structure)
    if chain := missing_alignment(structure, alignments):
        raise DataError(
            f"{path}: no alignment for protein chain {chain}: expected a file "
            f"{structure.name}_{chain}.a3m or .a3m.gz"
        )
    inputs = read_inputs(structure, alignments)
    return featurize(
        structure, inputs.alignments, to_pair=inputs.to_pair, templates=inputs.templates
    )


def examine_cache(folder: str | Path) -> list[EntryReport]:
    """Every input of a cache as ``ok``, ``failed``, ``excluded`` or ``stale``, by name.

    All but ok say why. Excluded is an input in good order of which cleaning left nothing. Stale
    is one that a killed build had not come to, an entry that is damaged, or one that its inputs
    as they are now would not give: a file has changed or is gone, or the software has.
    """
    cache = Cache(folder)
    reports = []
    for name, record in sorted(cache.index.items()):
        path, files = cache.inputs(name)
        numbers = {key: record[key] for key in ("tokens", "atoms", "rows")}
        report = EntryReport(
            name, str(path), record["status"], record["reason"], record["key"], **numbers
        )
        if report.status == "ok":
            try:
                cache.verify(report.key)
                why = "" if cache_key(path, files) == report.key else _CHANGED
            except DataError as error:
                why = str(error)
            if why:
                report = replace(report, status="stale", reason=why)
        reports.append(report)
    return reports


def index_record(
    report: EntryReport, folder: Path, path: Path, files: Mapping[str, Path] | None
) -> dict[str, object]:
    """A report as the index of the cache in ``folder`` keeps it; see ``Cache.inputs``."""
    names = ("status", "reason", "key", "tokens", "atoms", "rows")
    record: dict[str, object] = {name: getattr(report, name) for name in names}
    absolute = _absolute(files)
    return record | {
        "folder": os.path.abspath(folder),
        "path": os.path.abspath(path),
        "alignments": None if absolute is None else {c: str(p) for c, p in absolute.items()},
    }

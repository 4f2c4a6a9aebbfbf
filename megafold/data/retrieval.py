"""Alignments and templates of many structures by search; what was found once is kept.

Each search's result is a file named by the hash of everything it depends on: the sequence, the
database's bytes, the settings and HMMER's version. So a run that was interrupted goes on where
it was, a changed database is searched again, and equal chains are searched for once.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from importlib.metadata import version
from pathlib import Path

import numpy as np

from megafold.atomic import atomic_write
from megafold.data.alignment import Alignment, parse_alignment, read_text
from megafold.data.building import find_structures
from megafold.data.errors import DataError
from megafold.data.read import read_structure
from megafold.data.search import E_VALUE, Progress, search_a3m
from megafold.data.structure import PROTEIN, RNA, Chain, Structure
from megafold.data.template_hits import TemplateHit, latest_release
from megafold.data.template_search import find_templates, search_template_hits, write_templates

STORE = "searches"  # folder of results within the output


@dataclass(frozen=True)
class Databases:
    """FASTA files to search in; None leaves that search out."""

    proteins: Path | None = None  # such as UniRef90
    to_pair: Path | None = None  # proteins that name their organism, such as UniProt
    rna: Path | None = None  # such as RNAcentral
    templates: Path | None = None  # chains of known structures, pdb_seqres.txt
    structures: Path | None = None  # folder of the structures that templates come from


@dataclass
class RetrievalReport:
    """What a run did."""

    written: list[Path] = field(default_factory=list)
    searched: int = 0
    reused: int = 0  # searches whose result was there
    failed: dict[str, str] = field(default_factory=dict)  # structure file -> why
    notes: list[str] = field(default_factory=list)  # templates that were left out, and why

    def __str__(self) -> str:
        lines = [f"{name}: failed: {why}" for name, why in self.failed.items()]
        total = f"{len(self.written)} files written; {self.searched} searches made, "
        total += f"{self.reused} already there"
        if self.failed:
            total += f"; {len(self.failed)} structures failed"
        return "\n".join([*lines, total])


@dataclass(frozen=True)
class _Task:
    structure: Structure
    chain: Chain
    kind: str  # main, pair or templates
    database: Path


def retrieve(
    structures: str | Path | Sequence[str | Path],
    out: str | Path,
    databases: Databases,
    *,
    progress: Callable[[float, int], object] | None = None,
) -> RetrievalReport:
    """Search for every distinct protein and RNA of some structures.

    Writes ``NAME_CHAIN.a3m.gz``, ``NAME_CHAIN.pair.a3m.gz`` and ``NAME_CHAIN.templates.npz`` for
    the first chain of each entity, as ``megafold cache build --msa`` reads them. May be
    interrupted at any time: finished searches are kept, and the next run takes them over.

    Args:
        structures: Files and folders.
        out: Folder for the results; made where there is none.
        databases: Where to search.
        progress: Called with searches done (a fraction while one is at work) and their number.

    Raises:
        DataError: There is no structure, or a database cannot be read. What is wrong with one
            structure is in the report, and stops no other.
    """
    if databases.templates and (databases.structures is None or databases.proteins is None):
        raise DataError("templates need structures to take coordinates from, and an alignment")
    report, tasks = RetrievalReport(), []
    for path in find_structures(structures):
        try:
            tasks += list(_tasks(read_structure(path), databases))
        except DataError as error:
            report.failed[str(path)] = str(error)
    out = Path(out)
    for number, task in enumerate(tasks):
        told = None if progress is None else _counted(progress, number, len(tasks))
        report.written.append(_run(task, out, databases, report, told))
        if progress is not None:
            progress(number + 1, len(tasks))
    return report


def _counted(progress: Callable[[float, int], object], number: int, total: int) -> Progress:
    # Below the next whole number: a search counts when its result is kept.
    return lambda share: progress(number + min(share, 0.99), total)


def _tasks(structure: Structure, databases: Databases) -> Iterator[_Task]:
    seen: set[int] = set()
    for chain in structure.chains:
        if chain.entity_id in seen or chain.chain_type not in E_VALUE:
            continue
        seen.add(chain.entity_id)
        wanted = {
            "main": databases.proteins,
            "pair": databases.to_pair,
            "templates": databases.templates,
        }
        if chain.chain_type == RNA:
            wanted = {"main": databases.rna}
        for kind, database in wanted.items():
            if database is not None:
                yield _Task(structure, chain, kind, database)


def _run(
    task: _Task,
    out: Path,
    databases: Databases,
    report: RetrievalReport,
    progress: Progress | None,
) -> Path:
    chain = task.chain
    stem = f"{task.structure.name}_{chain.chain_id}"
    if task.kind == "templates":
        main = _search(chain, databases.proteins, out, report, None)
        hits = _template_hits(main, task.database, out, report, progress)
        templates = find_templates(
            hits,
            chain.sequence,
            databases.structures,
            latest=latest_release(task.structure.release_date),
            note=lambda why: report.notes.append(f"{stem}: {why}"),
        )
        return write_templates(out / f"{stem}.templates.npz", templates)
    text = _search(chain, task.database, out, report, progress)
    ending = ".pair.a3m.gz" if task.kind == "pair" else ".a3m.gz"
    return atomic_write(out / f"{stem}{ending}", text.encode())


def _search(
    chain: Chain,
    database: Path,
    out: Path,
    report: RetrievalReport,
    progress: Progress | None,
) -> str:
    """The text of an a3m file, kept or found now."""
    recipe = {
        "search": chain.chain_type,
        "sequence": chain.sequence,
        "database": _content(database),
        "e_value": E_VALUE[chain.chain_type],
    }
    path = _kept(recipe, out, ".a3m.gz")
    if path.is_file():
        report.reused += 1
        return read_text(path)
    text = search_a3m(chain.sequence, database, chain_type=chain.chain_type, progress=progress)
    atomic_write(path, text.encode())
    report.searched += 1
    return text


def _template_hits(
    alignment: str, database: Path, out: Path, report: RetrievalReport, progress: Progress | None
) -> list[TemplateHit]:
    recipe = {"search": "templates", "alignment": alignment, "database": _content(database)}
    path = _kept(recipe, out, ".json")
    if path.is_file():
        report.reused += 1
        rows = json.loads(path.read_text())
        return [
            TemplateHit(**{**row, **{key: np.array(row[key], dtype=np.int64)
                                     for key in ("rows", "template_rows")}})
            for row in rows
        ]  # fmt: skip
    parsed: Alignment = parse_alignment(alignment, PROTEIN)
    hits = search_template_hits(parsed, database, progress)
    rows = [
        asdict(hit) | {"rows": hit.rows.tolist(), "template_rows": hit.template_rows.tolist()}
        for hit in hits
    ]
    atomic_write(path, json.dumps(rows).encode())
    report.searched += 1
    return hits


def _kept(recipe: dict[str, object], out: Path, ending: str) -> Path:
    recipe = recipe | {"pyhmmer": version("pyhmmer")}
    key = hashlib.sha256(json.dumps(recipe, sort_keys=True).encode()).hexdigest()
    return out / STORE / f"{key}{ending}"


def _content(database: Path) -> str:
    """Hash of a database; read once as long as it does not change."""
    try:
        status = database.stat()
    except OSError as error:
        raise DataError(f"{database}: no such database: {error.strerror}") from error
    return _hash_of(database, status.st_size, status.st_mtime_ns)


@lru_cache(maxsize=16)
def _hash_of(database: Path, size: int, modified: int) -> str:
    with open(database, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()

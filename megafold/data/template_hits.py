"""Which known chains are like a query: hits of a template search, read or found, and filtered."""

from __future__ import annotations

import gzip
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import date, timedelta
from pathlib import Path

import numpy as np

from megafold.data.errors import DataError

# AlphaFold 3, supplement, section 2.4.
MIN_DAYS_BEFORE = 60
MAX_COVERAGE = 0.95  # of the query by a hit that repeats part of it
MIN_RESIDUES = 10
MIN_SHARE = 0.1  # of the query


@dataclass(frozen=True)
class TemplateHit:
    """One chain of a known structure, aligned to a query."""

    entry: str  # such as 1ABC
    chain: str  # as the author named it
    rows: np.ndarray  # [n] int64 places in the query, from 0, increasing
    template_rows: np.ndarray  # [n] int64 places in the chain's sequence, from 0, increasing
    residues: str  # the template's residues there, one-letter codes; empty where not known
    e_value: float

    @property
    def name(self) -> str:
        return f"{self.entry}_{self.chain}"

    def __repr__(self) -> str:
        return f"TemplateHit({self.name}: {len(self.rows)} residues, E-value {self.e_value:.2g})"


def read_template_hits(path: str | Path) -> list[TemplateHit]:
    """Hits in the order of a file.

    Args:
        path: HHsearch's ``.hhr``, or ``.m8``: BLAST's columns with a CIGAR string at the end, as
            MMseqs2 and ColabFold write it. ``.gz`` or not.

    Raises:
        DataError: The file is missing, damaged, or of another kind.
    """
    path = Path(path)
    kind = Path(path.name.removesuffix(".gz")).suffix
    if kind not in (".hhr", ".m8"):
        raise DataError(f"{path}: expected template hits as .hhr or .m8 (or + .gz)")
    if not path.is_file():
        raise DataError(f"{path}: no such file of template hits")
    try:
        with (gzip.open if path.suffix == ".gz" else open)(path, "rb") as file:
            text = file.read().decode("ascii")
        return parse_hhr(text) if kind == ".hhr" else parse_m8(text)
    except (EOFError, OSError, ValueError) as error:
        raise DataError(f"{path}: truncated or not {kind}: {error}") from error


def parse_m8(text: str) -> list[TemplateHit]:
    """Hits of a table in BLAST's format; the thirteenth column is the alignment."""
    hits = []
    for number, line in enumerate(text.splitlines(), start=1):
        if not line.strip():
            continue
        fields = line.split("\t")
        if len(fields) < 13:
            raise ValueError(f"line {number} has {len(fields)} columns, expected 13 with a CIGAR")
        entry, chain = split_name(fields[1])
        rows, there = _from_cigar(fields[12], int(fields[6]) - 1, int(fields[8]) - 1)
        if (rows[-1], there[-1]) != (int(fields[7]) - 1, int(fields[9]) - 1):
            raise ValueError(f"line {number}: {fields[12]} does not end where the columns say")
        hits.append(TemplateHit(entry, chain, rows, there, "", float(fields[10])))
    return hits


def parse_hhr(text: str) -> list[TemplateHit]:
    """Hits of HHsearch: each ``No`` block has the query's and the template's row in pieces."""
    hits = []
    for block in re.split(r"^No \d+\s*$", text, flags=re.MULTILINE)[1:]:
        name = re.search(r"^>(\S+)", block, re.MULTILINE)
        value = re.search(r"E-value=(\S+)", block)
        query = _hhr_rows(block, "Q")
        template = _hhr_rows(block, "T")
        if not (name and value and query and template):
            raise ValueError(f"hit {len(hits) + 1} has no name, E-value or alignment")
        entry, chain = split_name(name[1])
        rows, there, residues = aligned_places(query[1], template[1], query[0], template[0])
        hits.append(TemplateHit(entry, chain, rows, there, residues, float(value[1])))
    if not hits:
        raise ValueError("no hit in it")
    return hits


def _hhr_rows(block: str, side: str) -> tuple[int, str] | None:
    """First place (from 0) and aligned letters of one side of a hit."""
    pattern = rf"^{side} (?!ss_|Consensus)\S+ +(\d+) ([A-Za-z-]+) +\d+ \(\d+\)"
    parts = re.findall(pattern, block, re.MULTILINE)
    return (int(parts[0][0]) - 1, "".join(row for _, row in parts)) if parts else None


def split_name(name: str) -> tuple[str, str]:
    """Entry and chain of a name such as ``1abc_A``.

    Raises:
        ValueError: It is none.
    """
    entry, _, chain = name.partition("_")
    if not entry or not chain:
        raise ValueError(f"{name!r} does not name an entry and a chain, such as 1ABC_A")
    return entry.upper(), chain


def aligned_places(
    query: str, template: str, query_start: int, template_start: int
) -> tuple[np.ndarray, np.ndarray, str]:
    """Places of both sides where neither has a gap, and the template's residues there."""
    letters = np.array([list(query), list(template)])
    here, there = letters != "-"
    both = here & there
    rows = query_start + np.cumsum(here) - 1
    template_rows = template_start + np.cumsum(there) - 1
    return rows[both], template_rows[both], "".join(letters[1, both]).upper()


def _from_cigar(cigar: str, query: int, template: int) -> tuple[np.ndarray, np.ndarray]:
    """Aligned places; ``I`` are residues of the query, ``D`` of the template."""
    if not re.fullmatch(r"(\d+[MID])+", cigar):
        raise ValueError(f"{cigar!r} is no CIGAR string")
    rows, there = [], []
    for count, operation in re.findall(r"(\d+)([MID])", cigar):
        n = int(count)
        if operation == "M":
            rows.append(np.arange(query, query + n))
            there.append(np.arange(template, template + n))
        query += n if operation != "D" else 0
        template += n if operation != "I" else 0
    if not rows:
        raise ValueError(f"{cigar!r} aligns no residue")
    return np.concatenate(rows), np.concatenate(there)


def hit_fault(hit: TemplateHit, query: str) -> str | None:
    """Why a hit is no template for a query sequence, or None. The release is not looked at."""
    count = len(hit.rows)
    if count < MIN_RESIDUES:
        return f"{count} aligned residues, fewer than {MIN_RESIDUES}"
    if count < MIN_SHARE * len(query):
        return f"{count} aligned residues, less than {MIN_SHARE:.0%} of the query's {len(query)}"
    same = hit.residues == "".join(query[row] for row in hit.rows)
    if same and count > MAX_COVERAGE * len(query):
        return f"the query itself: identical over {count / len(query):.0%} of it"
    return None


def release_fault(released: str, latest: str | None) -> str | None:
    """Why a template's release is too late, or None.

    Args:
        released: ISO date of the template, empty where unknown.
        latest: The last date allowed; None allows all.
    """
    if latest is None:
        return None
    if not released:
        return f"no release date, and only those until {latest} are allowed"
    return f"released {released}, after {latest}" if released > latest else None


def latest_release(example: str) -> str | None:
    """The last date of templates for an example released then: 60 days before. ISO dates.

    None where the example has no date, such as one that is to be predicted.
    """
    if not example:
        return None
    return (date.fromisoformat(example) - timedelta(days=MIN_DAYS_BEFORE)).isoformat()


def filter_hits(
    hits: Sequence[TemplateHit], query: str, note: Callable[[str], object] | None = None
) -> list[TemplateHit]:
    """The hits that may be templates, by E-value; ``note`` is told why each other may not."""
    kept = []
    for hit in sorted(hits, key=lambda hit: hit.e_value):
        fault = hit_fault(hit, query)
        if fault is None:
            kept.append(hit)
        elif note is not None:
            note(f"{hit.name}: {fault}")
    return kept

"""Multiple sequence alignments: reading them, and what the model is told about them."""

from __future__ import annotations

import gzip
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from megafold.data.constants import GAP, NUM_RESTYPES, RESTYPE_INDEX, UNKNOWN_PROTEIN
from megafold.data.errors import DataError
from megafold.data.species import species_of
from megafold.data.stockholm import stockholm_to_a3m
from megafold.data.structure import DNA, PROTEIN, RNA

MAX_ROWS = 16_384  # of one chain's alignment, the query included (supplement, section 2.3)

_GAP = RESTYPE_INDEX[GAP]
_AMINO_ACIDS = "ARNDCQEGHILKMFPSTWYV"
# B, Z and J are read as AlphaFold reads them: as aspartate, glutamate and unknown;
# selenocysteine as cysteine, pyrrolysine as unknown.
_LETTERS = {
    PROTEIN: {
        **{letter: i for i, letter in enumerate(_AMINO_ACIDS)},
        **dict.fromkeys("XJO", RESTYPE_INDEX[UNKNOWN_PROTEIN]),
        "B": RESTYPE_INDEX["ASP"], "Z": RESTYPE_INDEX["GLU"], "U": RESTYPE_INDEX["CYS"],
    },
    RNA: {**{c: RESTYPE_INDEX[c] for c in "AGCU"}, "T": RESTYPE_INDEX["U"]},
    DNA: {c: RESTYPE_INDEX["D" + c] for c in "AGCT"},
}  # fmt: skip
_UNKNOWN = {PROTEIN: RESTYPE_INDEX["UNK"], RNA: RESTYPE_INDEX["N"], DNA: RESTYPE_INDEX["DN"]}


@dataclass(frozen=True)
class Alignment:
    """M aligned sequences over the L residues of one chain. Row 0 is the query."""

    msa: np.ndarray  # [M, L] uint8, class of constants.RESTYPES
    deletions: np.ndarray  # [M, L] uint8, residues left out before this one, at most 255
    descriptions: tuple[str, ...]  # [M]
    source: str  # the file it was read from, or what made it
    # [M], what rows of several chains are paired by; empty for the query and where unknown
    species: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not self.species:
            known = (species_of(text) for text in self.descriptions[1:])
            object.__setattr__(self, "species", ("", *known))

    def __len__(self) -> int:
        return len(self.msa)

    @cached_property
    def profile(self) -> np.ndarray:
        """Distribution of classes in each column. [L, 32] float32."""
        counts = np.stack([(self.msa == c).sum(axis=0) for c in range(NUM_RESTYPES)], axis=-1)
        return (counts / len(self.msa)).astype(np.float32)

    @cached_property
    def deletion_mean(self) -> np.ndarray:
        """Mean number of deletions before each column. [L] float32."""
        return self.deletions.mean(axis=0, dtype=np.float64).astype(np.float32)

    def __repr__(self) -> str:
        return f"Alignment({len(self)} rows, {self.msa.shape[1]} columns, from {self.source})"


def query_alignment(sequence: str, chain_type: str = PROTEIN) -> Alignment:
    """The alignment of a sequence that has no other: the query alone."""
    row = _encode(sequence, chain_type, "query")
    return Alignment(row[None], np.zeros_like(row)[None], ("query",), "the query alone")


def read_alignment(
    path: str | Path,
    chain_type: str = PROTEIN,
    max_rows: int = MAX_ROWS,
    *,
    keep_repeats: bool = False,
) -> Alignment:
    """Read an alignment, its first ``max_rows`` rows.

    In a3m, upper case and ``-`` are columns; lower case are residues the query does not have,
    kept as a count before the next column; ``.`` is ignored. In Stockholm, columns are the
    residues of the first row. Rows that repeat an earlier one are left out, as AlphaFold does.

    Args:
        path: a3m (``.a3m``) or Stockholm (``.sto``), ``.gz`` or not.
        chain_type: protein, rna or dna.
        max_rows: At most so many.
        keep_repeats: Keep rows that repeat an earlier one, such as of other species.

    Raises:
        DataError: The file is missing, empty or not of its kind, or its rows differ in length.
    """
    text = read_text(path)
    if Path(path).name.removesuffix(".gz").endswith(".sto"):
        text = stockholm_to_a3m(text, str(path))
    return parse_alignment(text, chain_type, max_rows, source=str(path), keep_repeats=keep_repeats)


def read_text(path: str | Path) -> str:
    """The text of an alignment file, ``.gz`` or not.

    Raises:
        DataError: It is missing, truncated or no text.
    """
    path = Path(path)
    if not path.is_file():
        raise DataError(f"{path}: no such alignment")
    try:
        opener = gzip.open if path.suffix == ".gz" else open
        with opener(path, "rb") as file:
            return file.read().decode("ascii")
    except (EOFError, OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: truncated or not an alignment: {error}") from error


def parse_alignment(
    text: str,
    chain_type: str = PROTEIN,
    max_rows: int = MAX_ROWS,
    *,
    source: str = "text",
    keep_repeats: bool = False,
) -> Alignment:
    """The same for the text of an a3m file."""
    if chain_type not in _LETTERS:
        raise DataError(f"{source}: alignment of a {chain_type}; of {', '.join(_LETTERS)} only")
    rows, deletions, descriptions, seen = [], [], [], set()
    width = None
    for description, aligned in _entries(text, source):
        columns, counts = _split(aligned)
        width = len(columns) if width is None else width
        if len(columns) != width:
            raise DataError(
                f"{source}: row {description!r} has {len(columns)} columns, the query {width}"
            )
        if columns in seen and not keep_repeats:
            continue
        seen.add(columns)
        rows.append(_encode(columns, chain_type, f"{source}: row {description!r}"))
        deletions.append(counts)
        descriptions.append(description)
        if len(rows) == max_rows:
            break
    return Alignment(np.stack(rows), np.stack(deletions), tuple(descriptions), source)


def merge_alignments(alignments: Sequence[Alignment], max_rows: int = MAX_ROWS) -> Alignment:
    """Several alignments of one query, one below the other, repeated rows left out.

    Raises:
        DataError: Their queries differ.
    """
    first = alignments[0]
    rows, seen = [], set()
    for number, alignment in enumerate(alignments):
        if not np.array_equal(alignment.msa[0], first.msa[0]):
            raise DataError(f"{alignment.source} and {first.source} have different queries")
        for row in range(len(alignment)):
            if (key := alignment.msa[row].tobytes()) not in seen:
                seen.add(key)
                rows.append((number, row))
    rows = rows[:max_rows]
    return Alignment(
        np.stack([alignments[n].msa[row] for n, row in rows]),
        np.stack([alignments[n].deletions[row] for n, row in rows]),
        tuple(alignments[n].descriptions[row] for n, row in rows),
        ", ".join(alignment.source for alignment in alignments),
        tuple(alignments[n].species[row] for n, row in rows),
    )


def _entries(text: str, source: str) -> list[tuple[str, str]]:
    """(description, aligned sequence) of each entry of a FASTA-like text."""
    text = text.replace("\0", "")  # some tools end an alignment with NUL
    if not text.lstrip().startswith(">"):
        raise DataError(f"{source}: not an a3m alignment: it must start with '>'")
    entries = []
    for part in text.lstrip()[1:].split("\n>"):
        head, _, body = part.partition("\n")
        aligned = "".join(body.split())
        if not aligned:
            raise DataError(f"{source}: row {head.strip()!r} has no sequence")
        entries.append((head.strip(), aligned))
    return entries


def _split(aligned: str) -> tuple[str, np.ndarray]:
    """Columns of an a3m row, and how many residues were left out before each. [L] uint8."""
    codes = np.frombuffer(aligned.encode(), dtype=np.uint8)
    codes = codes[codes != ord(".")]
    lower = (codes >= ord("a")) & (codes <= ord("z"))
    before = np.cumsum(lower)[~lower]
    counts = np.diff(before, prepend=0)
    return codes[~lower].tobytes().decode(), np.minimum(counts, 255).astype(np.uint8)


def _table(chain_type: str) -> np.ndarray:
    """Class of each ASCII code; 255 where it is none. [128] uint8."""
    table = np.full(128, 255, dtype=np.uint8)
    for letter in "ABCDEFGHIJKLMNOPQRSTUVWXYZ":
        table[ord(letter)] = _LETTERS[chain_type].get(letter, _UNKNOWN[chain_type])
    table[ord("-")] = _GAP
    return table


def _encode(columns: str, chain_type: str, where: str) -> np.ndarray:
    codes = _table(chain_type)[np.frombuffer(columns.encode(), dtype=np.uint8) & 127]
    if (codes == 255).any():
        letter = columns[int(np.flatnonzero(codes == 255)[0])]
        raise DataError(f"{where}: {letter!r} is no residue of an alignment")
    return codes

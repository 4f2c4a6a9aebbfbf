"""Alignments by search: jackhmmer in process, against a FASTA file."""

from __future__ import annotations

from pathlib import Path

import pyhmmer

from megafold.data.alignment import MAX_ROWS, Alignment, parse_alignment
from megafold.data.errors import DataError
from megafold.data.structure import PROTEIN

_LETTERS = frozenset("ACDEFGHIKLMNPQRSTVWYBJOUXZ")


def search_alignment(
    sequence: str,
    database: str | Path,
    *,
    iterations: int = 1,
    e_value: float = 1e-4,
    max_rows: int = MAX_ROWS,
) -> Alignment:
    """Find the homologs of a protein and align them to it.

    The defaults are AlphaFold 3's for jackhmmer (supplement, section 2.2). Runs on one core.

    Args:
        sequence: One-letter codes of the query.
        database: FASTA file of protein sequences, not compressed.
        iterations: Rounds of search; each round searches with what the last one found.
        e_value: Of a hit, and for taking part in the next round.
        max_rows: Keep the best ones only, the query included.

    Returns:
        The query first, then the hits by increasing E-value; rows that repeat an earlier one
        left out. A query without homologs gives an alignment of one row.

    Raises:
        DataError: The sequence is empty or no protein, or the database cannot be read.
    """
    text = search_a3m(sequence, database, iterations=iterations, e_value=e_value)
    return parse_alignment(text, PROTEIN, max_rows, source=f"jackhmmer of {Path(database).name}")


def search_a3m(
    sequence: str, database: str | Path, *, iterations: int = 1, e_value: float = 1e-4
) -> str:
    """The same search, as the text of an a3m file."""
    sequence = sequence.upper()
    if not sequence or (strange := set(sequence) - _LETTERS):
        what = f"has letters {sorted(strange)}" if sequence else "is empty"
        raise DataError(f"the query sequence {what}; expected one-letter codes of a protein")
    alphabet = pyhmmer.easel.Alphabet.amino()
    query = pyhmmer.easel.TextSequence(name="query", sequence=sequence).digitize(alphabet)
    try:
        with pyhmmer.easel.SequenceFile(str(database), digital=True, alphabet=alphabet) as file:
            targets = file.read_block()
    except (OSError, EOFError, ValueError) as error:
        raise DataError(f"{database}: not a FASTA file of proteins: {error}") from error
    if len(targets) == 0:
        raise DataError(f"{database}: no sequence in it")
    (result,) = pyhmmer.jackhmmer(
        query, targets, max_iterations=iterations, cpus=1,
        E=e_value, domE=e_value, incE=e_value, incdomE=e_value,
    )  # fmt: skip
    return _to_a3m(result.msa, sequence)


def _to_a3m(msa: pyhmmer.easel.MSA, sequence: str) -> str:
    """Rows with the query's residues as columns, what stands between them in lower case."""
    rows = [row.upper().replace(".", "-") for row in msa.textize().alignment]
    is_column = [letter != "-" for letter in rows[0]]
    lines, seen = [], set()
    for name, row in zip(msa.names, rows, strict=True):
        aligned = "".join(
            letter if column else letter.lower()
            for letter, column in zip(row, is_column, strict=True)
            if column or letter != "-"
        )
        if aligned not in seen:
            seen.add(aligned)
            lines.append(f">{name if isinstance(name, str) else name.decode()}\n{aligned}\n")
    if lines[0].split("\n")[1] != sequence:
        raise RuntimeError("jackhmmer did not return the query as the first row")
    return "".join(lines)

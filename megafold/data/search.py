"""Alignments by search in process, with HMMER's jackhmmer and nhmmer, against a FASTA file.

The database is read piece by piece, so that it may be larger than memory and a search can be
interrupted between two pieces.
"""

from __future__ import annotations

import gzip
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pyhmmer
from pyhmmer.easel import Alphabet, DigitalSequence, DigitalSequenceBlock, SequenceFile
from pyhmmer.plan7 import HMM, Builder, LongTargetsPipeline, Pipeline, TopHits, Trace

from megafold.data.alignment import MAX_ROWS, Alignment, parse_alignment
from megafold.data.errors import DataError
from megafold.data.structure import PROTEIN, RNA

# What AlphaFold 3 gives jackhmmer and nhmmer (supplement, section 2.2).
E_VALUE = {PROTEIN: 1e-4, RNA: 1e-3}
_FILTERS = {"F1": 5e-4, "F2": 5e-5, "F3": 5e-7}
_RNA_FILTER, _SHORT_RNA_FILTER, _SHORT_RNA = 1e-5, 0.02, 50

_LETTERS = {PROTEIN: frozenset("ACDEFGHIKLMNPQRSTVWYBJOUXZ"), RNA: frozenset("ACGUTN")}
_PIECE = 5_000_000  # residues read at a time

Progress = Callable[[float], object]  # told the share of the database that was searched


def search_alignment(
    sequence: str,
    database: str | Path,
    *,
    chain_type: str = PROTEIN,
    iterations: int = 1,
    e_value: float | None = None,
    max_rows: int = MAX_ROWS,
    progress: Progress | None = None,
) -> Alignment:
    """Find the homologs of a protein or RNA and align them to it.

    Proteins by jackhmmer, RNA by nhmmer; the defaults are AlphaFold 3's. Runs on one core.

    Args:
        sequence: One-letter codes of the query.
        database: FASTA file of sequences of the same kind, ``.gz`` or not.
        chain_type: ``protein`` or ``rna``.
        iterations: Rounds of search; each searches with what the last one found. RNA has one.
        e_value: Of a hit, and for taking part in the next round; None takes 1e-4 for a protein
            and 1e-3 for RNA.
        max_rows: Keep the best ones only, the query included.
        progress: Called with the share searched, from 0 to 1, as it grows.

    Returns:
        The query first, then the hits by increasing E-value; rows that repeat an earlier one
        left out. A query without homologs gives an alignment of one row.

    Raises:
        DataError: The sequence is empty or of another kind, or the database cannot be read.
    """
    text = search_a3m(
        sequence,
        database,
        chain_type=chain_type,
        iterations=iterations,
        e_value=e_value,
        progress=progress,
    )
    tool = "jackhmmer" if chain_type == PROTEIN else "nhmmer"
    return parse_alignment(text, chain_type, max_rows, source=f"{tool} of {Path(database).name}")


def search_a3m(
    sequence: str,
    database: str | Path,
    *,
    chain_type: str = PROTEIN,
    iterations: int = 1,
    e_value: float | None = None,
    progress: Progress | None = None,
) -> str:
    """The same search, as the text of an a3m file."""
    if chain_type not in _LETTERS:
        raise DataError(f"search for a {chain_type}; expected {' or '.join(_LETTERS)}")
    sequence = sequence.upper()
    if not sequence or (strange := set(sequence) - _LETTERS[chain_type]):
        what = f"has letters {sorted(strange)}" if sequence else "is empty"
        raise DataError(
            f"the query sequence {what}; expected one-letter codes of "
            f"{'a protein' if chain_type == PROTEIN else 'RNA'}"
        )
    e_value = E_VALUE[chain_type] if e_value is None else e_value
    alphabet = alphabet_of(chain_type)
    query = pyhmmer.easel.TextSequence(name="query", sequence=sequence).digitize(alphabet)
    if chain_type == RNA:
        return _search_rna(query, sequence, Path(database), e_value, progress)
    return _search_protein(query, sequence, Path(database), iterations, e_value, progress)


def alphabet_of(chain_type: str) -> Alphabet:
    """HMMER's alphabet of a kind of polymer."""
    return Alphabet.amino() if chain_type == PROTEIN else Alphabet.rna()


def pieces(
    database: Path, alphabet: Alphabet, progress: Progress | None = None
) -> Iterator[DigitalSequenceBlock]:
    """The sequences of a FASTA file, some at a time.

    Raises:
        DataError: The file is missing, empty or not FASTA.
    """
    kind = "proteins" if alphabet.is_amino() else "nucleic acids"
    read, total = 0, count_sequences(database)
    try:
        with _opened(database) as raw, SequenceFile(raw, digital=True, alphabet=alphabet) as file:
            while len(block := file.read_block(residues=_PIECE)):
                yield block
                read += len(block)
                if progress is not None:
                    progress(min(1.0, read / total))
    except (OSError, EOFError, ValueError) as error:
        raise DataError(f"{database}: not a FASTA file of {kind}: {error}") from error


def count_sequences(database: Path) -> int:
    """How many sequences a FASTA file has.

    Raises:
        DataError: The file is missing, damaged, or has none.
    """
    try:
        with _opened(database) as file:
            number = sum(line.startswith(b">") for line in file)
    except (OSError, EOFError) as error:
        raise DataError(f"{database}: not a FASTA file: {error}") from error
    if number == 0:
        raise DataError(f"{database}: no sequence in it")
    return number


@contextmanager
def _opened(database: Path) -> Iterator:
    with (gzip.open if database.suffix == ".gz" else open)(database, "rb") as file:
        yield file


def search_profile(
    hmm: HMM, pipeline: Pipeline, database: Path, progress: Progress | None = None
) -> TopHits:
    """Search a database piece by piece with a pipeline that knows its size (``Z``)."""
    found = []
    for block in pieces(database, hmm.alphabet, progress):
        found.append(pipeline.search_hmm(hmm, block))
        pipeline.clear()
    hits = found[0].merge(*found[1:]) if len(found) > 1 else found[0]
    hits.sort(by="key")
    return hits


def _search_protein(
    query: DigitalSequence,
    sequence: str,
    database: Path,
    iterations: int,
    e_value: float,
    progress: Progress | None,
) -> str:
    """jackhmmer: the first round with a profile of the query, the others with one of the hits."""
    alphabet = query.alphabet
    builder, background = Builder(alphabet), pyhmmer.plan7.Background(alphabet)
    limits = dict.fromkeys(("E", "domE", "incE", "incdomE"), e_value)
    pipeline = Pipeline(alphabet, Z=count_sequences(database), **_FILTERS, **limits)
    hmm, _, _ = builder.build(query, background)
    known: set[str] = set()
    for i in range(iterations):
        share = None if progress is None else _part(progress, i, iterations)
        hits = search_profile(hmm, pipeline, database, share)
        msa = hits.to_msa(
            alphabet,
            sequences=[query],
            traces=[Trace.from_sequence(query)],
            all_consensus_cols=True,
            digitize=True,
        )
        msa.name = "query"
        names = {_text(hit.name) for hit in hits.included}
        if i + 1 == iterations or names <= known:
            break
        known |= names
        hmm, _, _ = builder.build_msa(msa, background)
    if progress is not None:
        progress(1.0)
    return _to_a3m(msa, sequence)


def _part(progress: Progress, i: int, of: int) -> Progress:
    return lambda share: progress((i + share) / of)


def _search_rna(
    query: DigitalSequence,
    sequence: str,
    database: Path,
    e_value: float,
    progress: Progress | None,
) -> str:
    """nhmmer, the given strand only; hits as they are aligned to the query's profile."""
    alphabet = query.alphabet
    hmm, _, _ = Builder(alphabet).build(query, pyhmmer.plan7.Background(alphabet))
    last = _SHORT_RNA_FILTER if len(sequence) < _SHORT_RNA else _RNA_FILTER
    residues = sum(len(s) for block in pieces(database, alphabet) for s in block)
    pipeline = LongTargetsPipeline(
        alphabet, strand="watson", F3=last, E=e_value, incE=e_value, Z=residues / 1e6
    )
    found = []
    for block in pieces(database, alphabet, progress):
        for hit in pipeline.search_hmm(hmm, block):
            found += [
                (domain.i_evalue, _text(hit.name), domain.alignment)
                for domain in hit.domains
                if domain.i_evalue <= e_value
            ]
        pipeline.clear()
    lines = [f">query\n{sequence}\n"]
    for _, name, aligned in sorted(found, key=lambda hit: hit[:2]):
        row = "".join(
            base.lower() if column == "." else base.upper()
            for column, base in zip(aligned.hmm_sequence, aligned.target_sequence, strict=True)
        )
        before, after = aligned.hmm_from - 1, len(sequence) - aligned.hmm_to
        where = f"{name}/{aligned.target_from}-{aligned.target_to}"
        lines.append(f">{where}\n{'-' * before}{row}{'-' * after}\n")
    return "".join(lines)


def _text(name: str | bytes) -> str:
    return name if isinstance(name, str) else name.decode()


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
            lines.append(f">{re.sub('/+', '/', _text(name))}\n{aligned}\n")
    if lines[0].split("\n")[1] != sequence:
        raise RuntimeError("jackhmmer did not return the query as the first row")
    return "".join(lines)

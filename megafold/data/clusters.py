"""Clusters of sequences: at 40 % identity, with MMseqs2 where it is installed.

Without it every two sequences are aligned by the Smith-Waterman algorithm (biotite, BLOSUM62,
gaps of 11 and 1), and the longest are made representatives first, as MMseqs2 and CD-HIT do. Both
count identity over the columns of the alignment, which must cover 80 % of both sequences.
"""

from __future__ import annotations

import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path

from megafold.data.errors import DataError

IDENTITY = 0.4  # supplement, section 2.5.3
COVERAGE = 0.8
MAX_ALIGNED = 5000  # sequences; beyond, aligning every two takes hours


def cluster_sequences(sequences: Iterable[str], method: str | None = None) -> dict[str, str]:
    """The representative of each distinct protein sequence.

    Args:
        sequences: One-letter codes, X where unknown.
        method: ``mmseqs`` or ``alignment``; None takes ``clustering_method()``.

    Raises:
        DataError: MMseqs2 fails, or there are more sequences than can be aligned without it.
    """
    distinct = sorted(set(sequences), key=lambda s: (-len(s), s))
    return _METHODS[method or clustering_method()](distinct)


def clustering_method() -> str:
    """``mmseqs`` where MMseqs2 is on the path, else ``alignment``."""
    return "alignment" if shutil.which("mmseqs") is None else "mmseqs"


def _by_mmseqs(sequences: list[str]) -> dict[str, str]:
    if not sequences:
        return {}
    with tempfile.TemporaryDirectory() as folder:
        fasta, out = Path(folder, "sequences.fasta"), Path(folder, "out")
        fasta.write_text("".join(f">{i}\n{s}\n" for i, s in enumerate(sequences)))
        command = ["mmseqs", "easy-cluster", fasta, out, Path(folder, "work")]
        command += ["--min-seq-id", str(IDENTITY), "-c", str(COVERAGE), "--cov-mode", "0"]
        run = subprocess.run(list(map(str, command)), capture_output=True, text=True)
        if run.returncode != 0:
            raise DataError(f"mmseqs easy-cluster failed: {run.stderr or run.stdout}")
        pairs = Path(f"{out}_cluster.tsv").read_text().split()
    found = {
        sequences[int(member)]: sequences[int(representative)]
        for representative, member in zip(pairs[::2], pairs[1::2], strict=True)
    }
    if len(found) != len(sequences):
        raise DataError(f"mmseqs clustered {len(found)} of {len(sequences)} sequences")
    return found


def _by_alignment(sequences: list[str]) -> dict[str, str]:
    if len(sequences) > MAX_ALIGNED:
        raise DataError(
            f"{len(sequences)} distinct protein sequences: aligning every two takes hours. "
            "Install MMseqs2 (conda install -c bioconda mmseqs2), which is found on the path"
        )
    found: dict[str, str] = {}
    representatives: list[str] = []
    for sequence in sequences:  # the longest first
        near = (
            one
            for one in representatives
            if len(sequence) >= COVERAGE * len(one) and are_similar(one, sequence)
        )
        found[sequence] = next(near, sequence)
        if found[sequence] == sequence:
            representatives.append(sequence)
    return found


def are_similar(one: str, other: str) -> bool:
    """Whether two sequences have 40 % identity over an alignment that covers 80 % of both."""
    from biotite.sequence import ProteinSequence
    from biotite.sequence.align import SubstitutionMatrix, align_optimal

    matrix = SubstitutionMatrix.std_protein_matrix()
    a, b = ProteinSequence(one), ProteinSequence(other)
    (best,) = align_optimal(a, b, matrix, gap_penalty=(-11, -1), local=True, max_number=1)
    trace = best.trace  # [columns, 2], -1 in a gap
    if len(trace) == 0:
        return False
    spans = trace.max(axis=0) - trace[0] + 1
    if spans[0] < COVERAGE * len(one) or spans[1] < COVERAGE * len(other):
        return False
    pairs = trace[(trace >= 0).all(axis=1)]
    identical = (a.code[pairs[:, 0]] == b.code[pairs[:, 1]]).sum()
    return bool(identical >= IDENTITY * len(trace))


_METHODS: dict[str, Callable[[list[str]], dict[str, str]]] = {
    "mmseqs": _by_mmseqs,
    "alignment": _by_alignment,
}

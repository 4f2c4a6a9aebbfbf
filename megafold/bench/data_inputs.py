"""What the data pipeline is measured on: real structures and alignments, made deep."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megafold.atomic import atomic_write
from megafold.data.alignment import Alignment, read_alignment
from megafold.data.errors import DataError
from megafold.data.features import Features
from megafold.data.featurization import featurize
from megafold.data.layouts import find_alignments
from megafold.data.read import read_structure, structure_name
from megafold.data.structure import POLYMERS, Structure
from megafold.data.tokens import LETTERS


@dataclass(frozen=True)
class Input:
    """A structure file and an alignment file for some of its chains."""

    name: str
    structure: Path
    alignments: Mapping[str, Path]
    rows: int  # of the deepest alignment
    made_up_rows: int
    left_out: tuple[str, ...]  # why an alignment was

    def read(self) -> Structure:
        return read_structure(self.structure)

    def read_alignments(self, structure: Structure) -> dict[str, Alignment]:
        types = {chain.chain_id: chain.chain_type for chain in structure.chains}
        return {c: read_alignment(path, types[c]) for c, path in self.alignments.items()}

    def features(self) -> Features:
        """Everything made afresh."""
        structure = self.read()
        return featurize(structure, self.read_alignments(structure))


def prepare_input(structure: Path, alignments: Path, folder: Path, rows: int) -> Input:
    """An input whose alignments have ``rows`` rows, as a3m files in ``folder``.

    Those of a shallower alignment are its own and recombinations of two of them, for which
    another measure of depth is not at hand. An alignment that does not fit its chain is left
    out, with the reason.

    Args:
        structure: An mmCIF file, or what else ``read_structure`` takes.
        alignments: A folder of ``<name>_<chain>.a3m[.gz]``.
        folder: Where the deepened alignments go.
        rows: Depth, the query included.

    Raises:
        DataError: The structure cannot be read, or no alignment fits it.
    """
    parsed, name = read_structure(structure), structure_name(structure)
    types = {chain.chain_id: chain.chain_type for chain in parsed.chains}
    paths, left_out, depth = {}, [], 0
    for chain, path in find_alignments(alignments).get(name, {}).items():
        try:
            if types.get(chain) not in POLYMERS:
                raise DataError(f"{path}: {name} has no polymer chain {chain}")
            real = read_alignment(path, types[chain])
            featurize(parsed, {chain: real})  # says whether it fits
        except DataError as error:
            left_out.append(str(error))
            continue
        depth = max(depth, min(len(real), rows))
        target = folder / f"{name}_{chain}.a3m.gz"
        paths[chain] = atomic_write(target, _to_a3m(deepen(real, rows)).encode())
    if not paths:
        raise DataError(f"{alignments}: no alignment for {name}. {' '.join(left_out)}".strip())
    return Input(name, Path(structure), paths, rows, rows - depth, tuple(left_out))


def deepen(alignment: Alignment, rows: int) -> Alignment:
    """The first ``rows`` rows; missing ones begin as one row and go on as another."""
    rng = np.random.default_rng(0)
    msa, deletions = alignment.msa[:rows], alignment.deletions[:rows]
    missing = rows - len(msa)
    if missing > 0:
        first, second = rng.integers(0, len(msa), (2, missing))
        cut = rng.integers(1, msa.shape[1], missing)
        left = np.arange(msa.shape[1]) < cut[:, None]
        msa = np.concatenate([msa, np.where(left, msa[first], msa[second])])
        deletions = np.concatenate([deletions, np.where(left, deletions[first], deletions[second])])
    made_up = (f"made_up_{i}" for i in range(missing))
    names = (*alignment.descriptions[:rows], *made_up)
    return Alignment(msa, deletions, names, f"{alignment.source}, made deeper")


def _to_a3m(alignment: Alignment) -> str:
    letters = np.array(list(LETTERS))
    lines = []
    for name, row, counts in zip(
        alignment.descriptions, letters[alignment.msa], alignment.deletions, strict=True
    ):
        if counts.any():
            row = [f"{'x' * n}{letter}" for letter, n in zip(row, counts.tolist(), strict=True)]
        lines.append(f">{name}\n{''.join(row)}")
    return "\n".join(lines) + "\n"

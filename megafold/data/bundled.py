"""The bundled real entries (``data/samples`` of a checkout)."""

from __future__ import annotations

import csv
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megafold.data.alignment import Alignment, read_alignment
from megafold.data.batch import Batch, make_batch
from megafold.data.cropping import crop as crop_features
from megafold.data.errors import DataError
from megafold.data.features import Features
from megafold.data.featurization import featurize
from megafold.data.read import read_structure
from megafold.data.structure import DNA, LIGAND, PROTEIN, RNA
from megafold.data.tokens import tokenize


@dataclass(frozen=True)
class Sample:
    """One row of ``data/samples/index.csv``. Counts are of the first biological assembly,
    cleaned; a test holds them equal to what the parser finds."""

    id: str
    title: str
    method: str
    chains: int
    protein_residues: int
    rna_residues: int
    dna_residues: int
    ligands: str  # component ids, each once
    modified: str  # modified residues, each once
    tokens: int
    atoms: int
    resolved_atoms: int
    alignments: str  # chain ids that have an alignment


def samples_directory() -> Path:
    """``data/samples`` of the checkout that this package runs from.

    The samples are data of the repository, not of the wheel.

    Raises:
        DataError: The package was installed without a checkout around it.
    """
    directory = Path(__file__).resolve().parents[2] / "data" / "samples"
    if not (directory / "index.csv").is_file():
        raise DataError(
            f"{directory}: no bundled samples here. They come with a checkout of the repository "
            "(git clone, then pip install -e .); for your own entries use read_structure(path)"
        )
    return directory


def samples() -> list[Sample]:
    """The bundled entries, smallest first."""
    with open(samples_directory() / "index.csv", newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    types = {"int": int, "str": str}
    fields = Sample.__annotations__
    return [
        Sample(**{name: types[kind](row[name]) for name, kind in fields.items()}) for row in rows
    ]


def sample_path(sample_id: str) -> Path:
    """The mmCIF file of a bundled entry."""
    known = {sample.id for sample in samples()}
    if sample_id.upper() not in known:
        raise DataError(f"no bundled sample {sample_id!r}; there are {', '.join(sorted(known))}")
    return samples_directory() / f"{sample_id.upper()}.cif.gz"


def sample_alignments(sample_id: str) -> dict[str, Path]:
    """The a3m file of each chain of a bundled entry that has one, by chain id."""
    sample_path(sample_id)
    folder = samples_directory() / "alignments"
    found = sorted(folder.glob(f"{sample_id.upper()}_*.a3m.gz"))
    return {path.name.removesuffix(".a3m.gz").split("_", 1)[1]: path for path in found}


def describe_sample(sample_id: str) -> Sample:
    """The row of the index, worked out from the entry itself."""
    structure = read_structure(sample_path(sample_id))
    tokens, layout = tokenize(structure), structure.layout
    residues = layout.chain_type[structure.residue_starts]
    polymer = layout.chain_type != LIGAND

    def names(rows: np.ndarray) -> str:
        return " ".join(sorted(set(layout.residue_name[rows].tolist())))

    return Sample(
        id=structure.name,
        title=structure.title,
        method=structure.method,
        chains=len(structure.chains),
        protein_residues=int((residues == PROTEIN).sum()),
        rna_residues=int((residues == RNA).sum()),
        dna_residues=int((residues == DNA).sum()),
        ligands=names(~polymer),
        modified=names(polymer & layout.is_hetero),
        tokens=len(tokens),
        atoms=len(layout),
        resolved_atoms=int(structure.resolved.sum()),
        alignments=" ".join(sample_alignments(sample_id)),
    )


def example_features(sample_id: str) -> Features:
    """The features of a bundled entry, with its alignments."""
    structure = read_structure(sample_path(sample_id))
    types = {chain.chain_id: chain.chain_type for chain in structure.chains}
    alignments: dict[str, Alignment] = {
        chain: read_alignment(path, types[chain])
        for chain, path in sample_alignments(sample_id).items()
    }
    return featurize(structure, alignments)


def example_batch(sample_id: str, crop: int | None = None, seed: int = 0) -> Batch:
    """A bundled entry all the way to a batch.

    Args:
        sample_id: For example ``1A8O``; ``samples()`` lists them.
        crop: At most so many tokens; None takes the whole entry.
        seed: Of the crop and of the batch's random part.
    """
    generator = np.random.default_rng(seed)
    whole = features = example_features(sample_id)
    if crop is not None:
        features = crop_features(features, crop, generator=generator)
    return make_batch(features, generator=generator, whole=whole)

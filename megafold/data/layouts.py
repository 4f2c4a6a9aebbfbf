"""Folders of alignments, as different programs leave them: which file is of which chain.

| what | where |
|---|---|
| one file a chain | ``NAME_CHAIN.a3m`` or ``.sto`` |
| rows to pair, templates | ``NAME_CHAIN.pair.a3m`` or ``.sto``, ``NAME_CHAIN.templates.npz`` |
| OpenProteinSet | a folder ``NAME_CHAIN`` with ``uniref90_hits.a3m`` and others, also in ``a3m/`` |
| ColabFold | ``NAME.a3m`` of the whole complex, its first line ``#lengths<TAB>copies`` |
| its server | folders ``NAME_env`` with ``uniref.a3m``, ``NAME_pairgreedy`` with ``pair.a3m`` |

Alignments may end in ``.gz``. Hits of templates (``.hhr``, ``.m8``) are no templates before they
have coordinates: see ``template_hits.read_template_hits`` and ``template_search.find_templates``.
"""

from __future__ import annotations

import gzip
import itertools
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from megafold.data.alignment import Alignment, merge_alignments, parse_alignment, read_alignment
from megafold.data.alignment import read_text as read_alignment_text
from megafold.data.errors import DataError
from megafold.data.msa_features import chain_sequence
from megafold.data.structure import POLYMERS, PROTEIN, Structure
from megafold.data.template_chains import Template
from megafold.data.template_search import read_templates

_ENDINGS = (".a3m", ".sto")
_PAIR, _TEMPLATES, _COMPLEX = "pair", "templates", "*"
# In the order in which AlphaFold reads them; of UniProt's search only pairs are taken.
_DATABASES = (
    "uniref90_hits", "bfd_uniclust_hits", "bfd_uniref_hits", "small_bfd_hits", "mgnify_hits",
)  # fmt: skip
_TO_PAIR = "uniprot_hits"
_SERVER = ("uniref.a3m", "bfd.mgnify30.metaeuk30.smag30.a3m")

Files = dict[str, Path]  # which chain, and what of it -> file


@dataclass(frozen=True)
class ChainInputs:
    """What ``featurize`` takes beside a structure, each by chain id."""

    alignments: dict[str, Alignment] = field(default_factory=dict)
    to_pair: dict[str, Alignment] = field(default_factory=dict)
    templates: dict[str, list[Template]] = field(default_factory=dict)


def find_alignments(folder: str | Path) -> dict[str, Files]:
    """Files of a folder by the structure's name, then by chain id and what they are.

    Raises:
        DataError: There is no such folder, or two files are the same of one chain, such as
            ``X_A.a3m`` beside ``X_A.a3m.gz``: which one is meant cannot be known.
    """
    if not Path(folder).is_dir():
        raise DataError(f"{folder}: no such folder of alignments")
    found: dict[str, Files] = {}
    for name, key, path in _files(Path(folder)):
        other = found.setdefault(name, {}).setdefault(key, path)
        if other != path:
            chain = key.partition(":")[0]
            what = f"chain {chain} of {name}" if chain != _COMPLEX else name
            raise DataError(f"{other} and {path} are both of {what}")
    return found


def _files(folder: Path) -> Iterator[tuple[str, str, Path]]:
    for path in sorted(folder.iterdir()):
        name, ending = _stem(path)
        if path.is_dir():
            yield from _folder(path)
        elif name.endswith(f".{_TEMPLATES}") and ending == ".npz":
            structure, _, chain = name.removesuffix(f".{_TEMPLATES}").rpartition("_")
            if structure:
                yield structure, f"{chain}:{_TEMPLATES}", path
        elif ending in _ENDINGS:
            what = f":{_PAIR}" if name.endswith(f".{_PAIR}") else ""
            structure, _, chain = name.removesuffix(f".{_PAIR}").rpartition("_")
            if ending == ".a3m" and not what and _is_complex(path):
                yield name, _COMPLEX, path
            elif structure:
                yield structure, f"{chain}{what}", path


def _folder(folder: Path) -> Iterator[tuple[str, str, Path]]:
    """The files of OpenProteinSet's or ColabFold's folder of one chain or one complex."""
    if folder.name.endswith("_env"):
        name = folder.name.removesuffix("_env")
        for file in _SERVER:
            if (folder / file).is_file():
                yield name, f"{_COMPLEX}:{file}", folder / file
        return
    if folder.name.endswith("_pairgreedy"):
        if (folder / "pair.a3m").is_file():
            name = folder.name.removesuffix("_pairgreedy")
            yield name, f"{_COMPLEX}:{_PAIR}", folder / "pair.a3m"
        return
    name, _, chain = folder.name.rpartition("_")
    for place in (folder, folder / "a3m"):
        for path in sorted(place.iterdir()) if name and place.is_dir() else []:
            stem, ending = _stem(path)
            if ending in _ENDINGS and stem in _DATABASES:
                yield name, f"{chain}:{stem}", path
            elif ending in _ENDINGS and stem == _TO_PAIR:
                yield name, f"{chain}:{_PAIR}", path


def _stem(path: Path) -> tuple[str, str]:
    inner = Path(path.name.removesuffix(".gz"))
    return inner.stem, inner.suffix


def _is_complex(path: Path) -> bool:
    """Whether the first line says how long the chains of a complex are, as ColabFold's does."""
    try:
        with (gzip.open if path.suffix == ".gz" else open)(path, "rb") as file:
            return file.read(1) == b"#"
    except (OSError, EOFError):
        return False  # it is found to be damaged where it is read


def read_inputs(structure: Structure, files: Mapping[str, Path]) -> ChainInputs:
    """Read what ``find_alignments`` found for a structure.

    Files of chains that cleaning took away are left aside. ColabFold's, which do not name chains,
    go to the chains whose sequence is their query.

    Raises:
        DataError: A file is damaged, or a query of ColabFold's is of no chain.
    """
    types = {chain.chain_id: chain.chain_type for chain in structure.chains}
    inputs = ChainInputs()
    parts: dict[str, dict[str, Alignment]] = {}
    for key, path in files.items():
        chain, _, what = key.partition(":")
        if chain == _COMPLEX:
            _add_colabfold(structure, what, path, inputs, parts)
        elif chain not in types:
            continue
        elif what == _TEMPLATES:
            inputs.templates[chain] = read_templates(path)
        elif what == _PAIR:
            inputs.to_pair[chain] = read_alignment(path, types[chain], keep_repeats=True)
        else:
            parts.setdefault(chain, {})[what] = read_alignment(path, types[chain])
    for chain, found in parts.items():
        order = sorted(found, key=lambda what: (_rank(what), what))
        whole = [found[what] for what in order]
        inputs.alignments[chain] = whole[0] if len(whole) == 1 else merge_alignments(whole)
    return inputs


def _rank(what: str) -> int:
    names = ("", *_DATABASES, *_SERVER)
    return names.index(what) if what in names else len(names)


def _add_colabfold(
    structure: Structure,
    what: str,
    path: Path,
    inputs: ChainInputs,
    parts: dict[str, dict[str, Alignment]],
) -> None:
    """Give the chains of a structure their share of one of ColabFold's files."""
    text = read_alignment_text(path)
    if what == "":
        pairs = _split_complex(text, str(path))
    elif what == _PAIR:
        pairs = [(None, _by_row(block, str(path))) for block in _server_blocks(text)]
    else:
        pairs = [(parse_alignment(block, source=str(path)), None) for block in _server_blocks(text)]
    for own, to_pair in pairs:
        chain = _chain_of(structure, own or to_pair, path)
        if own is not None:
            parts.setdefault(chain, {})[what] = own
        if to_pair is not None:
            inputs.to_pair[chain] = to_pair


def _server_blocks(text: str) -> list[str]:
    """One a3m for each query; the server ends each with NUL."""
    return [block for block in text.split("\0") if block.strip()]


def _chain_of(structure: Structure, alignment: Alignment, path: Path) -> str:
    for chain in structure.chains:
        if chain.chain_type in POLYMERS and np.array_equal(chain_sequence(chain), alignment.msa[0]):
            return chain.chain_id
    raise DataError(
        f"{path}: the query {alignment.descriptions[0]!r} of {alignment.msa.shape[1]} residues is "
        f"no chain of {structure.name}"
    )


def _by_row(text: str, source: str) -> Alignment:
    """Rows that pair with the rows at the same place of the other chains."""
    alignment = parse_alignment(text, source=source, keep_repeats=True)
    species = ("", *(f"row {i}" for i in range(1, len(alignment))))
    return Alignment(alignment.msa, alignment.deletions, alignment.descriptions, source, species)


def _split_complex(text: str, source: str) -> list[tuple[Alignment, Alignment]]:
    """Chains of ColabFold's alignment of a complex: own rows, and rows to pair.

    The first line has the length of each distinct chain and its number of copies. Rows with
    residues in more than one chain are pairs; the others are of the one that they have.
    """
    first, _, body = text.partition("\n")
    header = re.fullmatch(r"#(\d+(?:,\d+)*)\t(\d+(?:,\d+)*)\s*", first)
    if not header:
        raise DataError(f"{source}: {first[:40]!r} is not #lengths<TAB>copies")
    ends = np.cumsum([int(length) for length in header[1].split(",")]).tolist()
    own: list[list[str]] = [[] for _ in ends]
    pairs: list[list[str]] = [[] for _ in ends]
    for number, entry in enumerate(part for part in body.split(">")[1:] if part.strip()):
        name, _, sequence = entry.partition("\n")
        pieces = _cut(sequence.replace("\n", "").strip(), ends, f"{source}: row {name[:40]!r}")
        there = [i for i, piece in enumerate(pieces) if piece.strip("-")]
        for i in there:
            row = f">{name}\n{pieces[i]}\n"
            if number == 0:
                own[i].append(row)
                pairs[i].append(f">{name}\n{pieces[i]}\n")
            elif len(there) > 1:
                pairs[i].append(f">row={number} {name}\n{pieces[i]}\n")
            else:
                own[i].append(row)
    chains = []
    for mine, paired in zip(own, pairs, strict=True):
        alignment = parse_alignment("".join(paired), source=source, keep_repeats=True)
        labels = (re.match(r"row=(\d+) ", text) for text in alignment.descriptions)
        species = tuple(f"row {label[1]}" if label else "" for label in labels)
        to_pair = Alignment(
            alignment.msa, alignment.deletions, alignment.descriptions, source, species
        )
        chains.append((parse_alignment("".join(mine), source=source), to_pair))
    return chains


def _cut(row: str, ends: list[int], where: str) -> list[str]:
    """Cut a row of a3m where the chains end; insertions go to the residue before them."""
    places = [i for i, letter in enumerate(row) if not letter.islower() and letter != "."]
    if len(places) != ends[-1]:
        raise DataError(f"{where} has {len(places)} columns, the chains have {ends[-1]}")
    starts = [0, *(places[end] for end in ends[:-1]), len(row)]
    return [row[a:b] for a, b in itertools.pairwise(starts)]


def missing_alignment(structure: Structure, files: Mapping[str, Path]) -> str | None:
    """The first protein chain whose entity has no alignment among ``files``; None if all have."""
    if any(key.startswith(_COMPLEX) for key in files):
        return None  # read_inputs and featurize say what does not fit
    chains = {key.partition(":")[0] for key in files if not key.endswith(f":{_TEMPLATES}")}
    covered = {c.entity_id for c in structure.chains if c.chain_id in chains}
    for chain in structure.chains:
        if chain.chain_type == PROTEIN and chain.entity_id not in covered:
            return chain.chain_id
    return None

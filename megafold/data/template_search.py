"""Templates by search: HMMER's hmmbuild and hmmsearch against the sequences of known structures.

As in AlphaFold 3 (supplement, section 2.4): a profile of the chain's alignment, found chains
filtered by release, coverage and length, their coordinates laid along the query.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyhmmer
from biotite.structure import AtomArray
from biotite.structure.io import pdbx
from pyhmmer.plan7 import HMM, Builder, Pipeline

from megafold.atomic import atomic_create
from megafold.data.alignment import Alignment
from megafold.data.blocks import SUFFIXES, read_block, structure_name
from megafold.data.errors import DataError
from megafold.data.read import release_date
from megafold.data.search import Progress, count_sequences, search_profile
from megafold.data.structure import PROTEIN
from megafold.data.template_chains import BACKBONE, MAX_STORED, Template, template_from_chain
from megafold.data.template_hits import (
    TemplateHit,
    aligned_places,
    filter_hits,
    hit_fault,
    release_fault,
    split_name,
)
from megafold.data.tokens import LETTERS, restype_class

# AlphaFold 3 lets nearly everything through hmmsearch: the filters come after it.
_FILTERS = dict.fromkeys(("F1", "F2", "F3"), 0.1)
_E_VALUES = dict.fromkeys(("E", "domE", "incE", "incdomE"), 100.0)
_FIELDS = ("restype", "pseudo_beta", "pseudo_beta_mask", "backbone", "backbone_mask")

Note = Callable[[str], object]  # told what was left out, and why


def search_template_hits(
    alignment: Alignment, database: str | Path, progress: Progress | None = None
) -> list[TemplateHit]:
    """Known chains that fit the profile of an alignment, unfiltered, by E-value.

    Args:
        alignment: Of a protein, the query first.
        database: FASTA file of the chains of known structures, named ``1abc_A``, such as the
            archive's ``pdb_seqres.txt``. Those that say ``mol:`` and not ``mol:protein`` are no
            proteins, and never fit.
        progress: Told the share searched, from 0 to 1.

    Raises:
        DataError: The database cannot be read, or a hit's name is not an entry and a chain.
    """
    hmm = _profile(alignment)
    pipeline = Pipeline(
        hmm.alphabet, Z=count_sequences(Path(database)), **_FILTERS, **_E_VALUES
    )  # fmt: skip
    hits = []
    for hit in search_profile(hmm, pipeline, Path(database), progress):
        name = hit.name if isinstance(hit.name, str) else hit.name.decode()
        description = hit.description or ""
        if isinstance(description, bytes):
            description = description.decode()
        if "mol:" in description and "mol:protein" not in description:
            continue
        aligned = hit.best_domain.alignment
        query = aligned.hmm_sequence.replace(".", "-")
        rows, there, residues = aligned_places(
            query, aligned.target_sequence, aligned.hmm_from - 1, aligned.target_from - 1
        )
        try:
            entry, chain = split_name(name)
        except ValueError as error:
            raise DataError(f"{database}: {error}") from error
        hits.append(TemplateHit(entry, chain, rows, there, residues, float(hit.evalue)))
    return sorted(hits, key=lambda hit: hit.e_value)


def _profile(alignment: Alignment) -> HMM:
    """hmmbuild with a match state for every residue of the query, so that places agree."""
    alphabet = pyhmmer.easel.Alphabet.amino()
    letters = np.array(list(LETTERS))
    sequences = [
        pyhmmer.easel.TextSequence(name=f"row{i}", sequence="".join(letters[row]))
        for i, row in enumerate(alignment.msa)
    ]
    msa = pyhmmer.easel.TextMSA(name="query", sequences=sequences).digitize(alphabet)
    builder = Builder(alphabet, symfrac=0.0)
    hmm, _, _ = builder.build_msa(msa, pyhmmer.plan7.Background(alphabet))
    if alignment.msa.shape[1] != hmm.M:
        raise RuntimeError(f"a profile of {hmm.M} states for {alignment.msa.shape[1]} residues")
    return hmm


def find_templates(
    hits: Iterable[TemplateHit],
    query: str,
    structures: str | Path,
    *,
    latest: str | None = None,
    max_templates: int = MAX_STORED,
    note: Note | None = None,
) -> list[Template]:
    """The templates that pass all filters, the best first.

    Args:
        hits: As found or read.
        query: Sequence of the chain, L residues.
        structures: Folder of the entries, ``1abc.cif`` and the like, in any case of letters.
        latest: Last date of release allowed, ISO 8601; see ``latest_release``.
        max_templates: So many at most; 20 are what training draws from.
        note: Told of each hit that is left out, and why; those beyond ``max_templates`` are not.
    """
    files = _structure_files(Path(structures))
    templates: list[Template] = []
    for hit in filter_hits(list(hits), query, note):
        if len(templates) == max_templates:
            break
        try:
            path = files.get(hit.entry.lower())
            if path is None:
                raise DataError(f"{hit.name}: no file of {hit.entry} in {structures}")
            templates.append(template_of_hit(hit, query, path, latest))
        except DataError as error:
            if note is not None:
                note(str(error))
    return templates


def template_of_hit(
    hit: TemplateHit, query: str, path: str | Path, latest: str | None = None
) -> Template:
    """The coordinates of a hit, laid along the query.

    Raises:
        DataError: The file cannot be read, has no such chain or another sequence there, or the
            hit may not be used.
    """
    block = read_block(path)
    if fault := release_fault(release_date(block), latest):
        raise DataError(f"{hit.name}: {fault}")
    names, atoms = chain_residues(block, hit.chain, path)
    restype = np.array([restype_class(name, PROTEIN) for name in names], dtype=np.uint8)
    if len(hit.template_rows) and int(hit.template_rows.max()) >= len(names):
        raise DataError(
            f"{hit.name}: aligned up to residue {int(hit.template_rows.max()) + 1}, but chain "
            f"{hit.chain} of {path} has {len(names)}"
        )
    found = "".join(LETTERS[c] for c in restype[hit.template_rows])
    if hit.residues and any(
        a != b for a, b in zip(hit.residues, found, strict=True) if "X" not in (a, b)
    ):
        raise DataError(f"{hit.name}: its sequence is not that of chain {hit.chain} in {path}")
    if fault := hit_fault(replace(hit, residues=found), query):
        raise DataError(f"{hit.name}: {fault}")
    return template_from_chain(hit.name, len(query), hit.rows, hit.template_rows, restype, atoms)


def chain_residues(
    block: pdbx.CIFBlock, chain: str, where: str | Path
) -> tuple[list[str], dict[str, np.ndarray]]:
    """Components of a protein chain, and its backbone's coordinates, of the first model.

    Args:
        block: A structure file.
        chain: As the author named it, or else as mmCIF does.
        where: The file, for messages.

    Returns:
        Component of each of K residues, unresolved ones included, and coordinates [K, 3] of N,
        CA, C and CB, NaN where unresolved.

    Raises:
        DataError: There is no such polymer chain.
    """
    try:
        atoms = pdbx.get_structure(
            block, model=1, altloc="occupancy", use_author_fields=False,
            extra_fields=["auth_asym_id", "label_entity_id"],
        )  # fmt: skip
        atoms = atoms[atoms.res_id > 0]
        mine = atoms[atoms.auth_asym_id == chain]
        if len(mine) == 0:
            mine = atoms[atoms.chain_id == chain]
        if len(mine) == 0:
            raise DataError(f"{where}: no polymer chain {chain}")
        mine = mine[mine.chain_id == mine.chain_id[0]]
        names = _sequence(block, str(mine.label_entity_id[0]), mine)
    except DataError:
        raise
    except Exception as error:  # biotite raises whatever the malformed table led to
        raise DataError(f"{where}: truncated or malformed mmCIF: {error}") from error
    coordinates = {}
    for atom in (*BACKBONE, "CB"):
        rows = np.full((len(names), 3), np.nan, dtype=np.float32)
        there = mine[mine.atom_name == atom]
        rows[there.res_id - 1] = there.coord
        coordinates[atom] = rows
    return names, coordinates


def _sequence(block: pdbx.CIFBlock, entity: str, atoms: AtomArray) -> list[str]:
    seen = dict(zip(atoms.res_id.tolist(), atoms.res_name.tolist(), strict=True))
    full: dict[int, str] = {}
    if "entity_poly_seq" in block:
        table = block["entity_poly_seq"]
        columns = (table[name].as_array(str).tolist() for name in ("entity_id", "num", "mon_id"))
        full = {int(number): name for e, number, name in zip(*columns, strict=True) if e == entity}
    full |= seen
    return [full.get(number, "UNK") for number in range(1, max(full) + 1)]


def _structure_files(folder: Path) -> dict[str, Path]:
    """Entry in small letters -> file."""
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder of template structures")
    endings = tuple(ending for suffix in SUFFIXES for ending in (suffix, f"{suffix}.gz"))
    return {
        structure_name(path).lower(): path
        for path in sorted(folder.iterdir())
        if path.name.endswith(endings)
    }


def write_templates(path: str | Path, templates: list[Template]) -> Path:
    """Write the templates of one chain as a ``.npz`` file; the same give the same bytes."""
    arrays = {"names": np.array([t.name for t in templates], dtype="U64")}
    arrays |= {
        f"{name}_{i}": getattr(template, name)
        for i, template in enumerate(templates)
        for name in _FIELDS
    }

    def write(temporary: Path) -> None:
        with open(temporary, "wb") as file:
            np.savez_compressed(file, **arrays)

    return atomic_create(Path(path), write)


def read_templates(path: str | Path) -> list[Template]:
    """What ``write_templates`` wrote. No pickle is ever loaded.

    Raises:
        DataError: The file is missing or damaged.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            names = file["names"].tolist()
            return [
                Template(name=name, **{field: file[f"{field}_{i}"] for field in _FIELDS})
                for i, name in enumerate(names)
            ]
    except Exception as error:  # zipfile, numpy: whatever the damage led to
        raise DataError(f"{path}: damaged or no file of templates: {error}") from error

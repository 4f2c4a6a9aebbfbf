"""PDB format: gemmi reads it and says it again as mmCIF, from where everything goes one way.

What the old format leaves to the reader, gemmi works out: which residues of SEQRES are those with
coordinates, entities, the assembly of REMARK 350, bonds of LINK.
"""

from __future__ import annotations

import itertools
import string
from datetime import datetime

import gemmi

SUFFIXES = (".pdb", ".ent")


def pdb_to_mmcif(content: bytes) -> str:
    """The text of a PDB file as mmCIF.

    A polymer chain keeps its name; each ligand, ion and water next to it has a free one. A chain
    without SEQRES is as long as what was seen of it.

    Raises:
        ValueError: There is no atom in it, or it is cut.
    """
    text = content.decode("ascii", errors="replace")
    records = {line[:6].rstrip() for line in text.splitlines()}
    if not records & {"ATOM", "HETATM"}:
        raise ValueError("no ATOM or HETATM record: no atoms")
    if "HEADER" in records and "END" not in records:
        raise ValueError("it has a HEADER but no END: the end of the file is missing")
    structure = gemmi.read_pdb_string(text)
    structure.setup_entities()
    _fill_sequences(structure)
    structure.assign_label_seq_id()
    _name_subchains(structure)
    document = structure.make_mmcif_document()
    block = document.sole_block()
    if structure.resolution > 0:
        block.set_pair("_refine.ls_d_res_high", f"{structure.resolution:g}")
    if date := _release_date(text):
        block.set_pair("_database_PDB_rev.date", date)
    return document.as_string()


def _release_date(text: str) -> str:
    """Date of the first revision; HEADER has that of the deposition only."""
    dates = []
    for line in text.splitlines():
        if line.startswith("REVDAT") and line[13:22].strip():
            dates.append(datetime.strptime(line[13:22], "%d-%b-%y").date().isoformat())
    return min(dates, default="")


def _fill_sequences(structure: gemmi.Structure) -> None:
    """Give entities without SEQRES the residues that are there."""
    for chain in structure[0]:
        polymer = chain.get_polymer()
        entity = structure.get_entity_of(polymer) if len(polymer) else None
        if entity is not None and not entity.full_sequence:
            entity.full_sequence = polymer.extract_sequence()


def _name_subchains(structure: gemmi.Structure) -> None:
    """Name molecules as mmCIF does; gemmi's own names would show in every output."""
    taken = {chain.name for model in structure for chain in model}
    letters = string.ascii_uppercase
    free = (
        "".join(name)
        for size in itertools.count(1)
        for name in itertools.product(letters, repeat=size)
        if "".join(name) not in taken
    )
    names: dict[str, str] = {}
    for model in structure:
        for chain in model:
            polymers = {residue.subchain for residue in chain.get_polymer()}
            for residue in chain:
                old = residue.subchain
                if old not in names:
                    names[old] = chain.name if old in polymers else next(free)
                residue.subchain = names[old]
    for entity in structure.entities:
        entity.subchains = [names[old] for old in entity.subchains if old in names]

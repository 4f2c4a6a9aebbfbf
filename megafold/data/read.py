"""Structure files to ``Structure``.

Done, after AlphaFold 3 (supplement, section 2.1): first model; first biological assembly;
alternative locations by largest occupancy; MSE as MET; waters, hydrogens and components of
unknown chemistry removed; crystallisation aids removed from crystal structures; arginine's
NH1 and NH2 named by distance; the full sequence kept, unresolved residues included; leaving
atoms removed; polymer chains of unknown residues, of fewer than 4 resolved residues, and
protein chains with a gap over 10 A between neighbours removed; clashing chains removed.

Keeping at most 20 chains of a large assembly is a random choice, and so part of the crop.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
from biotite.structure import AtomArray
from biotite.structure.io import pdbx

from megafold.data.assemble import assemble
from megafold.data.blocks import SUFFIXES, check_complete, read_block, structure_name
from megafold.data.drafts import Link, LinkEnd, Tables
from megafold.data.errors import DataError
from megafold.data.structure import Structure

__all__ = ["SUFFIXES", "read_structure", "structure_name"]

# Along x, y or z, in angstrom: some times the largest assembly. Beyond it a digit is wrong, and
# the cells in which neighbours are looked for would take more memory than there is.
MAX_EXTENT = 5000


def read_structure(path: str | Path) -> Structure:
    """Read and clean one entry.

    Args:
        path: mmCIF text (``.cif``, ``.mmcif``), BinaryCIF (``.bcif``) or PDB format (``.pdb``,
            ``.ent``), ``.gz`` or not.

    Raises:
        DataError: The file is missing, truncated or not what its name says, or names a
            component that the dictionary does not have.
        ExcludedError: It has nothing left after cleaning.
    """
    path = Path(path)
    block = read_block(path)
    try:
        check_complete(block)
        atoms, tables = _read_atoms(block), _read_tables(block)
    except Exception as error:  # biotite raises whatever the malformed table led to
        raise DataError(f"{path}: truncated or malformed mmCIF: {error}") from error
    try:
        return assemble(structure_name(path), atoms, tables)
    except DataError as error:
        raise type(error)(f"{path}: {error}") from error


def _read_atoms(block: Any) -> AtomArray:
    """First model, first assembly, one location per atom; annotated with ``sym_id``."""
    site = block["atom_site"]
    extra = [f for f in ("label_entity_id", "auth_seq_id", "occupancy") if f in site]
    for name in ("Cartn_x", "Cartn_y", "Cartn_z"):
        if site[name].mask is not None:  # an atom that is nowhere; biotite puts it at zero
            site[name] = site[name].as_array(np.float32, np.nan)
    options = {"model": 1, "altloc": "occupancy", "extra_fields": extra}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if "pdbx_struct_assembly_gen" in block and "pdbx_struct_oper_list" in block:
            atoms = pdbx.get_assembly(block, use_author_fields=False, **options)
        else:
            atoms = pdbx.get_structure(block, use_author_fields=False, **options)
            atoms.set_annotation("sym_id", np.zeros(len(atoms), dtype=int))
    for name, default in (("label_entity_id", "1"), ("auth_seq_id", "1")):
        if name not in atoms.get_annotation_categories():
            atoms.set_annotation(name, np.full(len(atoms), default))
    if "occupancy" not in atoms.get_annotation_categories():
        atoms.set_annotation("occupancy", np.ones(len(atoms)))
    atoms = atoms[np.isfinite(atoms.coord).all(axis=-1)]
    if len(atoms) == 0:
        raise DataError("no atom has coordinates")
    extent = float(np.ptp(atoms.coord.astype(np.float64), axis=0).max())
    if extent > MAX_EXTENT:
        raise DataError(f"atoms {extent:.3g} angstrom apart, at most {MAX_EXTENT} is possible")
    return atoms


def _first(block: Any, category: str, column: str) -> str | None:
    """First value of a column, None where it is absent, ``?`` or ``.``."""
    if category not in block or column not in block[category]:
        return None
    value = str(block[category][column].as_array(str, "")[0])
    return None if value in ("", "?", ".") else value


def _resolution(block: Any) -> float | None:
    for category, column in (
        ("refine", "ls_d_res_high"),
        ("em_3d_reconstruction", "resolution"),
        ("reflns", "d_resolution_high"),
    ):
        value = _first(block, category, column)
        if value is not None:
            return float(value)
    return None


def release_date(block: Any) -> str:
    """Date of the first revision; the older category where the newer is missing."""
    for category, column in (
        ("pdbx_audit_revision_history", "revision_date"),
        ("database_PDB_rev", "date"),
    ):
        if dates := _columns(block, category, column):
            return min(date for (date,) in dates)
    return ""


def _read_tables(block: Any) -> Tables:
    return Tables(
        polymer_types=_polymer_types(block),
        sequences=_sequences(block),
        links=_links(block),
        method=(_first(block, "exptl", "method") or "").upper(),
        resolution=_resolution(block),
        release_date=release_date(block),
        title=" ".join((_first(block, "struct", "title") or "").split()),
    )


def _columns(block: Any, category: str, *names: str) -> list[tuple[str, ...]]:
    """Rows of the named columns, as text; none where the category or a column is absent."""
    if category not in block or any(name not in block[category] for name in names):
        return []
    table = block[category]
    return list(zip(*(table[name].as_array(str).tolist() for name in names), strict=True))


def _polymer_types(block: Any) -> dict[str, str]:
    """entity -> type of polymer, as mmCIF calls it."""
    return dict(_columns(block, "entity_poly", "entity_id", "type"))


def _sequences(block: Any) -> dict[str, dict[int, list[str]]]:
    """entity -> position -> components there (several where the sequence varies)."""
    sequences: dict[str, dict[int, list[str]]] = {}
    for entity, number, name in _columns(block, "entity_poly_seq", "entity_id", "num", "mon_id"):
        name = "MET" if name == "MSE" else name  # as in the atoms
        sequences.setdefault(entity, {}).setdefault(int(number), []).append(name)
    return sequences


def _links(block: Any) -> list[Link]:
    """Covalent bonds between residues of one copy, as ``struct_conn`` lists them."""
    ends = [
        [f"ptnr{i}_label_asym_id", f"ptnr{i}_label_seq_id", f"ptnr{i}_auth_seq_id",
         f"ptnr{i}_label_atom_id", f"ptnr{i}_symmetry"]
        for i in (1, 2)
    ]  # fmt: skip
    links = []
    for kind, *rest in _columns(block, "struct_conn", "conn_type_id", *ends[0], *ends[1]):
        first, second = rest[:5], rest[5:]
        if kind.startswith("covale") and first[4] == second[4]:
            links.append((LinkEnd(*first[:4]), LinkEnd(*second[:4])))
    return links

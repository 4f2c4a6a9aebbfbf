"""Coordinates back to a ``Structure``, and a ``Structure`` to mmCIF."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
from biotite.structure.io.pdbx import CIFBlock, CIFCategory, CIFFile

from megafold.atomic import atomic_write
from megafold.data.layout import AtomLayout
from megafold.data.structure import DNA, LIGAND, PROTEIN, RNA, Structure

_POLYMER_TYPES = {
    PROTEIN: "polypeptide(L)",
    RNA: "polyribonucleotide",
    DNA: "polydeoxyribonucleotide",
}
_HYBRID = "polydeoxyribonucleotide/polyribonucleotide hybrid"


def predicted_structure(
    layout: AtomLayout, coordinates: np.ndarray, *, name: str = "prediction"
) -> Structure:
    """A structure from coordinates that a model gave for every atom of a layout.

    Args:
        layout: ``batch.layout``; A atoms.
        coordinates: [A, 3], angstrom. A torch tensor is taken too; rows of padding after the
            first A are not.
        name: Name of the entry.

    Raises:
        ValueError: The shape is not [A, 3], or a coordinate is not finite.
    """
    positions = np.asarray(coordinates, dtype=np.float32)
    if positions.shape != (len(layout), 3):
        raise ValueError(
            f"coordinates has shape {positions.shape}, expected ({len(layout)}, 3): "
            "one row for each atom of the layout"
        )
    if not np.isfinite(positions).all():
        atom = int(np.flatnonzero(~np.isfinite(positions).all(axis=-1))[0])
        raise ValueError(f"coordinates of atom {atom} are not finite: {positions[atom]}")
    return Structure(
        name=name,
        layout=layout,
        positions=positions,
        resolved=np.ones(len(layout), dtype=bool),
        bonds=np.empty((0, 2), dtype=np.int64),
    )


def write_mmcif(
    structure: Structure, path: str | Path, *, b_factors: np.ndarray | None = None
) -> Path:
    """Write a structure as mmCIF text (``.gz`` or not): its sequences, resolved atoms, bonds.

    Residues and chains are named as the layout names them, in the label and the author
    fields alike. Coordinates have three decimals, as in the PDB. The file appears whole or
    not at all.

    Args:
        structure: A atoms.
        path: Where to.
        b_factors: [A], written with two decimals; of a prediction the confidence in each atom
            (pLDDT, 0 to 100), as viewers expect. Zero without.

    Returns:
        The path.

    Raises:
        ValueError: No atom is resolved, or ``b_factors`` is not one finite number for each.
    """
    if not structure.resolved.any():
        raise ValueError(f"{structure.name}: no resolved atom, nothing to write")
    block = CIFBlock()
    block["entry"] = CIFCategory({"id": structure.name})
    if structure.method:
        block["exptl"] = CIFCategory({"entry_id": structure.name, "method": structure.method})
    if structure.resolution is not None:
        block["refine"] = CIFCategory(
            {"entry_id": structure.name, "ls_d_res_high": f"{structure.resolution:g}"}
        )
    for name, category in _sequence_categories(structure).items():
        block[name] = category
    block["atom_site"] = _atom_site(structure, _checked(b_factors, len(structure.layout)))
    if len(structure.bonds):
        block["struct_conn"] = _struct_conn(structure)
    # The name of a block, unlike a value, cannot have spaces.
    file = CIFFile({re.sub(r"[^!-~]", "_", structure.name): block})
    return atomic_write(path, file.serialize().encode())


def _checked(b_factors: np.ndarray | None, atoms: int) -> np.ndarray:
    if b_factors is None:
        return np.zeros(atoms)
    values = np.asarray(b_factors, dtype=np.float64)
    if values.shape != (atoms,):
        raise ValueError(f"b_factors has shape {values.shape}, expected ({atoms},)")
    if not np.isfinite(values).all():
        atom = int(np.flatnonzero(~np.isfinite(values))[0])
        raise ValueError(f"b_factors of atom {atom} is {values[atom]}")
    return values


def _category(rows: list[dict[str, object]]) -> CIFCategory:
    return CIFCategory({name: [str(row[name]) for row in rows] for name in rows[0]})


def _sequence_categories(structure: Structure) -> dict[str, CIFCategory]:
    entities, polymers, residues, chains = {}, {}, {}, []
    layout, starts = structure.layout, structure.residue_starts
    kinds: dict[str, set[str]] = {}
    for chain_id, kind in zip(
        layout.chain_id[starts].tolist(), layout.chain_type[starts].tolist(), strict=True
    ):
        kinds.setdefault(chain_id, set()).add(kind)
    for chain in structure.chains:
        entity = chain.entity_id
        polymer = chain.chain_type != LIGAND
        chains.append({"id": chain.chain_id, "entity_id": entity})
        kind = "polymer" if polymer else "non-polymer" if len(chain) == 1 else "branched"
        entities[entity] = {"id": entity, "type": kind}
        if polymer:
            types = kinds[chain.chain_id]
            polymers[entity] = {
                "entity_id": entity,
                "type": _POLYMER_TYPES[chain.chain_type] if len(types) == 1 else _HYBRID,
            }
            for number, name in zip(chain.residue_numbers, chain.components, strict=True):
                residues[entity, number] = {"entity_id": entity, "num": number, "mon_id": name}
    categories = {
        "entity": _category([entities[e] for e in sorted(entities)]),
        "struct_asym": _category(chains),
    }
    if polymers:
        categories["entity_poly"] = _category([polymers[e] for e in sorted(polymers)])
        categories["entity_poly_seq"] = _category([residues[k] for k in sorted(residues)])
    return categories


def _atom_site(structure: Structure, b_factors: np.ndarray) -> CIFCategory:
    keep = structure.resolved
    layout = structure.layout
    number = layout.residue_number[keep].astype(str)
    chain, residue, atom = (
        getattr(layout, name)[keep] for name in ("chain_id", "residue_name", "atom_name")
    )
    label_number = np.where(layout.chain_type[keep] == LIGAND, ".", number)
    count = int(keep.sum())
    coordinates = structure.positions[keep]
    columns = {
        "group_PDB": np.where(layout.is_hetero[keep], "HETATM", "ATOM"),
        "id": np.arange(1, count + 1).astype(str),
        "type_symbol": layout.element[keep],
        "label_atom_id": atom,
        "label_alt_id": np.full(count, "."),
        "label_comp_id": residue,
        "label_asym_id": chain,
        "label_entity_id": layout.entity_id[keep].astype(str),
        "label_seq_id": label_number,
        "pdbx_PDB_ins_code": np.full(count, "?"),
        **{f"Cartn_{axis}": np.char.mod("%.3f", coordinates[:, i]) for i, axis in enumerate("xyz")},
        "occupancy": np.full(count, "1.00"),
        "B_iso_or_equiv": np.char.mod("%.2f", b_factors[keep]),
        "auth_seq_id": number,
        "auth_comp_id": residue,
        "auth_asym_id": chain,
        "auth_atom_id": atom,
        "pdbx_PDB_model_num": np.full(count, "1"),
    }
    return CIFCategory(columns)


def _struct_conn(structure: Structure) -> CIFCategory:
    layout = structure.layout
    rows = []
    for i, pair in enumerate(structure.bonds, start=1):
        row: dict[str, object] = {"id": f"covale{i}", "conn_type_id": "covale"}
        for partner, atom in enumerate(pair, start=1):
            prefix, number = f"ptnr{partner}", layout.residue_number[atom]
            ligand = layout.chain_type[atom] == LIGAND
            row |= {
                f"{prefix}_label_asym_id": layout.chain_id[atom],
                f"{prefix}_label_comp_id": layout.residue_name[atom],
                f"{prefix}_label_seq_id": "." if ligand else number,
                f"{prefix}_label_atom_id": layout.atom_name[atom],
                f"{prefix}_auth_asym_id": layout.chain_id[atom],
                f"{prefix}_auth_comp_id": layout.residue_name[atom],
                f"{prefix}_auth_seq_id": number,
                f"{prefix}_symmetry": "1_555",
            }
        rows.append(row)
    return _category(rows)

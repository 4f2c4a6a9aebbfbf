"""Which three atoms span the frame of each token (AlphaFold 3, supplement, section 4.3.2)."""

from __future__ import annotations

import numpy as np

from megafold.data.features import Features

PROTEIN_FRAME = ("N", "CA", "C")
NUCLEIC_FRAME = ("C1'", "C3'", "C4'")
# Three atoms span no frame if the angle between them is within so many degrees of 0 or 180.
COLLINEAR = 25.0


def token_frames(features: Features) -> tuple[np.ndarray, np.ndarray]:
    """The atoms a, b and c of each token's frame, b its origin, and whether they span one.

    A standard residue has N, CA, C, a standard nucleotide C1', C3', C4'. A token of one atom
    (ligands, modified residues) is its own origin; a and c are the closest and the second
    closest atom of the residue or ligand in its reference conformer, so that the choice needs
    no coordinates. It is no frame if there are fewer than three atoms or they are nearly in
    line.

    Returns:
        Rows of atoms ``[N, 3]`` int64 (zeros where there is no frame) and ``[N]`` bool.
    """
    n = features.num_tokens
    atoms = np.zeros((n, 3), dtype=np.int64)
    valid = np.zeros(n, dtype=bool)
    names = features.layout.atom_name
    starts = np.searchsorted(features.atom_to_token, np.arange(n + 1))
    for token in np.flatnonzero(~features.is_atom):
        first, last = starts[token], starts[token + 1]
        rows = {name: first + i for i, name in enumerate(names[first:last].tolist())}
        wanted = PROTEIN_FRAME if features.is_protein[token] else NUCLEIC_FRAME
        if all(name in rows for name in wanted):
            atoms[token] = [rows[name] for name in wanted]
            valid[token] = True
    single = features.is_atom
    uid = features.ref_space_uid
    conformer = uid[features.center_atom]
    for space in np.unique(conformer[single]):
        tokens = np.flatnonzero(single & (conformer == space))
        rows = np.flatnonzero((uid == space) & features.ref_mask)
        if len(rows) < 3:
            continue
        for token in tokens:
            frame = _nearest_frame(features.ref_pos, rows, int(features.center_atom[token]))
            if frame is not None:
                atoms[token], valid[token] = frame, True
    return atoms, valid


def _nearest_frame(positions: np.ndarray, rows: np.ndarray, origin: int) -> list[int] | None:
    if origin not in rows:
        return None
    offset = positions[rows].astype(np.float64) - positions[origin]
    distance = np.linalg.norm(offset, axis=-1)
    order = [i for i in np.argsort(distance, kind="stable") if rows[i] != origin][:2]
    if len(order) < 2 or (distance[order] == 0).any():
        return None
    first, second = offset[order] / distance[order, None]
    angle = np.degrees(np.arccos(np.clip(first @ second, -1.0, 1.0)))
    if angle < COLLINEAR or angle > 180.0 - COLLINEAR:
        return None
    return [int(rows[order[0]]), origin, int(rows[order[1]])]

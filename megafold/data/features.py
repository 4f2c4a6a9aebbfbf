"""Everything about one structure that is deterministic: what the cache holds.

Shape letters: N tokens, A atoms, M alignment rows, T templates, B and L bonds.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import numpy as np

from megafold.data.layout import AtomLayout

TOKEN_FIELDS = (
    "token_index", "residue_index", "asym_id", "entity_id", "sym_id", "restype", "is_protein",
    "is_rna", "is_dna", "is_ligand", "is_atom", "is_interface", "profile", "deletion_mean",
)  # fmt: skip
ATOM_FIELDS = (
    "ref_pos", "ref_mask", "ref_element", "ref_charge", "ref_atom_name_chars", "ref_space_uid",
    "positions", "resolved",
)  # fmt: skip
ATOM_ROW_FIELDS = ("center_atom", "representative_atom")
# Rows of the alignment or templates by tokens: [M or T, N, ...].
COLUMN_FIELDS = (
    "msa", "msa_mask", "deletions", "template_restype", "template_pseudo_beta",
    "template_pseudo_beta_mask", "template_backbone", "template_backbone_mask",
)  # fmt: skip
# Those of them that are rows of the alignment.
ROW_FIELDS = ("msa", "msa_mask", "deletions")
ARRAY_FIELDS = (
    *TOKEN_FIELDS, *ATOM_FIELDS, *ATOM_ROW_FIELDS, *COLUMN_FIELDS, "bonds", "atom_to_token",
    "ligand_bonds", "resolution",
)  # fmt: skip

# Part of every cache key: raise it when a change alters any feature of any structure, or what
# an entry holds beside the features.
FEATURE_VERSION = 5


@dataclass(frozen=True)
class Features:
    """Deterministic features of one structure, or of a crop of it.

    Integers are stored as narrow as they go; ``make_batch`` widens them. Pair features are
    not stored: bonds are a list, templates are coordinates, and ``make_batch`` works both
    out for the tokens that are left after the crop.
    """

    # Tokens. All ids count from 1.
    token_index: np.ndarray  # [N] int32, place in the whole structure, from 0
    residue_index: np.ndarray  # [N] int32, position in the chain's sequence, from 1
    asym_id: np.ndarray  # [N] int32
    entity_id: np.ndarray  # [N] int32
    sym_id: np.ndarray  # [N] int32
    restype: np.ndarray  # [N] int32
    is_protein: np.ndarray  # [N] bool
    is_rna: np.ndarray  # [N] bool
    is_dna: np.ndarray  # [N] bool
    is_ligand: np.ndarray  # [N] bool
    is_atom: np.ndarray  # [N] bool, a token that is one atom
    is_interface: np.ndarray  # [N] bool, centre atom within 15 A of another chain's
    center_atom: np.ndarray  # [N] int32
    representative_atom: np.ndarray  # [N] int32
    bonds: np.ndarray  # [B, 2] int32, bonded tokens

    # Alignment.
    msa: np.ndarray  # [M, N] uint8, class of constants.RESTYPES; row 0 is the query
    msa_mask: np.ndarray  # [M, N] bool, False where a chain has no such row
    deletions: np.ndarray  # [M, N] uint8, residues left out before this one
    profile: np.ndarray  # [N, 32] float32, of the whole alignment
    deletion_mean: np.ndarray  # [N] float32, of the whole alignment

    # Templates of single chains, each chain's best first, at most 20; T may be 0.
    template_restype: np.ndarray  # [T, N] uint8
    template_pseudo_beta: np.ndarray  # [T, N, 3] float32, angstrom
    template_pseudo_beta_mask: np.ndarray  # [T, N] bool
    template_backbone: np.ndarray  # [T, N, 3, 3] float32, N, CA and C, angstrom
    template_backbone_mask: np.ndarray  # [T, N] bool

    # Atoms.
    atom_to_token: np.ndarray  # [A] int32, never decreases
    ref_pos: np.ndarray  # [A, 3] float32, angstrom, as the conformer was made
    ref_mask: np.ndarray  # [A] bool
    ref_element: np.ndarray  # [A] uint8, atomic number
    ref_charge: np.ndarray  # [A] float32
    ref_atom_name_chars: np.ndarray  # [A, 4] uint8, ord(c) - 32
    ref_space_uid: np.ndarray  # [A] int32, one per (chain, residue)
    positions: np.ndarray  # [A, 3] float32, angstrom; zero where unresolved
    resolved: np.ndarray  # [A] bool
    ligand_bonds: np.ndarray  # [L, 2] int32, bonded atoms, one of a polymer and one of a ligand
    resolution: np.ndarray  # [1] float32, angstrom; NaN where the method has none

    layout: AtomLayout

    @property
    def num_tokens(self) -> int:
        return len(self.restype)

    @property
    def num_atoms(self) -> int:
        return len(self.atom_to_token)

    def select(self, token_indices: np.ndarray, rows: np.ndarray | None = None) -> Features:
        """The features of some tokens only, with all their atoms.

        Args:
            token_indices: [n] int, strictly increasing rows of this object's tokens.
            rows: [m] int, rows of the alignment to keep, in this order; all if None.

        Raises:
            ValueError: The indices do not increase strictly, or point outside.
            IndexError: ``rows`` points outside.
        """
        chosen = np.asarray(token_indices)
        if len(chosen) == 0:
            raise ValueError("token_indices is empty: a selection needs at least one token")
        if chosen.ndim != 1 or (np.diff(chosen) <= 0).any():
            raise ValueError("token_indices must be one row of strictly increasing integers")
        if chosen[0] < 0 or chosen[-1] >= self.num_tokens:
            raise ValueError(
                f"token_indices run from {chosen[0]} to {chosen[-1]}; "
                f"there are {self.num_tokens} tokens"
            )
        new_token = np.full(self.num_tokens, -1, dtype=np.int32)
        new_token[chosen] = np.arange(len(chosen), dtype=np.int32)
        atoms = np.flatnonzero(new_token[self.atom_to_token] >= 0)
        new_atom = np.full(self.num_atoms, -1, dtype=np.int32)
        new_atom[atoms] = np.arange(len(atoms), dtype=np.int32)
        bonds = new_token[self.bonds]
        ligand_bonds = new_atom[self.ligand_bonds]
        values = {
            "atom_to_token": new_token[self.atom_to_token[atoms]],
            "bonds": bonds[(bonds >= 0).all(axis=-1)],
            "ligand_bonds": ligand_bonds[(ligand_bonds >= 0).all(axis=-1)],
            "resolution": self.resolution,
            "layout": select_layout(self.layout, atoms),
        }
        values |= {name: getattr(self, name)[chosen] for name in TOKEN_FIELDS}
        values |= {name: new_atom[getattr(self, name)[chosen]] for name in ATOM_ROW_FIELDS}
        # Tokens first: in the cache a token's column is one run of bytes.
        for name in COLUMN_FIELDS:
            columns = getattr(self, name).swapaxes(0, 1)[chosen]
            if rows is not None and name in ROW_FIELDS:
                columns = columns[:, rows]
            values[name] = columns.swapaxes(0, 1)
        values |= {name: getattr(self, name)[atoms] for name in ATOM_FIELDS}
        return Features(**values)

    def __repr__(self) -> str:
        return (
            f"Features({self.num_tokens} tokens, {self.num_atoms} atoms, "
            f"{len(self.msa)} alignment rows, {len(self.template_restype)} templates)"
        )


def select_layout(layout: AtomLayout, atoms: np.ndarray) -> AtomLayout:
    """The rows ``atoms`` of a layout."""
    return AtomLayout(**{f.name: getattr(layout, f.name)[atoms] for f in fields(AtomLayout)})

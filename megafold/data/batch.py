"""What the model reads: one example as torch tensors.

Shape letters: N tokens, A atoms, M alignment rows, T template slots.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

import torch

from megafold.data.layout import AtomLayout


@dataclass(frozen=True)
class Batch:
    """One training or inference example. There is no leading batch axis.

    A model of this kind trains on one crop per GPU; what is batched is the noised copies
    of its atoms. Atoms are ordered by token (``atom_to_token`` never decreases). Padding,
    where there is any, stands at the end and is False in ``token_mask`` and ``atom_mask``.
    Names are those of AlphaFold 3 (supplement, table 5).
    """

    # Tokens.
    token_mask: torch.Tensor  # [N] bool
    token_index: torch.Tensor  # [N] int64, never restarts
    residue_index: torch.Tensor  # [N] int64, position in the chain's sequence, from 1
    asym_id: torch.Tensor  # [N] int64, one per chain
    entity_id: torch.Tensor  # [N] int64, one per distinct sequence or molecule
    sym_id: torch.Tensor  # [N] int64, copy number within the entity
    restype: torch.Tensor  # [N] int64, class of constants.RESTYPES (32)
    is_protein: torch.Tensor  # [N] bool
    is_rna: torch.Tensor  # [N] bool
    is_dna: torch.Tensor  # [N] bool
    is_ligand: torch.Tensor  # [N] bool
    center_atom: torch.Tensor  # [N] int64, index of the token's centre atom
    representative_atom: torch.Tensor  # [N] int64, index of the distogram atom
    token_bonds: torch.Tensor  # [N, N] bool, polymer-ligand and ligand-ligand bonds

    # Alignment.
    msa: torch.Tensor  # [M, N] int64, class of constants.RESTYPES; row 0 is the query
    msa_mask: torch.Tensor  # [M, N] bool, False where a chain has no such row
    has_deletion: torch.Tensor  # [M, N] float32, 0 or 1
    deletion_value: torch.Tensor  # [M, N] float32, (2 / pi) arctan(d / 3)
    profile: torch.Tensor  # [N, 32] float32, of the whole alignment
    deletion_mean: torch.Tensor  # [N] float32, of the whole alignment

    # Templates; at least one slot, empty ones are False in template_mask.
    template_mask: torch.Tensor  # [T] bool
    template_restype: torch.Tensor  # [T, N] int64
    template_pseudo_beta_mask: torch.Tensor  # [T, N] bool
    template_backbone_frame_mask: torch.Tensor  # [T, N] bool
    template_distogram: torch.Tensor  # [T, N, N] int64, bin 0 to 38
    template_unit_vector: torch.Tensor  # [T, N, N, 3] float32

    # Atoms: reference conformers.
    atom_mask: torch.Tensor  # [A] bool
    atom_to_token: torch.Tensor  # [A] int64
    ref_pos: torch.Tensor  # [A, 3] float32, angstrom, randomly placed per conformer
    ref_mask: torch.Tensor  # [A] bool
    ref_element: torch.Tensor  # [A] int64, atomic number, 0 to 127
    ref_charge: torch.Tensor  # [A] float32
    ref_atom_name_chars: torch.Tensor  # [A, 4] int64, ord(c) - 32, 0 to 63
    ref_space_uid: torch.Tensor  # [A] int64, one per (chain, residue)

    # Ground truth; not read by the model's forward, only by losses and metrics.
    positions: torch.Tensor  # [A, 3] float32, angstrom; zero where unresolved
    resolved: torch.Tensor  # [A] bool

    # What each atom is called, for writing structures. Not a tensor; unpadded.
    layout: AtomLayout

    @property
    def num_tokens(self) -> int:
        """Number of tokens, padding included."""
        return self.restype.shape[0]

    @property
    def num_atoms(self) -> int:
        """Number of atoms, padding included."""
        return self.atom_to_token.shape[0]

    def to(self, device: torch.device | str) -> Batch:
        """The same batch with every tensor on ``device``."""
        tensors = {
            f.name: getattr(self, f.name).to(device) for f in fields(self) if f.name != "layout"
        }
        return replace(self, **tensors)

"""The names of atoms: what turns bare coordinates back into a structure file."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class AtomLayout:
    """One row per atom, in the order of ``Batch.positions``.

    Enough to write mmCIF again. All arrays have length A.
    """

    chain_id: np.ndarray  # [A] str, author-independent chain name (label_asym_id)
    entity_id: np.ndarray  # [A] int, from 1
    residue_number: np.ndarray  # [A] int, position in the chain's sequence, from 1
    residue_name: np.ndarray  # [A] str, component id (ALA, DG, ATP, ...)
    atom_name: np.ndarray  # [A] str
    element: np.ndarray  # [A] str, symbol in capitals
    is_hetero: np.ndarray  # [A] bool, written as HETATM
    chain_type: np.ndarray  # [A] str: protein, rna, dna or ligand

    def __len__(self) -> int:
        return len(self.atom_name)

"""A cleaned structure: every heavy atom that should be there, resolved or not."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from types import MappingProxyType

import numpy as np

from megafold.data.layout import AtomLayout

PROTEIN, RNA, DNA, LIGAND = "protein", "rna", "dna", "ligand"
POLYMERS = (PROTEIN, RNA, DNA)


@dataclass(frozen=True)
class Chain:
    """One molecule of a structure: a polymer chain, a glycan, a ligand or an ion."""

    chain_id: str
    chain_type: str  # protein, rna, dna or ligand
    entity_id: int  # from 1; chains of the same components share it
    sym_id: int  # from 1; copy number within the entity
    components: tuple[str, ...]  # component id of each residue, unresolved ones included
    residue_numbers: tuple[int, ...]  # position in the sequence, from 1

    @property
    def sequence(self) -> str:
        """One-letter codes; a modified residue as its parent, X or N where it has none.

        Empty for a ligand.
        """
        from megafold.data.tokens import LETTERS, restype_class  # loads the dictionary

        if self.chain_type == LIGAND:
            return ""
        return "".join(LETTERS[restype_class(name, self.chain_type)] for name in self.components)

    def __len__(self) -> int:
        return len(self.components)


@dataclass(frozen=True)
class Structure:
    """Chains, atoms and coordinates of one entry.

    The layout holds every heavy atom of every residue, in chain order. An atom that the
    experiment did not see is False in ``resolved`` and zero in ``positions``.
    """

    name: str
    layout: AtomLayout
    positions: np.ndarray  # [A, 3] float32, angstrom
    resolved: np.ndarray  # [A] bool
    bonds: np.ndarray  # [B, 2] int64, bonds between residues other than along a polymer
    method: str = ""  # experimental method, in capitals
    resolution: float | None = None  # angstrom
    release_date: str = ""  # ISO 8601
    title: str = ""
    removed: Mapping[str, int] = field(default_factory=lambda: MappingProxyType({}))  # by reason

    @cached_property
    def residue_starts(self) -> np.ndarray:
        """First atom of each residue. [R] int64."""
        chain, number = self.layout.chain_id, self.layout.residue_number
        new = (chain[1:] != chain[:-1]) | (number[1:] != number[:-1])
        return np.concatenate([[0], np.flatnonzero(new) + 1]).astype(np.int64)

    @cached_property
    def chains(self) -> tuple[Chain, ...]:
        """The chains, in the order of the layout."""
        starts = self.residue_starts
        ids = self.layout.chain_id[starts]
        edges = np.concatenate([[0], np.flatnonzero(ids[1:] != ids[:-1]) + 1, [len(ids)]])
        copies: dict[int, int] = {}
        chains = []
        for begin, end in itertools.pairwise(edges):
            rows = starts[begin:end]
            entity = int(self.layout.entity_id[rows[0]])
            copies[entity] = copies.get(entity, 0) + 1
            chains.append(
                Chain(
                    chain_id=str(ids[begin]),
                    chain_type=str(self.layout.chain_type[rows[0]]),
                    entity_id=entity,
                    sym_id=copies[entity],
                    components=tuple(self.layout.residue_name[rows].tolist()),
                    residue_numbers=tuple(self.layout.residue_number[rows].tolist()),
                )
            )
        return tuple(chains)

    def __repr__(self) -> str:
        return (
            f"Structure({self.name}: {len(self.chains)} chains, {len(self.residue_starts)} "
            f"residues, {int(self.resolved.sum())} of {len(self.resolved)} atoms resolved)"
        )

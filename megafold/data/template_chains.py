"""What a chain of a known structure tells about a related chain (AlphaFold 3, section 2.4)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from megafold.data.constants import GAP, RESTYPE_INDEX
from megafold.data.errors import DataError
from megafold.data.structure import PROTEIN, Structure
from megafold.data.tokens import Tokens

MAX_STORED = 20  # of one chain; a training example draws up to 4 of them

_GAP = RESTYPE_INDEX[GAP]
BACKBONE = ("N", "CA", "C")


@dataclass(frozen=True)
class Template:
    """One chain of a known structure, laid along the L residues of a query."""

    name: str  # entry and chain, such as 1ABC_A
    restype: np.ndarray  # [L] uint8, class of constants.RESTYPES; gap where nothing is aligned
    pseudo_beta: np.ndarray  # [L, 3] float32, angstrom, CB (CA of glycine); zero where masked
    pseudo_beta_mask: np.ndarray  # [L] bool
    backbone: np.ndarray  # [L, 3, 3] float32, angstrom, N, CA and C; zero where masked
    backbone_mask: np.ndarray  # [L] bool, all three atoms are resolved

    def __len__(self) -> int:
        return len(self.restype)

    def __repr__(self) -> str:
        aligned = int((self.restype != _GAP).sum())
        return f"Template({self.name}: {aligned} of {len(self)} residues aligned)"


def template_from_chain(
    name: str,
    length: int,
    rows: np.ndarray,
    template_rows: np.ndarray,
    restype: np.ndarray,
    atoms: Mapping[str, np.ndarray],
) -> Template:
    """Lay the residues of a chain along a query.

    Args:
        name: Of the template.
        length: Residues of the query, L.
        rows: [n] places in the query, from 0.
        template_rows: [n] the place in the template's sequence that is aligned to each.
        restype: [K] uint8 class of each residue of the template.
        atoms: ``N``, ``CA``, ``C`` and ``CB``: coordinates [K, 3], NaN where unresolved.

    Raises:
        DataError: The alignment points outside the query or the template.
    """
    rows, there = np.asarray(rows, dtype=np.int64), np.asarray(template_rows, dtype=np.int64)
    if len(rows) != len(there):
        raise DataError(f"template {name}: {len(rows)} residues aligned to {len(there)}")
    for what, places, size in (("query", rows, length), ("template", there, len(restype))):
        if len(places) and (places.min() < 0 or places.max() >= size):
            raise DataError(
                f"template {name}: the alignment goes from {places.min()} to {places.max()} in "
                f"the {what}, which has {size} residues"
            )
    beta = np.where((restype == RESTYPE_INDEX["GLY"])[:, None], atoms["CA"], atoms["CB"])  # [K, 3]
    backbone = np.stack([atoms[atom] for atom in BACKBONE], axis=1)  # [K, 3, 3]
    beta_mask = np.isfinite(beta).all(axis=-1)
    backbone_mask = np.isfinite(backbone).all(axis=(1, 2))

    def laid(values: np.ndarray, fill: float) -> np.ndarray:
        out = np.full((length, *values.shape[1:]), fill, dtype=values.dtype)
        out[rows] = values[there]
        return out

    return Template(
        name=name,
        restype=laid(restype.astype(np.uint8), _GAP),
        pseudo_beta=laid(np.where(beta_mask[:, None], beta, 0).astype(np.float32), 0),
        pseudo_beta_mask=laid(beta_mask, False),
        backbone=laid(np.where(backbone_mask[:, None, None], backbone, 0).astype(np.float32), 0),
        backbone_mask=laid(backbone_mask, False),
    )


def template_arrays(
    structure: Structure, tokens: Tokens, templates: Mapping[str, Sequence[Template]]
) -> dict[str, np.ndarray]:
    """The arrays of ``Features`` that come from templates, by name.

    Slot t has the t-th template of every chain. Tokens that are one atom have none.

    Args:
        structure: N tokens.
        tokens: Its tokens.
        templates: By chain id; see ``featurize``.

    Raises:
        DataError: Templates are for a chain that is not there or no protein, or one has not its
            length.
    """
    by_id = {chain.chain_id: chain for chain in structure.chains}
    of_entity: dict[int, Sequence[Template]] = {}
    for chain_id, given in templates.items():
        if chain_id not in by_id:
            raise DataError(f"templates of chain {chain_id}; {structure.name} has {list(by_id)}")
        chain = by_id[chain_id]
        if chain.chain_type != PROTEIN:
            raise DataError(f"templates of chain {chain_id}, which is a {chain.chain_type}")
        for template in given:
            if len(template) != len(chain):
                raise DataError(
                    f"template {template.name} is laid along {len(template)} residues, chain "
                    f"{chain_id} of {structure.name} has {len(chain)}"
                )
        of_entity.setdefault(chain.entity_id, given[:MAX_STORED])
    slots, n = max(map(len, of_entity.values()), default=0), len(tokens)
    arrays = {
        "template_restype": np.full((slots, n), _GAP, dtype=np.uint8),
        "template_pseudo_beta": np.zeros((slots, n, 3), dtype=np.float32),
        "template_pseudo_beta_mask": np.zeros((slots, n), dtype=bool),
        "template_backbone": np.zeros((slots, n, 3, 3), dtype=np.float32),
        "template_backbone_mask": np.zeros((slots, n), dtype=bool),
    }
    for asym, chain in enumerate(structure.chains, start=1):
        here = np.flatnonzero((tokens.asym_id == asym) & ~tokens.is_atom)
        residues = np.searchsorted(np.array(chain.residue_numbers), tokens.residue_index[here])
        for slot, template in enumerate(of_entity.get(chain.entity_id, ())):
            for name, array in arrays.items():
                array[slot, here] = getattr(template, name.removeprefix("template_"))[residues]
    return arrays

"""What the model reads: one example as torch tensors.

Shape letters: N tokens, A atoms, M alignment rows, T template slots, K copies of an entity,
L bonds.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

import numpy as np
import torch

from megafold.data.copies import chain_copies
from megafold.data.features import Features
from megafold.data.frames import token_frames
from megafold.data.layout import AtomLayout
from megafold.data.templates import draw_templates, template_features


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
    # The same atom in each copy of its entity, in the order of sym_id, whether or not the copy
    # is in the crop: what a permutation of identical chains chooses from.
    copy_positions: torch.Tensor  # [K, A, 3] float32, angstrom; zero where unresolved
    copy_resolved: torch.Tensor  # [K, A] bool, False where there is no such copy
    frame_atoms: torch.Tensor  # [N, 3] int64, atoms a, b and c of each token's frame
    frame_mask: torch.Tensor  # [N] bool, whether they span a frame
    ligand_bonds: torch.Tensor  # [L, 2] int64, bonded atoms, one of a polymer and one of a ligand

    # Not tensors of one shape.
    symmetric_atoms: tuple[torch.Tensor, ...]  # each [R, P, n] int64, see data.symmetry
    resolution: float  # angstrom; NaN where the method has none

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

    def for_model(self) -> Batch:
        """The same without what only losses read, whose sizes differ from crop to crop."""
        return replace(self, **_emptied(self, TRUTH_FIELDS), symmetric_atoms=())

    def for_losses(self) -> Batch:
        """The same without what only the model reads: alignment, templates and conformers."""
        return replace(self, **_emptied(self, MODEL_FIELDS), symmetric_atoms=())

    def to(self, device: torch.device | str) -> Batch:
        """The same batch with every tensor on ``device``."""
        tensors = {name: getattr(self, name).to(device) for name in TENSOR_FIELDS}
        symmetric = tuple(orders.to(device) for orders in self.symmetric_atoms)
        return replace(self, **tensors, symmetric_atoms=symmetric)


TENSOR_FIELDS = tuple(
    f.name for f in fields(Batch) if f.name not in ("symmetric_atoms", "resolution", "layout")
)

# What the model's forward never reads, and what losses never do once the truth has its names.
TRUTH_FIELDS = (
    "positions", "resolved", "copy_positions", "copy_resolved", "frame_atoms", "frame_mask",
    "ligand_bonds",
)  # fmt: skip
MODEL_FIELDS = (
    "token_bonds", "msa", "msa_mask", "has_deletion", "deletion_value", "profile", "deletion_mean",
    "template_mask", "template_restype", "template_pseudo_beta_mask",
    "template_backbone_frame_mask", "template_distogram", "template_unit_vector", "ref_pos",
    "ref_mask", "ref_element", "ref_charge", "ref_atom_name_chars", "ref_space_uid",
    "copy_positions", "copy_resolved",
)  # fmt: skip


def _emptied(batch: Batch, names: tuple[str, ...]) -> dict[str, torch.Tensor]:
    return {name: getattr(batch, name)[:0] for name in names}


def make_batch(
    features: Features,
    *,
    generator: np.random.Generator,
    msa_rows: int = 1024,
    whole: Features | None = None,
    random_templates: bool = False,
) -> Batch:
    """The random part of the pipeline, and the change from numpy to torch.

    Drawn here, in this order: the rows of the alignment (the query always, the others
    without replacement, kept in the alignment's order), a rotation and translation of each
    reference conformer (uniform; 1 angstrom per axis), and in training the templates.

    Args:
        features: Usually a crop.
        generator: Every random draw comes from it.
        msa_rows: At most so many rows of the alignment, the query included.
        whole: The features that ``features`` is a crop of, for the copies of its chains that
            the crop left out; None if nothing was left out, or only the crop's copies count.
        random_templates: Draw templates as in training (``draw_templates``); else each chain's
            first 4.
    """
    if msa_rows < 1:
        raise ValueError(f"msa_rows is {msa_rows}; the query alone is 1")
    rows = draw_rows(len(features.msa), msa_rows, generator)
    deletions = features.deletions[rows].astype(np.float32)
    bonds = np.zeros((features.num_tokens, features.num_tokens), dtype=bool)
    first, second = features.bonds.T
    bonds[first, second] = bonds[second, first] = True
    frame_atoms, frame_mask = token_frames(features)
    copy_positions, copy_resolved = chain_copies(features, features if whole is None else whole)
    arrays = {
        "copy_positions": copy_positions,
        "copy_resolved": copy_resolved,
        "frame_atoms": frame_atoms,
        "frame_mask": frame_mask,
        "token_mask": np.ones(features.num_tokens, dtype=bool),
        "token_bonds": bonds,
        "msa": features.msa[rows],
        "msa_mask": features.msa_mask[rows],
        "has_deletion": (deletions > 0).astype(np.float32),
        "deletion_value": (2 / np.pi * np.arctan(deletions / 3)).astype(np.float32),
        "atom_mask": np.ones(features.num_atoms, dtype=bool),
        "ref_pos": _place_conformers(features, generator),
    }
    chosen = draw_templates(features, generator) if random_templates else None
    arrays |= template_features(features, chosen)
    batch = {}
    for name in TENSOR_FIELDS:
        value = arrays[name] if name in arrays else getattr(features, name)
        value = np.array(value)  # a copy: what comes from the cache is read-only
        integer = np.issubdtype(value.dtype, np.integer)
        batch[name] = torch.from_numpy(value.astype(np.int64) if integer else value)
    from megafold.data.symmetry import symmetric_atoms  # loads the dictionary

    symmetric = symmetric_atoms(features.layout)
    return Batch(
        **batch,
        symmetric_atoms=tuple(torch.from_numpy(orders) for orders in symmetric),
        resolution=float(features.resolution[0]),
        layout=features.layout,
    )


def pad_batch(batch: Batch, tokens: int, atoms: int) -> Batch:
    """The same batch with ``tokens`` tokens and ``atoms`` atoms, for static shapes.

    What is added stands at the end, is zero, and is False in every mask. Padding atoms
    belong to the last token, so that ``atom_to_token`` never decreases, and to a reference
    space of their own (-1).

    Raises:
        ValueError: The batch is larger than asked for.
    """
    extra_tokens, extra_atoms = tokens - batch.num_tokens, atoms - batch.num_atoms
    if extra_tokens < 0 or extra_atoms < 0:
        raise ValueError(
            f"the batch has {batch.num_tokens} tokens and {batch.num_atoms} atoms; "
            f"it cannot be padded to {tokens} and {atoms}"
        )
    padded = {}
    for name, dims in _PADDED_DIMS.items():
        value = getattr(batch, name)
        widths = [0] * (2 * value.dim())
        for dim, letter in enumerate(dims):
            extra = {"N": extra_tokens, "A": extra_atoms}.get(letter, 0)
            widths[2 * (value.dim() - 1 - dim) + 1] = extra
        padded[name] = torch.nn.functional.pad(value, widths)
    padded["atom_to_token"][batch.num_atoms :] = tokens - 1
    padded["ref_space_uid"][batch.num_atoms :] = -1
    return replace(batch, **padded)


def _dims(*names: str, letters: str) -> dict[str, str]:
    return dict.fromkeys(names, letters)


# Which axis of each field is tokens (N) or atoms (A); others never grow.
_PADDED_DIMS = {
    **_dims(
        "token_mask", "token_index", "residue_index", "asym_id", "entity_id", "sym_id", "restype",
        "is_protein", "is_rna", "is_dna", "is_ligand", "center_atom", "representative_atom",
        "profile", "deletion_mean", "frame_mask", letters="N",
    ),
    **_dims("frame_atoms", letters="N3"),
    **_dims("copy_positions", letters="KA3"),
    **_dims("copy_resolved", letters="KA"),
    **_dims("token_bonds", letters="NN"),
    **_dims("msa", "msa_mask", "has_deletion", "deletion_value", letters="MN"),
    **_dims(
        "template_restype", "template_pseudo_beta_mask", "template_backbone_frame_mask",
        letters="TN",
    ),
    **_dims("template_distogram", "template_unit_vector", letters="TNN"),
    **_dims(
        "atom_mask", "atom_to_token", "ref_pos", "ref_mask", "ref_element", "ref_charge",
        "ref_atom_name_chars", "ref_space_uid", "positions", "resolved", letters="A",
    ),
}  # fmt: skip


def draw_rows(depth: int, msa_rows: int, generator: np.random.Generator) -> np.ndarray:
    """At most ``msa_rows`` rows of an alignment: the query, and others in their order."""
    if depth <= msa_rows:
        return np.arange(depth)
    others = generator.choice(depth - 1, size=msa_rows - 1, replace=False) + 1
    return np.concatenate([[0], np.sort(others)])


def _place_conformers(features: Features, generator: np.random.Generator) -> np.ndarray:
    """Each conformer centred, rotated and moved at random. [A, 3] float32."""
    _, conformer = np.unique(features.ref_space_uid, return_inverse=True)
    count = int(conformer.max()) + 1
    weight = features.ref_mask.astype(np.float64)
    total = np.maximum(np.bincount(conformer, weight, minlength=count), 1.0)
    centre = np.stack(
        [np.bincount(conformer, weight * features.ref_pos[:, i], minlength=count) / total
         for i in range(3)], axis=-1,
    )  # fmt: skip
    rotation = _random_rotations(count, generator)
    translation = generator.standard_normal((count, 3))
    centred = features.ref_pos - centre[conformer]
    placed = np.einsum("aij,aj->ai", rotation[conformer], centred) + translation[conformer]
    return np.where(features.ref_mask[:, None], placed, 0.0).astype(np.float32)


def _random_rotations(count: int, generator: np.random.Generator) -> np.ndarray:
    """Uniform rotations, from normalised Gaussian quaternions. [count, 3, 3]."""
    w, x, y, z = (q := generator.standard_normal((4, count))) / np.linalg.norm(q, axis=0)
    rows = [
        [1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y)],
        [2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x)],
        [2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)],
    ]
    return np.moveaxis(np.array(rows), -1, 0)

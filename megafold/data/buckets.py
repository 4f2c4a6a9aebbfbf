"""A few fixed shapes for all batches, so that what was compiled for one serves the next."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from megafold.data.batch import Batch, pad_batch

_ALIGNMENT = ("msa", "msa_mask", "has_deletion", "deletion_value")
_TEMPLATES = (
    "template_mask", "template_restype", "template_pseudo_beta_mask",
    "template_backbone_frame_mask", "template_distogram", "template_unit_vector",
)  # fmt: skip


@dataclass(frozen=True)
class Buckets:
    """Sizes that batches are padded to: of each kind the smallest that is large enough.

    What the model's forward reads then has one of ``len(tokens) * len(atoms)`` shapes. The
    ground truth's copies, equivalent orders and bonds, which losses alone read, keep theirs.
    """

    tokens: tuple[int, ...]  # such as (128, 256, 384)
    atoms: tuple[int, ...]  # such as (1536, 3072, 4608)
    rows: int  # of the alignment
    templates: int = 4  # slots

    def __post_init__(self) -> None:
        for name in ("tokens", "atoms"):
            sizes = getattr(self, name)
            if not sizes or sizes[0] < 1 or list(sizes) != sorted(set(sizes)):
                raise ValueError(f"{name} must be positive and increase, not {sizes}")
        if self.rows < 1 or self.templates < 1:
            raise ValueError(f"rows ({self.rows}) and templates ({self.templates}) are at least 1")

    def shape(self, tokens: int, atoms: int) -> tuple[int, int]:
        """The bucket of a batch of so many tokens and atoms.

        Raises:
            ValueError: It is larger than every bucket.
        """
        found = []
        for name, sizes, size in (("tokens", self.tokens, tokens), ("atoms", self.atoms, atoms)):
            large = [one for one in sizes if one >= size]
            if not large:
                raise ValueError(
                    f"a batch of {size} {name} fits no bucket; the largest has {sizes[-1]}"
                )
            found.append(large[0])
        return found[0], found[1]

    def pad(self, batch: Batch) -> Batch:
        """The batch in its bucket's shape; what is added is False in every mask.

        Raises:
            ValueError: The batch is larger than every bucket.
        """
        for name, size, limit in (
            ("alignment rows", len(batch.msa), self.rows),
            ("templates", len(batch.template_mask), self.templates),
        ):
            if size > limit:
                raise ValueError(f"a batch of {size} {name} fits no bucket; they have {limit}")
        padded = pad_batch(batch, *self.shape(batch.num_tokens, batch.num_atoms))
        rows = {name: _pad_rows(getattr(padded, name), self.rows) for name in _ALIGNMENT}
        slots = {name: _pad_rows(getattr(padded, name), self.templates) for name in _TEMPLATES}
        return replace(padded, **rows, **slots)


def _pad_rows(value: torch.Tensor, rows: int) -> torch.Tensor:
    """Zeros after the last row."""
    return torch.cat([value, value.new_zeros((rows - len(value), *value.shape[1:]))])

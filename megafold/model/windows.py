"""Windows of atoms: each 32 queries attend to the 128 keys around them.

Attention over atoms would be quadratic in thousands of atoms; the windows make it linear.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.nn.functional import pad

QUERIES, KEYS = 32, 128
BEFORE = (KEYS - QUERIES) // 2


@dataclass(frozen=True)
class AtomWindows:
    """How A atoms fall into W windows.

    The centres of the key ranges are 15.5, 47.5, ... (Algorithm 7): window w asks atoms
    32 w to 32 w + 31 and looks at 32 w - 48 to 32 w + 79. Beyond the ends stand zeros.
    """

    num_atoms: int
    key_mask: torch.Tensor  # [W, 128] bool, False beyond the ends and for masked atoms

    @classmethod
    def of(cls, atom_mask: torch.Tensor) -> AtomWindows:
        """Windows over atoms with mask ``[A]`` bool."""
        key_mask = _key_ranges(atom_mask.unsqueeze(0)).squeeze(0)
        return cls(atom_mask.shape[0], key_mask)

    def queries(self, x: torch.Tensor) -> torch.Tensor:
        """x ``[S, A, *rest]`` -> ``[W, S, 32, *rest]``."""
        x = _pad_atoms(x, 0, -self.num_atoms % QUERIES)
        return x.unflatten(1, (-1, QUERIES)).transpose(0, 1)

    def keys(self, x: torch.Tensor) -> torch.Tensor:
        """x ``[S, A, *rest]`` -> ``[W, S, 128, *rest]``, an overlapping view of padded x."""
        return _key_ranges(x).transpose(0, 1)

    def merge(self, x: torch.Tensor) -> torch.Tensor:
        """x ``[W, S, 32, *rest]`` -> ``[S, A, *rest]``; undoes ``queries``."""
        return x.transpose(0, 1).flatten(1, 2)[:, : self.num_atoms]


def _key_ranges(x: torch.Tensor) -> torch.Tensor:
    """x ``[S, A, *rest]`` -> ``[S, W, 128, *rest]``."""
    x = _pad_atoms(x, BEFORE, -x.shape[1] % QUERIES + BEFORE)
    return x.unfold(1, KEYS, QUERIES).movedim(-1, 2)


def _pad_atoms(x: torch.Tensor, before: int, after: int) -> torch.Tensor:
    return pad(x, (0, 0) * (x.dim() - 2) + (before, after))

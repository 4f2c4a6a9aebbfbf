"""Points without a structure."""

from __future__ import annotations

import torch

ALL = torch.ones(40, dtype=torch.bool)


def points(seed: int = 0, n: int = 40) -> torch.Tensor:
    """Random points ``[n, 3]``, some 8 angstrom from the origin."""
    return 8 * torch.randn(n, 3, generator=torch.Generator().manual_seed(seed))

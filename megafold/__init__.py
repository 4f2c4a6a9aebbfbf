"""MegaFold: system-level optimisations for training AlphaFold-3-class models.

Importing this package loads nothing heavy; import the part you need:
``megafold.ops``, ``megafold.model``, ``megafold.data``, ``megafold.train``,
``megafold.metrics``, ``megafold.bench``, ``megafold.viz``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

__version__ = "0.1.0"


def device() -> torch.device:
    """The device to work on: the first GPU (NVIDIA or AMD) where there is one, else the CPU."""
    import torch

    return torch.device("cuda" if torch.cuda.is_available() else "cpu")

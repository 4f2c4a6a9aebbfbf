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


def device(name: str | None = None) -> torch.device:
    """The device to work on: the one called ``name``, or the first GPU, or else the CPU.

    A GPU, NVIDIA's or AMD's, is ``cuda``, the second of several ``cuda:1``.

    Raises:
        ValueError: There is no such device.
    """
    import torch

    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if name is None:
        return torch.device("cuda" if gpus else "cpu")
    known = ["cpu", *["cuda"][:gpus], *(f"cuda:{i}" for i in range(gpus))]
    if name not in known:
        raise ValueError(f"no device {name!r}; there are: {', '.join(known)}")
    return torch.device(name)

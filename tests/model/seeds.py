"""Random numbers for the tests of the model."""

import torch


def seeded(seed: int = 0) -> torch.Generator:
    """A fresh generator on the CPU."""
    return torch.Generator().manual_seed(seed)

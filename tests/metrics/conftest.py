"""Real structures and predictions of them: the truth, perturbed."""

from __future__ import annotations

from functools import cache

import numpy as np
import pytest
import torch
from biotite.structure import AtomArray

from megafold import data
from megafold.data.batch import Batch

_batch = cache(data.example_batch)


@pytest.fixture(scope="session")
def batch_of():
    """Sample id -> ``Batch``."""

    def get(sample_id: str) -> Batch:
        return _batch(sample_id)

    return get


@pytest.fixture(scope="session")
def perturbed():
    """A batch's true coordinates, each atom moved, and one end swung far away."""

    def make(batch: Batch, spread: float, seed: int = 0) -> torch.Tensor:
        generator = torch.Generator().manual_seed(seed)
        x = batch.positions + spread * torch.randn(batch.positions.shape, generator=generator)
        x[: len(x) // 8] += torch.tensor([9.0, -4.0, 2.0])
        return x

    return make


@pytest.fixture(scope="session")
def atoms_of():
    """Batch and coordinates ``[A, 3]`` -> biotite's ``AtomArray``."""

    def make(batch: Batch, coordinates: torch.Tensor) -> AtomArray:
        layout = batch.layout
        array = AtomArray(len(layout))
        array.coord = coordinates.numpy().astype(np.float32)
        array.chain_id, array.res_id = layout.chain_id.astype("U4"), layout.residue_number
        array.res_name, array.atom_name = layout.residue_name, layout.atom_name
        return array

    return make

"""Attention among atoms is linear in their number: no tensor over pairs of atoms."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from megafold import data
from megafold.data.batch import Batch
from megafold.model import CONFIGS
from megafold.model.atoms import AtomAttentionDecoder, AtomAttentionEncoder
from megafold.model.windows import AtomWindows
from tests.model.largest import LargestTensor
from tests.model.seeds import seeded


@pytest.fixture(scope="module")
def batches(capsid) -> tuple[Batch, Batch]:
    """A quarter of 1A8O and all of it."""
    quarter = capsid.select(np.arange(capsid.num_tokens // 4))
    generator = np.random.default_rng(0)
    return tuple(data.make_batch(some, generator=generator) for some in (quarter, capsid))


def largest_tensor(batch: Batch) -> LargestTensor:
    """Of encoder and decoder of the diffusion module, with gradients."""
    # So narrow that a pair of atoms would stand out, were there a tensor over them.
    config = dataclasses.replace(
        CONFIGS["tiny"], c_z=4, c_atompair=2, atom_heads=2, c_atom=16, c_token=16
    )
    encoder = AtomAttentionEncoder(config, config.c_token, conditioned=True)
    decoder = AtomAttentionDecoder(config)
    windows = AtomWindows.of(batch.atom_mask)
    s = torch.randn(batch.num_tokens, config.c_s, generator=seeded())
    z = torch.randn(batch.num_tokens, batch.num_tokens, config.c_z, generator=seeded())
    noisy = torch.randn(1, batch.num_atoms, 3, generator=seeded())
    with LargestTensor() as largest:
        condition = encoder.condition(batch, windows, s, z)
        atoms = encoder.encode(batch, windows, condition, noisy)
        norm = torch.nn.LayerNorm(config.c_token)
        decoder(atoms.tokens, norm, atoms, batch, windows).sum().backward()
    return largest


def test_the_largest_tensor_grows_with_atoms_and_not_with_their_square(batches):
    small, large = (largest_tensor(batch) for batch in batches)
    assert large.entries < batches[1].num_atoms ** 2 / 2, large.made_by
    grown = batches[1].num_atoms / batches[0].num_atoms
    assert grown > 3.5
    assert large.entries <= 1.1 * grown * small.entries, large.made_by

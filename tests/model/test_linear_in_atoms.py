"""The model is linear in the number of atoms: no tensor over pairs of atoms anywhere."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from megafold import data
from megafold.data.batch import Batch
from megafold.model import (
    CONFIGS,
    STAGES,
    AlphaFold3,
    predict_confidence,
    sample,
    training_loss,
)
from megafold.model.atoms import AtomAttentionDecoder, AtomAttentionEncoder
from megafold.model.windows import AtomWindows
from tests.model.largest import LargestTensor, TensorsOverPairs
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


def test_nothing_in_training_or_sampling_is_over_pairs_of_atoms(batches):
    batch = dataclasses.replace(batches[1], resolution=2.0)
    config = dataclasses.replace(
        CONFIGS["tiny"], c_s=16, c_z=8, c_m=8, c_atom=16, c_token=16, diffusion_samples=2
    )
    model = AlphaFold3(config)
    with TensorsOverPairs(batch.num_atoms) as pairs:
        stage = STAGES["fine_tuning_3"]
        training_loss(model, batch, generator=seeded(), stage=stage).total.backward()
        x = sample(model, batch, generator=seeded(), steps=1, samples=2)
        predict_confidence(model, batch, x)
    assert pairs.found == set()


def test_a_tensor_over_pairs_of_atoms_would_be_seen(batches):
    x = batches[1].positions
    with TensorsOverPairs(len(x)) as pairs:
        torch.cdist(x, x)
        (x[:, None, 0] - x[:, 0]).flatten()
    assert len(pairs.found) >= 3

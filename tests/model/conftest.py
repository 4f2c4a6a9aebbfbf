"""A real peptide and a small model, the same for every test of the model."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from megafold import data
from megafold.data.batch import Batch
from megafold.model import AlphaFold3


@pytest.fixture(scope="session")
def batch() -> Batch:
    """1AS5, a conotoxin with modified residues, given a bond, a template and a resolution."""
    batch = data.example_batch("1AS5")
    n = batch.num_tokens
    generator = torch.Generator().manual_seed(0)
    some = torch.rand(1, n, generator=generator) < 0.8
    bonds = torch.zeros_like(batch.token_bonds)
    bonds[0, 16] = bonds[16, 0] = True
    return dataclasses.replace(
        batch,
        token_bonds=bonds,
        ligand_bonds=torch.tensor([[3, 60], [10, 80]]),
        resolution=2.0,
        template_mask=torch.ones(1, dtype=torch.bool),
        template_restype=batch.restype[None],
        template_pseudo_beta_mask=some,
        template_backbone_frame_mask=some,
        template_distogram=torch.randint(0, 39, (1, n, n), generator=generator),
        template_unit_vector=torch.randn(1, n, n, 3, generator=generator),
    )


@pytest.fixture(scope="session")
def crambin() -> Batch:
    """1CRN, a small protein at high resolution."""
    return data.example_batch("1CRN")


@pytest.fixture(scope="session")
def capsid() -> data.Features:
    """1A8O: two identical chains of 70 residues."""
    return data.example_features("1A8O")


@pytest.fixture(scope="session")
def dimer(capsid) -> Batch:
    """Thirty residues of each chain of 1A8O."""
    number = capsid.residue_index
    chosen = capsid.select(np.flatnonzero((number > 20) & (number <= 50)))
    return data.make_batch(chosen, generator=np.random.default_rng(0), whole=capsid)


@pytest.fixture
def model() -> AlphaFold3:
    """The tiny model with every parameter moved off its initial zeros."""
    torch.manual_seed(0)
    model = AlphaFold3.from_name("tiny")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
    return model.eval()

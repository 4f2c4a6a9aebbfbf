"""What the model cannot work with is refused by name."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from megafold.model import sample, training_loss
from megafold.model.checks import check_batch
from tests.model.seeds import seeded


@pytest.mark.parametrize("generator", [None, 0, "seed"])
def test_a_missing_generator_is_named(model, batch, generator):
    for run in (training_loss, sample):
        with pytest.raises(TypeError, match=r"generator must be a torch\.Generator, got"):
            run(model, batch, generator=generator)


def test_a_good_batch_passes(model, batch, dimer):
    check_batch(model.config, batch)
    check_batch(model.config, dimer)


def test_an_entity_of_no_known_kind_is_named(model, batch):
    kind = batch.is_protein.clone()
    kind[4] = False
    strange = dataclasses.replace(batch, is_protein=kind)
    with pytest.raises(ValueError, match=r"token 4 \(.* of chain A\) is neither protein, RNA"):
        training_loss(model, strange, generator=seeded())
    with pytest.raises(ValueError, match="token 4"):
        sample(model, strange, generator=seeded())


def test_a_token_of_too_many_atoms_is_named(model, batch):
    crowded = dataclasses.replace(batch, atom_to_token=batch.atom_to_token.clamp(min=20))
    few = dataclasses.replace(crowded, token_mask=torch.arange(batch.num_tokens) >= 20)
    with pytest.raises(ValueError, match=r"has \d+ atoms, but a token has at most 24"):
        check_batch(model.config, few)


def test_a_token_without_atoms_is_named(model, batch):
    atoms = batch.atom_mask & (batch.atom_to_token != 7)
    with pytest.raises(ValueError, match=r"token 7 .* has no atom"):
        check_batch(model.config, dataclasses.replace(batch, atom_mask=atoms))


def test_an_unknown_element_is_named(model, batch):
    element = batch.ref_element.clone()
    element[3] = 128
    with pytest.raises(ValueError, match=r"atomic number 128; known are 0 to 127"):
        check_batch(model.config, dataclasses.replace(batch, ref_element=element))


def test_a_batch_without_tokens_is_refused(model, batch):
    masked = dataclasses.replace(batch, token_mask=torch.zeros_like(batch.token_mask))
    with pytest.raises(ValueError, match="every token of the batch is masked"):
        check_batch(model.config, masked)

"""The number of parameters, and that the page about the model states it."""

from __future__ import annotations

from pathlib import Path

import pytest

from megafold.model import CONFIGS, AlphaFold3
from megafold.model.parameters import count_parameters, parameter_table

PAGE = Path(__file__).parents[2] / "docs" / "model.md"


def test_the_full_model_has_as_many_parameters_as_open_models_of_its_class():
    assert count_parameters("af3")["total"] == pytest.approx(368e6, rel=0.002)


def test_blocks_add_up_to_the_model():
    counts = count_parameters("tiny")
    assert counts["total"] == AlphaFold3.from_name("tiny").num_parameters()
    assert all(counts.values())


def test_the_page_about_the_model_has_the_table():
    assert parameter_table(tuple(CONFIGS)) in PAGE.read_text(encoding="utf-8")


def test_the_full_configuration_has_the_numbers_of_the_supplement():
    af3 = CONFIGS["af3"]
    sizes = (af3.c_s, af3.c_z, af3.c_s_inputs, af3.c_m, af3.c_atom, af3.c_atompair, af3.c_token)
    assert sizes == (384, 128, 449, 64, 128, 16, 768)
    blocks = (af3.msa_blocks, af3.pairformer_blocks, af3.template_blocks, af3.atom_blocks,
              af3.diffusion_blocks, af3.confidence_blocks)  # fmt: skip
    assert blocks == (4, 48, 2, 3, 24, 4)
    heads = (af3.msa_heads, af3.triangle_heads, af3.pairformer_heads, af3.atom_heads,
             af3.diffusion_heads)  # fmt: skip
    assert heads == (8, 4, 16, 4, 16)
    bins = (af3.distogram_bins, af3.plddt_bins, af3.pae_bins, af3.pde_bins)
    assert bins == (64, 50, 64, 64)
    assert (af3.cycles, af3.diffusion_samples, af3.rollout_steps) == (4, 48, 20)
    assert (af3.pair_dropout, af3.msa_dropout, af3.checkpointing) == (0.25, 0.15, True)

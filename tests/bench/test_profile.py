"""A whole training step, measured."""

from __future__ import annotations

from dataclasses import replace

import pytest

from megafold import data
from megafold.bench import memory
from megafold.bench.profile import TrainingStep
from megafold.model import CONFIGS

CONFIG = replace(CONFIGS["tiny"], diffusion_samples=2, checkpointing=False)


@pytest.fixture(scope="module")
def batch():
    return data.example_batch("1A8O", crop=8)


@pytest.fixture(scope="module")
def step(batch) -> TrainingStep:
    return TrainingStep(CONFIG, batch)


def test_memory_of_a_step_adds_up(step):
    found = step.memory()
    assert found.parameters == found.gradients == 4 * step.num_parameters
    assert found.optimizer > 2 * found.parameters  # two moments, and a count for each tensor
    saved = sum(memory.bytes_by_maker(step.saved()).values())
    assert found.activations == saved > 0


def test_peak_covers_what_is_kept(step):
    assert step.peak() > step.memory().activations


def test_activations_grow_with_tokens_and_the_rest_does_not(step, batch):
    larger = TrainingStep(CONFIG, data.example_batch("1A8O", crop=16)).memory()
    smaller = step.memory()
    assert larger.activations > 1.5 * smaller.activations
    assert (larger.parameters, larger.optimizer) == (smaller.parameters, smaller.optimizer)


def test_checkpointing_keeps_less_and_calls_more(step, batch):
    checkpointed = TrainingStep(replace(CONFIG, checkpointing=True), batch)
    assert checkpointed.memory().activations < step.memory().activations / 2
    assert checkpointed.calls()["linear"] > step.calls()["linear"]


def test_calls_do_not_depend_on_width_or_tokens(step, batch):
    wide = TrainingStep(replace(CONFIG, c_z=48), batch)
    assert wide.calls()["linear"] == step.calls()["linear"] > 0

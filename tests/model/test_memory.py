"""A batch too large for memory is refused before it fails, and one that fits is not."""

from __future__ import annotations

import dataclasses
import re
from types import SimpleNamespace

import pytest
import torch

from megafold import data, ops
from megafold.bench.memory import peak_bytes
from megafold.model import (
    CONFIGS,
    AlphaFold3,
    BatchTooLargeError,
    memory,
    sample,
    training_loss,
)
from megafold.model.memory import available_memory, estimate_memory
from tests.model.seeds import seeded


@pytest.mark.parametrize("checkpointing", [True, False])
def test_the_estimate_is_what_a_step_takes(checkpointing):
    config = dataclasses.replace(CONFIGS["tiny"], checkpointing=checkpointing, diffusion_samples=4)
    model = AlphaFold3(config).train()
    batch = dataclasses.replace(data.example_batch("1A8O", crop=56), resolution=2.0)
    took = peak_bytes(
        lambda: training_loss(model, batch, generator=seeded()).total.backward(), "cpu"
    )
    took -= 4 * model.num_parameters()  # their gradients
    assert 0.5 < estimate(config, batch, 4, training=True) / took < 1.3
    took = peak_bytes(lambda: sample(model, batch, generator=seeded(), steps=1, samples=4), "cpu")
    assert 0.5 < estimate(config, batch, 4, training=False) / took < 1.3


def estimate(config, batch, samples, *, training):
    return estimate_memory(
        config, batch.num_tokens, batch.num_atoms, batch.msa.shape[0], samples,
        training=training, fused=False,
    )  # fmt: skip


def test_it_says_how_large_and_what_to_change(model, batch, monkeypatch):
    monkeypatch.setattr(memory, "available_memory", lambda device: 40_000_000)
    message = (
        r"training on 46 tokens and 185 atoms with the configuration 'tiny' takes about 0\.\d GB, "
        r"and cpu has 0\.0 GB left: crop it to \d+ tokens or fewer, or take fewer than 16 samples "
        r"at once, or set checkpointing"
    )
    with pytest.raises(BatchTooLargeError, match=message):
        training_loss(model, batch, generator=seeded())
    with pytest.raises(BatchTooLargeError, match="sampling 46 tokens"):
        sample(model, batch, generator=seeded(), steps=2, samples=10_000)


def test_the_size_it_advises_would_fit(model, batch, monkeypatch):
    monkeypatch.setattr(memory, "available_memory", lambda device: 40_000_000)
    with pytest.raises(BatchTooLargeError) as refused:
        training_loss(model, batch, generator=seeded())
    tokens = int(re.search(r"crop it to (\d+) tokens", str(refused.value))[1])
    atoms = tokens * batch.num_atoms // batch.num_tokens
    sizes = (tokens, atoms, len(batch.msa), model.config.diffusion_samples)
    assert estimate_memory(model.config, *sizes, training=True, fused=False) <= 40_000_000


def test_where_free_memory_is_unknown_nothing_is_refused(model, batch, monkeypatch):
    monkeypatch.setattr(memory, "available_memory", lambda device: None)
    assert torch.isfinite(training_loss(model, batch, generator=seeded()).total)


def test_this_machine_has_memory():
    assert available_memory(torch.device("cpu")) > 1e8
    assert available_memory(torch.device("meta")) is None


def test_it_grows_with_everything_that_it_depends_on():
    def size(tokens=384, atoms=3000, rows=512, samples=48, **options):
        options = {"training": True, "fused": True} | options
        return estimate_memory(CONFIGS["af3"], tokens, atoms, rows, samples, **options)

    for larger in (
        size(tokens=768), size(fused=False), size(atoms=30_000, samples=400),
    ):  # fmt: skip
        assert larger > size()
    assert size(training=False) < size()
    assert size(element_size=2) < size()
    assert 5e9 < size() < 40e9  # one crop of the first stage fits one GPU


def test_pytorch_s_operators_are_estimated_as_such_on_a_gpu(model, monkeypatch):
    fused = []

    def estimate(*_, **options):
        fused.append(options["fused"])
        return 0

    monkeypatch.setattr(memory, "estimate_memory", estimate)
    monkeypatch.setattr(memory, "available_memory", lambda device: 1)
    batch = SimpleNamespace(
        positions=SimpleNamespace(device=torch.device("cuda")),
        msa=torch.empty(1, 9), num_tokens=9, num_atoms=90,
    )  # fmt: skip
    memory.check_memory(model, batch, samples=1, training=True)
    with ops.use("torch"):
        memory.check_memory(model, batch, samples=1, training=True)
    assert fused == [True, False]

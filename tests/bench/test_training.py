"""What a training step costs, measured."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from megafold import data, ops
from megafold.bench.records import environment
from megafold.bench.training import IMPLEMENTATIONS, step_costs
from megafold.model import CONFIGS, AlphaFold3
from megafold.model.pairformer import PairformerBlock
from megafold.model.triangle import PairStack
from megafold.train import Trainer


def test_each_batch_is_a_record_of_a_whole_step():
    batches = [data.example_batch("1A8O", crop=n) for n in (8, 16)]
    records = list(step_costs(batches, "tiny", "cpu", checkpointing=True, seconds=0.0))
    assert [record.shape for record in records] == ["tiny checkpointed N8", "tiny checkpointed N16"]
    assert {record.op for record in records} == {"train_step"}
    assert len({record.date for record in records}) == 1
    assert all(record.ms_q1 <= record.ms <= record.ms_q3 for record in records)
    # A step holds at least the gradients, one float32 for each of a million parameters.
    assert all(record.peak_mb > 4.0 for record in records)


def test_checkpointing_lowers_the_peak():
    batches = [data.example_batch("1A8O", crop=32)]
    plain, kept = (
        next(step_costs(batches, "tiny", "cpu", checkpointing=flag, seconds=0.0)).peak_mb
        for flag in (False, True)
    )
    assert kept < 0.7 * plain


def test_peers_are_the_same_model_by_pytorch_s_operators(monkeypatch):
    seen = []
    compiled = []
    monkeypatch.setattr(
        AlphaFold3, "forward", noting(AlphaFold3.forward, lambda: seen.append(ops.backend()))
    )
    monkeypatch.setattr(
        torch, "compile", lambda of, **_: noting(of, lambda: compiled.append(type(of.__self__)))
    )
    batch = data.example_batch("1A8O", crop=8)
    around = environment("cpu")
    for name in IMPLEMENTATIONS:
        (cost,) = step_costs(
            [batch], "tiny", "cpu", checkpointing=False, implementation=name, seconds=0.0,
            around=around,
        )  # fmt: skip
        assert (cost.impl, cost.dtype, cost.date) == (name, "float32", around.date)
        assert set(seen) == {"auto" if name == "megafold" else "torch"}
        assert bool(compiled) == (name == "compile")
        seen.clear()
    assert {PairformerBlock, PairStack} <= set(compiled)


def noting(function, note):
    def noted(*args, **kwargs):
        note()
        return function(*args, **kwargs)

    return noted


def test_every_step_draws_the_same_numbers(monkeypatch):
    losses = []
    step = Trainer.step

    def kept(trainer, batch):
        record = step(trainer, batch)
        losses.append((trainer.generator.get_state(), record.losses["distogram"]))
        return record

    monkeypatch.setattr(Trainer, "step", kept)
    batch = data.example_batch("1A8O", crop=8)
    list(step_costs([batch], "tiny", "cpu", checkpointing=False, seconds=0.0))
    assert len(losses) > 2
    assert all(torch.equal(state, losses[0][0]) for state, _ in losses)


@pytest.mark.parametrize("name", ["small", "af3"])
def test_a_step_has_two_cycles(name, monkeypatch):
    class Cycles(Exception):
        pass

    def forward(model, batch, *, generator, cycles):
        raise Cycles(cycles)

    monkeypatch.setattr(AlphaFold3, "forward", forward)
    config = CONFIGS["tiny"]  # all that counts of the other is how many cycles it may have
    monkeypatch.setitem(CONFIGS, name, dataclasses.replace(config, cycles=CONFIGS[name].cycles))
    with pytest.raises(Cycles, match=r"^2$"):
        next(step_costs([data.example_batch("1A8O", crop=8)], name, "cpu", checkpointing=True))


def test_an_unknown_implementation_is_refused():
    with pytest.raises(ValueError, match="unknown implementation 'jit'; choose one of"):
        next(step_costs([], "tiny", "cpu", checkpointing=False, implementation="jit"))

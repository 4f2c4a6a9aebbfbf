"""Training: the loss falls, and a run is repeatable."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch

from megafold import data
from megafold.model import AlphaFold3
from megafold.train import (
    Recipe,
    TrainConfig,
    Trainer,
    load_or_memorise,
    memorise,
)


@pytest.fixture(scope="module")
def batch():
    return data.example_batch("1AS5")


def trainer() -> Trainer:
    torch.manual_seed(0)
    return Trainer(AlphaFold3.from_name("tiny"), TrainConfig(warmup_steps=10))


def test_the_loss_falls(batch):
    run = trainer()
    for _ in range(40):
        run.step(batch)
    totals = [record.losses["total"] for record in run.history]
    assert sum(totals[-5:]) < 0.85 * sum(totals[:5])


def test_two_runs_from_one_seed_are_the_same(batch):
    first, second = trainer(), trainer()
    for _ in range(2):
        a, b = first.step(batch), second.step(batch)
        assert a.losses == b.losses
        assert a.gradient_norm == b.gradient_norm


def test_a_loss_that_is_not_finite_is_an_error_and_changes_no_weight(batch):
    run = trainer()
    spoilt = dataclasses.replace(batch, positions=batch.positions * torch.nan)
    before = {k: v.clone() for k, v in run.model.state_dict().items()}
    with pytest.raises(FloatingPointError, match="at step 0"):
        run.step(spoilt)
    assert all(torch.equal(v, before[k]) for k, v in run.model.state_dict().items())


def test_a_gradient_that_is_not_finite_changes_neither_weights_nor_moments(batch):
    run = trainer()
    run.step(batch)
    before = {name: t.clone() for name, t in run.state()[0].items()}
    weight = run.model.pairformer.blocks[0].transition.linear_out.weight
    hook = weight.register_hook(lambda grad: grad * torch.inf)
    with pytest.raises(FloatingPointError, match=r"gradient norm is (nan|inf) at step 1"):
        run.step(batch)
    kept = [name for name in before if not name.startswith(("generator", "random"))]
    after = run.state()[0]
    assert [name for name in kept if not torch.equal(after[name], before[name])] == []
    hook.remove()
    assert run.step(batch).step == 1
    after = run.state()[0]
    assert all(int(t) == 2 for name, t in after.items() if name.endswith(".step"))


def test_the_stage_decides_which_losses_count(batch):
    judged = dataclasses.replace(batch, resolution=2.0)
    taught = {}
    for name in ("initial", "fine_tuning_3"):
        torch.manual_seed(0)
        run = Trainer(AlphaFold3.from_name("tiny"), TrainConfig(stage=name))
        run.step(judged)
        taught[name] = bool(run.model.confidence_head.pae.linear.weight.grad.any())
    assert taught == {"initial": False, "fine_tuning_3": True}
    with pytest.raises(ValueError, match="unknown training stage 'last'"):
        Trainer(AlphaFold3.from_name("tiny"), TrainConfig(stage="last"))


def test_the_average_follows_the_weights(batch):
    run = trainer()
    for _ in range(3):
        run.step(batch)
    for averaged, current in zip(run.averaged.parameters(), run.model.parameters(), strict=True):
        assert torch.isfinite(averaged).all()
        assert (averaged - current).abs().max() < 0.01


def test_the_learning_rate_warms_up_and_decays():
    config = TrainConfig()
    assert config.learning_rate_at(0) == pytest.approx(1.8e-6)
    assert config.learning_rate_at(999) == pytest.approx(1.8e-3)
    assert config.learning_rate_at(50_000) == pytest.approx(1.8e-3 * 0.95)


def test_a_kept_run_is_found_again_and_another_recipe_is_not_taken_for_it(tmp_path):
    recipe = Recipe(steps=2, evaluate_every=1, sampler_steps=2)
    run = load_or_memorise(recipe, tmp_path)
    assert [e.step for e in run.evaluations] == [1, 2]

    def no_steps(steps, **_):
        raise AssertionError("trained again")

    again = load_or_memorise(recipe, tmp_path, progress=no_steps)
    assert again.history == run.history
    assert again.evaluations == run.evaluations
    with pytest.raises(AssertionError, match="trained again"):
        load_or_memorise(dataclasses.replace(recipe, steps=3), tmp_path, progress=no_steps)


def test_a_run_goes_on_from_its_state_as_if_it_had_not_stopped(tmp_path):
    recipe = Recipe(steps=4, evaluate_every=2, sampler_steps=2)
    whole = memorise(recipe)
    file = tmp_path / "runs" / "state"
    first = memorise(dataclasses.replace(recipe, steps=2), state=file)
    torch.rand(3)  # others draw, too
    second = memorise(recipe, state=file)
    assert [e.step for e in first.evaluations] == [2]
    assert second.evaluations == whole.evaluations
    for one, other in zip(second.history, whole.history, strict=True):
        assert dataclasses.replace(one, seconds=0) == dataclasses.replace(other, seconds=0)
    for one, other in zip(second.model.parameters(), whole.model.parameters(), strict=True):
        assert torch.equal(one, other)

    def no_steps(steps, **_):
        assert list(steps) == []
        return steps

    again = memorise(recipe, state=file, progress=no_steps)
    assert again.evaluations == whole.evaluations
    reached = memorise(
        dataclasses.replace(recipe, steps=9), state=file, progress=no_steps, target=0.0
    )
    assert reached.evaluations == whole.evaluations


def test_a_state_of_another_training_is_refused_and_a_damaged_one(tmp_path):
    recipe, file = Recipe(steps=1, sampler_steps=1), tmp_path / "state"
    memorise(recipe, state=file)
    faster = dataclasses.replace(recipe.train, learning_rate=0.5)
    for other, message in (
        (dataclasses.replace(recipe, entry="1CRN"), "the state of memorising 1AS5, not 1CRN"),
        (dataclasses.replace(recipe, train=faster), r"learning_rate was 0\.0036 and is 0\.5"),
        (dataclasses.replace(recipe, model="small"), r"c_s was 64 and is 256"),
    ):
        with pytest.raises(ValueError, match=message):
            memorise(other, state=file)
    content = file.read_bytes()
    for damaged in (b"", b"no state", content[: len(content) // 2]):
        file.write_bytes(damaged)
        with pytest.raises(ValueError, match="is no state of memorising"):
            memorise(recipe, state=file)
        assert file.read_bytes() == damaged


def test_confidence_is_memorised_even_where_the_entry_has_no_resolution(batch):
    assert math.isnan(batch.resolution)  # NMR
    run = memorise(Recipe(steps=2, sampler_steps=1))
    for name in ("plddt", "pae", "pde", "resolved"):
        assert all(record.losses[name] > 0 for record in run.history)


def test_progress_wraps_the_steps():
    seen = []

    def progress(steps, desc):
        seen.append(desc)
        return steps

    memorise(Recipe(steps=1, sampler_steps=1), progress=progress)
    assert seen == ["memorising 1AS5"]

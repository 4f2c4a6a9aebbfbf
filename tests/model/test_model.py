"""The whole model: shapes, gradients, masks, randomness."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace

import pytest
import torch

from megafold import ops
from megafold.data import example_batch
from megafold.data.batch import pad_batch
from megafold.model import (
    CONFIGS,
    STAGES,
    AlphaFold3,
    predict_confidence,
    sample,
    training_loss,
)
from megafold.model.blocks import Blocks
from megafold.model.replay import tensors
from megafold.model.stages import stage_from_name
from tests.model.seeds import seeded


def test_trunk_gives_single_and_pair_representations(model, batch):
    trunk = model(batch, generator=seeded(), cycles=2)
    n, config = batch.num_tokens, model.config
    assert trunk.s_inputs.shape == (n, config.c_s_inputs)
    assert trunk.s.shape == (n, config.c_s)
    assert trunk.z.shape == (n, n, config.c_z)


@pytest.mark.parametrize("name", ["initial", "fine_tuning_3"])
def test_the_total_is_the_sum_of_losses_weighted_as_in_the_stage(model, batch, name):
    stage = STAGES[name]
    losses = training_loss(model, batch, generator=seeded(), stage=stage)
    diffusion = losses.mse + stage.bond_weight * losses.bond + losses.smooth_lddt
    confidence = losses.plddt + losses.pde + losses.resolved + stage.pae_weight * losses.pae
    expected = 4 * diffusion + 0.03 * losses.distogram + 1e-4 * confidence
    assert all(torch.isfinite(value) for value in vars(losses).values())
    assert min(losses.plddt, losses.pde, losses.resolved, losses.pae) > 0
    torch.testing.assert_close(losses.total, expected)


def test_stages_have_the_weights_of_the_supplement():
    table = [(s.crop_size, s.diffusion_samples, s.bond_weight, s.pae_weight)
             for s in STAGES.values()]  # fmt: skip
    assert table == [(384, 48, 0, 0), (640, 32, 1, 0), (768, 32, 1, 0), (768, 32, 1, 1)]
    with pytest.raises(ValueError, match="known: initial, fine_tuning_1"):
        stage_from_name("warmup")


@pytest.mark.parametrize("resolution", [float("nan"), 0.05, 4.1])
def test_confidence_is_learned_from_good_structures_only(model, batch, resolution):
    poor = dataclasses.replace(batch, resolution=resolution)
    losses = training_loss(model, poor, generator=seeded())
    assert losses.plddt == losses.pde == losses.resolved == losses.pae == 0
    assert losses.mse > 0


def test_every_parameter_gets_a_gradient(model, batch):
    recycling = dataclasses.replace(model.config, cycles=2)
    model.config = recycling
    # A seed for which two cycles are drawn: with one, recycling starts from zeros.
    generator = next(g for g in map(seeded, range(50)) if draws_two_cycles(g))
    loss = training_loss(model, batch, generator=generator, stage=STAGES["fine_tuning_3"])
    loss.total.backward()
    silent = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert silent == []


def draws_two_cycles(generator: torch.Generator) -> bool:
    copy = torch.Generator()
    copy.set_state(generator.get_state())
    torch.randint(0, 2**62, (), generator=copy)  # the seed of dropout
    return int(torch.randint(1, 3, (), generator=copy)) == 2


def test_the_confidence_head_does_not_teach_the_trunk(model, batch):
    losses = training_loss(model, batch, generator=seeded())
    (losses.plddt + losses.pde + losses.resolved + losses.pae).backward()
    taught = {name.split(".")[0] for name, p in model.named_parameters() if p.grad is not None}
    assert taught == {"confidence_head"}


def test_same_generator_same_loss_and_gradients(model, batch):
    def run(seed):
        model.zero_grad()
        model.train()
        loss = training_loss(model, batch, generator=seeded(seed)).total
        loss.backward()
        return loss.detach(), [p.grad.clone() for p in model.parameters()]

    (loss, grads), (again, grads_again), (other, _) = run(1), run(1), run(2)
    assert torch.equal(loss, again)
    assert all(torch.equal(a, b) for a, b in zip(grads, grads_again, strict=True))
    assert not torch.equal(loss, other)


def test_the_global_generator_is_left_as_it_was(model, batch):
    before = torch.random.get_rng_state()
    training_loss(model.train(), batch, generator=seeded())
    assert torch.equal(torch.random.get_rng_state(), before)


def test_checkpointing_changes_no_number(model, batch):
    plain = model.train()
    kept = AlphaFold3(dataclasses.replace(plain.config, checkpointing=True)).train()
    kept.load_state_dict(plain.state_dict())
    losses = [training_loss(m, batch, generator=seeded()).total for m in (plain, kept)]
    assert torch.equal(*losses)
    for loss in losses:
        loss.backward()
    for (name, a), b in zip(plain.named_parameters(), kept.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, msg=lambda m, name=name: f"{name}: {m}")


def test_the_torch_backend_is_what_auto_runs_on_the_cpu(model, batch):
    auto = training_loss(model, batch, generator=seeded()).total
    with ops.use("torch"):
        explicit = training_loss(model, batch, generator=seeded()).total
    assert torch.equal(auto, explicit)


def test_padding_changes_no_real_token_or_atom(model, batch):
    n, a = batch.num_tokens, batch.num_atoms
    padded = pad_batch(batch, n + 7, a + 45)
    trunk = model(batch, generator=seeded(), cycles=1)
    trunk_padded = model(padded, generator=seeded(), cycles=1)
    torch.testing.assert_close(trunk_padded.s[:n], trunk.s, atol=2e-4, rtol=2e-4)
    torch.testing.assert_close(trunk_padded.z[:n, :n], trunk.z, atol=2e-4, rtol=2e-4)

    x = 10 * torch.randn(2, a + 45, 3, generator=seeded())
    t = torch.tensor([5.0, 50.0])
    denoised = []
    for b, tr, size in ((batch, trunk, a), (padded, trunk_padded, a + 45)):
        condition = model.diffusion.condition(b, tr)
        denoised.append(model.diffusion(x[:, :size], t, b, tr.windows, condition)[:, :a])
    torch.testing.assert_close(denoised[1], denoised[0], atol=2e-3, rtol=2e-3)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_under_autocast_all_streams_have_its_dtype(model, batch, device):
    model, batch, seen = model.to(device).train(), batch.to(device), []
    for stack in model.modules():
        for block in stack if isinstance(stack, Blocks) else ():
            block.register_forward_pre_hook(lambda _, given: seen.append(given))
    with torch.autocast(device, torch.bfloat16):
        training_loss(model, batch, generator=seeded())
    assert len(seen) > 12
    for given in seen:
        floats = [t.dtype for t in tensors(given) if t.is_floating_point()]
        assert floats
        assert set(floats) == {torch.bfloat16}


def test_bfloat16_autocast_stays_finite(model, batch):
    losses_and_gradients_are_finite(model, batch)


@pytest.mark.gpu
def test_bfloat16_autocast_stays_finite_at_768_tokens():
    batch = example_batch("2XHE", crop=768).to("cuda")
    assert batch.num_tokens == 768
    losses_and_gradients_are_finite(AlphaFold3.from_name("small").to("cuda"), batch)


def losses_and_gradients_are_finite(model, batch):
    device = batch.positions.device.type
    stage = STAGES["fine_tuning_3"]
    with torch.autocast(device, torch.bfloat16):
        losses = training_loss(model.train(), batch, generator=seeded(), stage=stage)
    losses.total.backward()
    assert all(torch.isfinite(value) for value in vars(losses).values())
    for name, parameter in model.named_parameters():
        assert parameter.grad is None or torch.isfinite(parameter.grad).all(), name
    with torch.autocast(device, torch.bfloat16):
        x = sample(model, batch, generator=seeded(), steps=2)
        confidence = predict_confidence(model, batch, x)
    assert torch.isfinite(x).all()
    assert all(torch.isfinite(value).all() for value in (confidence.plddt, confidence.pae))


def test_an_empty_template_slot_changes_nothing(model, batch):
    def with_slots(mask, repeat):
        fields = {
            name: torch.cat([getattr(batch, name)] * repeat)
            for name in vars(batch)
            if name.startswith("template_") and name != "template_mask"
        }
        return dataclasses.replace(batch, template_mask=torch.tensor(mask), **fields)

    one = model(with_slots([True], 1), generator=seeded(), cycles=1).z
    two = model(with_slots([True, False], 2), generator=seeded(), cycles=1).z
    torch.testing.assert_close(one, two)


def test_msa_rows_beyond_the_limit_are_drawn_and_the_query_stays(model):
    module = model.msa_module
    rows = module.draw_rows(rows_available(500), seeded())
    assert len(rows) == model.config.msa_rows
    assert rows[0] == 0
    assert len(set(rows.tolist())) == len(rows)
    assert torch.equal(module.draw_rows(rows_available(10), seeded()), torch.arange(10))


@pytest.mark.parametrize("real", [10, 100])
def test_padding_rows_are_not_drawn_while_there_are_others(model, real):
    module, limit = model.msa_module, model.config.msa_rows
    padded = rows_available(500, real)
    rows = module.draw_rows(padded, seeded())
    assert len(rows) == limit  # one shape for all batches of one shape
    assert (rows < real).sum() == min(real, limit)
    unpadded = module.draw_rows(rows_available(real), seeded())
    assert torch.equal(rows[: len(unpadded)], unpadded)


def rows_available(number, real=None):
    mask = torch.zeros(number, 3, dtype=torch.bool)
    mask[:real, 1] = True
    return SimpleNamespace(msa=torch.zeros(number, 3), msa_mask=mask)


def test_sampling_gives_coordinates_and_is_repeatable(model, batch):
    x = sample(model, batch, generator=seeded(), steps=3, samples=2)
    assert x.shape == (2, batch.num_atoms, 3)
    assert torch.isfinite(x).all()
    assert torch.equal(x, sample(model, batch, generator=seeded(), steps=3, samples=2))
    assert not torch.equal(x[0], x[1])


def test_a_trajectory_ends_in_the_sample(model, batch):
    path = sample(model, batch, generator=seeded(), steps=3, samples=1, trajectory=True)
    assert path.denoised.shape == (3, 1, batch.num_atoms, 3)
    assert (path.noise_levels.diff() < 0).all()
    x = sample(model, batch, generator=seeded(), steps=3, samples=1)
    assert torch.equal(path.coordinates, x)


def test_where_the_truth_stands_in_its_crystal_does_not_matter(model, batch):
    resolved = batch.resolved.clone()
    resolved[:20] = False
    losses = []
    for shift in (0.0, 300.0):
        positions = torch.where(resolved[:, None], batch.positions + shift, 0.0)
        moved = dataclasses.replace(batch, positions=positions, resolved=resolved)
        losses.append(training_loss(model, moved, generator=seeded()).total)
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-3, atol=0)


def test_no_resolved_atom_is_a_clear_error(model, batch):
    nothing = dataclasses.replace(batch, resolved=torch.zeros_like(batch.resolved))
    with pytest.raises(ValueError, match="no resolved atom"):
        training_loss(model, nothing, generator=seeded())


def test_bad_sampler_arguments_are_named(model, batch):
    with pytest.raises(ValueError, match="steps and samples must be at least 1"):
        sample(model, batch, generator=seeded(), steps=0)


def test_configurations_by_name():
    assert AlphaFold3.from_name("tiny").config is CONFIGS["tiny"]
    full = CONFIGS["af3"]
    assert (full.c_s_inputs, full.pairformer_blocks, full.diffusion_blocks) == (449, 48, 24)
    with pytest.raises(ValueError, match="known: af3, small, tiny"):
        AlphaFold3.from_name("huge")

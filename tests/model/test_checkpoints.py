"""Checkpoints: what is saved is loaded, and what does not fit is refused by name."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from megafold.model import AlphaFold3, ModelConfig, training_loss
from megafold.model.checkpoints import CheckpointError, load_model, load_weights, save_model


@pytest.fixture
def saved(model, tmp_path):
    path = tmp_path / "model.safetensors"
    save_model(path, model, {"why": "test"})
    return path


def test_a_checkpoint_gives_the_same_model(model, saved, batch):
    loaded, note = load_model(saved)
    assert note == {"why": "test"}
    assert loaded.config == model.config
    losses = [
        training_loss(m, batch, generator=torch.Generator().manual_seed(0)).total
        for m in (model, loaded)
    ]
    assert torch.equal(*losses)
    assert [p.name for p in saved.parent.iterdir()] == ["model.safetensors"]


def test_weights_go_into_a_model_that_is_there(model, saved):
    other = AlphaFold3.from_name("tiny")
    assert load_weights(other, saved) == ([], [])
    assert all(torch.equal(other.state_dict()[n], v) for n, v in model.state_dict().items())


def test_settings_that_change_no_weight_may_differ(model, saved):
    config = dataclasses.replace(model.config, name="mine", cycles=3, msa_rows=8, pair_dropout=0.0)
    assert load_weights(AlphaFold3(config), saved) == ([], [])


def test_another_configuration_is_refused_naming_each_field(model, saved):
    other = AlphaFold3(dataclasses.replace(model.config, c_z=16, msa_blocks=1))
    before = {name: value.clone() for name, value in other.state_dict().items()}
    message = r"c_z is 32 in the file, 16 in the model; msa_blocks is 2 in the file, 1 in the model"
    with pytest.raises(CheckpointError, match=message):
        load_weights(other, saved)
    assert all(torch.equal(other.state_dict()[n], value) for n, value in before.items())


def altered(path, change) -> None:
    """Rewrite a checkpoint with other weights and the same configuration."""
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    state = load_file(path)
    change(state, metadata)
    save_file(state, path, metadata)


def test_every_name_that_does_not_match_is_listed(model, saved):
    def change(state, metadata):
        state["head.new"] = torch.zeros(1)
        state["head.other"] = torch.zeros(1)
        del state["distogram_head.linear.weight"], state["distogram_head.linear.bias"]
        state["recycle_z.linear.weight"] = torch.zeros(3, 5)

    altered(saved, change)
    for load in (load_model, lambda path: load_weights(model, path)):
        with pytest.raises(CheckpointError) as raised:
            load(saved)
        text = str(raised.value)
        assert "2 missing: distogram_head.linear.weight, distogram_head.linear.bias" in text
        assert "2 unknown: head.new, head.other" in text
        assert "1 of other shapes: recycle_z.linear.weight is (3, 5), expected (32, 32)" in text


def test_without_strictness_what_fits_is_loaded_and_the_rest_named(model, saved):
    def change(state, metadata):
        state["head.new"] = torch.zeros(1)
        del state["distogram_head.linear.bias"]

    altered(saved, change)
    other = AlphaFold3.from_name("tiny")
    bias = other.distogram_head.linear.bias.clone()
    lacking = load_weights(other, saved, strict=False)
    assert lacking == (["distogram_head.linear.bias"], ["head.new"])
    assert torch.equal(other.distogram_head.linear.bias, bias)
    assert torch.equal(other.recycle_z.linear.weight, model.recycle_z.linear.weight)


def test_what_is_no_checkpoint_is_refused(saved, tmp_path):
    with pytest.raises(FileNotFoundError, match="no checkpoint at"):
        load_model(tmp_path / "missing.safetensors")
    broken = tmp_path / "broken.safetensors"
    broken.write_bytes(b"not a checkpoint")
    with pytest.raises(CheckpointError, match=r"broken\.safetensors is not a safetensors file"):
        load_model(broken)
    bare = tmp_path / "bare.safetensors"
    save_file({"x": torch.zeros(1)}, bare)
    with pytest.raises(CheckpointError, match="holds no model configuration"):
        load_model(bare)


def test_a_configuration_of_another_version_is_named(saved):
    def change(state, metadata):
        metadata["config"] = json.dumps({**json.loads(metadata["config"]), "c_new": 3})

    altered(saved, change)
    with pytest.raises(CheckpointError, match="unknown fields c_new"):
        load_model(saved)


@pytest.mark.parametrize(
    ("key", "text", "message"),
    [
        ("config", "{bad", "config is no JSON"),
        ("config", "[1]", "config is list, expected an object"),
        ("config", '{"c_z": "32", "cycles": true}', "c_z is '32', expected int; cycles is True"),
        ("note", "3", "note is int, expected an object"),
    ],
)
def test_a_configuration_that_is_none_is_refused(saved, key, text, message):
    altered(saved, lambda state, metadata: metadata.update({key: text}))
    with pytest.raises(CheckpointError, match=message):
        load_model(saved)


def test_a_field_newer_than_the_file_has_its_default(saved):
    def change(state, metadata):
        config = json.loads(metadata["config"])
        del config["rollout_steps"]
        metadata["config"] = json.dumps(config)

    altered(saved, change)
    assert load_model(saved)[0].config.rollout_steps == ModelConfig().rollout_steps

"""Models on disk: safetensors with the configuration and a note inside. Nothing is pickled.

``megafold.model.protenix`` converts to and from the names of an open model of this class.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from megafold.atomic import atomic_create
from megafold.model.alphafold3 import AlphaFold3
from megafold.model.config import ModelConfig


class CheckpointError(ValueError):
    """A file that is no checkpoint, or one that does not fit. The message says what differs."""


def save_model(path: str | Path, model: AlphaFold3, note: Mapping[str, Any] | None = None) -> None:
    """Write the weights, the configuration and ``note`` (JSON-serialisable) to ``path``.

    Written beside the target and moved into place: the file is whole or not there.
    """
    state = model.state_dict()
    weights = {name: value.detach().cpu().contiguous() for name, value in state.items()}
    metadata = {"config": json.dumps(asdict(model.config)), "note": json.dumps(note or {})}
    atomic_create(path, lambda temporary: save_file(weights, temporary, metadata))


def load_model(
    path: str | Path, device: torch.device | str = "cpu"
) -> tuple[AlphaFold3, dict[str, Any]]:
    """The model saved at ``path``, in evaluation mode, and its note.

    Raises:
        FileNotFoundError: There is no such file.
        CheckpointError: It is no checkpoint of this package, or its weights do not fit its
            configuration; every name is listed.
    """
    state, config, note = read_checkpoint(path)
    model = AlphaFold3(config)
    check_names(model.state_dict(), state, str(path))
    model.load_state_dict(state)
    return model.to(device).eval(), note


def load_weights(
    model: AlphaFold3, path: str | Path, *, strict: bool = True
) -> tuple[list[str], list[str]]:
    """Put the weights saved at ``path`` into ``model``, which is of the same configuration.

    Args:
        model: Keeps its device, dtype and mode. Unchanged if anything is wrong.
        path: Written by ``save_model``.
        strict: Every name must be on both sides. Otherwise those on both are loaded.

    Returns:
        The names that the file lacks, and those that the model lacks; empty if strict.

    Raises:
        FileNotFoundError: There is no such file.
        CheckpointError: It is of another configuration (each field that differs is named), or
            names or shapes differ (each is named).
    """
    state, config, _ = read_checkpoint(path)
    check_config(model.config, config, str(path))
    own = model.state_dict()
    missing, unexpected = check_names(own, state, str(path), strict=strict)
    model.load_state_dict({name: state[name] for name in state if name in own}, strict=False)
    return missing, unexpected


def read_checkpoint(
    path: str | Path,
) -> tuple[dict[str, torch.Tensor], ModelConfig, dict[str, Any]]:
    """Weights by name, configuration and note of a file written by ``save_model``."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no checkpoint at {path}")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise CheckpointError(
            f"{path} is not a safetensors file ({error}); other models' weights have to be "
            "converted first, see docs/checkpoints.md"
        ) from error
    if "config" not in metadata:
        raise CheckpointError(f"{path} holds no model configuration; was it saved by save_model?")
    stored, note = _json_object(metadata, "config", path), _json_object(metadata, "note", path)
    known = {field.name: type(field.default) for field in fields(ModelConfig)}
    if strange := sorted(set(stored) - set(known)):
        raise CheckpointError(
            f"{path} has a configuration of another version: unknown fields {', '.join(strange)}"
        )
    wrong = [
        f"{name} is {value!r}, expected {known[name].__name__}"
        for name, value in stored.items()
        if type(value) is not known[name] and not (known[name] is float and type(value) is int)
    ]
    if wrong:
        raise CheckpointError(f"{path} has a configuration that is none: {'; '.join(wrong)}")
    # A field that is newer than the file has its default, which is what it was before.
    return state, ModelConfig(**stored), note


def _json_object(metadata: Mapping[str, str], key: str, path: Path) -> dict[str, Any]:
    """An object of the file's metadata; empty if there is none."""
    try:
        value = json.loads(metadata.get(key, "{}"))
    except ValueError as error:
        raise CheckpointError(f"{path}: {key} is no JSON ({error})") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: {key} is {type(value).__name__}, expected an object")
    return value


def check_config(model: ModelConfig, file: ModelConfig, source: str) -> None:
    """Raises ``CheckpointError`` naming each field that differs and matters to the weights."""
    free = {"name", "cycles", "msa_rows", "diffusion_samples", "rollout_steps",
            "rollout_step_scale", "checkpointing", "pair_dropout", "msa_dropout"}  # fmt: skip
    differ = [
        f"{field.name} is {getattr(file, field.name)} in the file, "
        f"{getattr(model, field.name)} in the model"
        for field in fields(ModelConfig)
        if field.name not in free and getattr(file, field.name) != getattr(model, field.name)
    ]
    if differ:
        raise CheckpointError(f"{source} is of another configuration: {'; '.join(differ)}")


def check_names(
    expected: Mapping[str, torch.Tensor],
    found: Mapping[str, torch.Tensor],
    source: str,
    *,
    strict: bool = True,
) -> tuple[list[str], list[str]]:
    """Compare the names and shapes of two state dicts.

    Returns:
        The names that are missing in ``found``, and those that only it has.

    Raises:
        CheckpointError: A shape differs; or, if ``strict``, a name is on one side only. All of
            them are listed.
    """
    missing = [name for name in expected if name not in found]
    unexpected = [name for name in found if name not in expected]
    shapes = [
        f"{name} is {tuple(found[name].shape)}, expected {tuple(expected[name].shape)}"
        for name in expected
        if name in found and found[name].shape != expected[name].shape
    ]
    faults = [(f"{len(shapes)} of other shapes", shapes)]
    if strict:
        faults += [(f"{len(missing)} missing", missing), (f"{len(unexpected)} unknown", unexpected)]
    parts = [f"{title}: {', '.join(names)}" for title, names in faults if names]
    if parts:
        raise CheckpointError(f"{source} does not fit the model; weights {'; '.join(parts)}")
    return missing, unexpected

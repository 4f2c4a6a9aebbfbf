"""Models on disk: safetensors with the configuration and a note inside. Nothing is pickled."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from megafold.atomic import atomic_create
from megafold.model import AlphaFold3, ModelConfig


def save_model(path: str | Path, model: AlphaFold3, note: dict[str, Any] | None = None) -> None:
    """Write the weights, the configuration and ``note`` (JSON-serialisable) to ``path``.

    Written beside the target and moved into place: the file is whole or not there.
    """
    tensors = {name: value.detach().cpu() for name, value in model.state_dict().items()}
    metadata = {"config": json.dumps(asdict(model.config)), "note": json.dumps(note or {})}
    weights = {name: value.contiguous() for name, value in tensors.items()}
    atomic_create(path, lambda temporary: save_file(weights, temporary, metadata))


def load_model(
    path: str | Path, device: torch.device | str = "cpu"
) -> tuple[AlphaFold3, dict[str, Any]]:
    """The model saved at ``path``, in evaluation mode, and its note.

    Raises ``FileNotFoundError`` if there is no such file, ``ValueError`` if it is not a
    checkpoint of this package or its weights do not fit its configuration.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no checkpoint at {path}")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"{path} is not a safetensors file: {error}") from error
    if "config" not in metadata:
        raise ValueError(f"{path} holds no model configuration; was it saved by save_model?")
    try:
        model = AlphaFold3(ModelConfig(**json.loads(metadata["config"])))
        model.load_state_dict(state)
    except (RuntimeError, TypeError) as error:
        raise ValueError(f"{path} does not fit this version of the model: {error}") from error
    return model.to(device).eval(), json.loads(metadata["note"])

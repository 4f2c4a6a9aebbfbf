"""Weights from and to the names of Protenix's base model (``protenix_names`` has the table).

Their files hold, pickled, ``{"model": state_dict}`` with names that may begin with ``module.``:
``torch.load(path, map_location="cpu", weights_only=True)["model"]``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from megafold.model.alphafold3 import AlphaFold3
from megafold.model.checkpoints import CheckpointError
from megafold.model.config import ModelConfig
from megafold.model.embedders import NUM_CHAIN_OFFSETS
from megafold.model.protenix_names import (
    BESIDE,
    CHAINS,
    ONLY_OURS,
    ONLY_THEIRS,
    PRODUCT,
    STACK,
    SWAP,
    TWICE,
    ZERO,
    Rule,
    Unmatched,
    pattern,
    rules,
)

# Columns of the features that they embed with three layers: position, charge, the others.
_CONFORMER_COLUMNS = (3, 1, 385)
# Where the template features of restypes j and i begin, and how many there are.
_RESTYPE_COLUMNS = (40, 32)
_REPRESENTABLE = 1e-4  # largest relative error of a weight written as a product


@dataclass(frozen=True)
class Converted:
    """A state dict, and what had no counterpart, with the reason for each."""

    state: dict[str, torch.Tensor]
    missing: tuple[Unmatched, ...]  # weights of the model converted to that had no source
    unused: tuple[Unmatched, ...]  # weights of the model converted from that went nowhere


def from_protenix(theirs: Mapping[str, torch.Tensor], config: ModelConfig) -> Converted:
    """Our state dict from one of Protenix.

    Load it with ``model.load_state_dict(converted.state, strict=False)``: what is in ``missing``
    keeps the values it had. ``protenix_names.DIFFERENCES`` says where the same weights still do
    not compute the same.

    Raises:
        CheckpointError: A name is missing, or is neither in the table nor listed as without a
            counterpart, or a shape is not that of ``config``. All of them are named.
    """
    theirs = {name.removeprefix("module."): value for name, value in theirs.items()}
    table = rules(config)
    used = {name for rule in table for name in rule.theirs}
    unused = _listed([name for name in theirs if name not in used], ONLY_THEIRS, "Protenix")
    if lacking := sorted(used - set(theirs)):
        raise CheckpointError(f"{len(lacking)} weights of Protenix missing: {', '.join(lacking)}")
    shapes = _shapes(config)
    state, wrong = {}, []
    for rule in table:
        parts = [theirs[name] for name in rule.theirs]
        try:
            value = _to_ours(rule, parts, shapes[rule.ours])
        except (RuntimeError, IndexError) as error:
            found = " and ".join(str(tuple(part.shape)) for part in parts)
            wrong.append(f"{' and '.join(rule.theirs)} {found} cannot be joined ({error})")
            continue
        if value.shape != shapes[rule.ours]:
            wrong.append(
                f"{rule.ours} from {' and '.join(rule.theirs)} is {tuple(value.shape)}, "
                f"expected {tuple(shapes[rule.ours])}"
            )
        state[rule.ours] = value
    if wrong:
        raise CheckpointError(f"{len(wrong)} weights of other shapes: {'; '.join(wrong)}")
    missing = _listed([name for name in shapes if name not in state], ONLY_OURS, "ours")
    return Converted(state, missing, unused)


def to_protenix(ours: Mapping[str, torch.Tensor], config: ModelConfig) -> Converted:
    """A state dict of Protenix from one of ours.

    Raises:
        CheckpointError: A name or shape is not that of ``config``, or a weight has a value that
            their model cannot have: a LayerNorm's offset that is not zero where theirs has
            none, template output, a pair embedding of the input that is not one of s_init.
    """
    shapes = _shapes(config)
    if lacking := sorted(set(shapes) - set(ours)):
        raise CheckpointError(f"{len(lacking)} of our weights missing: {', '.join(lacking)}")
    if strange := sorted(set(ours) - set(shapes)):
        raise CheckpointError(f"{len(strange)} weights unknown: {', '.join(strange)}")
    if wrong := [n for n, shape in shapes.items() if ours[n].shape != shape]:
        text = ", ".join(f"{n} {tuple(ours[n].shape)}, not {tuple(shapes[n])}" for n in wrong)
        raise CheckpointError(f"{len(wrong)} weights of other shapes: {text}")
    state: dict[str, torch.Tensor] = {}
    faults = []
    # Products last: the layer they share must be there.
    for rule in sorted(rules(config), key=lambda rule: rule.how == PRODUCT):
        try:
            parts = _to_theirs(rule, ours[rule.ours], state)
        except CheckpointError as error:
            faults.append(str(error))
            continue
        state |= dict(zip(rule.theirs, parts, strict=True))
    if faults:
        raise CheckpointError(f"Protenix cannot have {len(faults)} weights: {'; '.join(faults)}")
    converted = {rule.ours for rule in rules(config)}
    unused = _listed([name for name in ours if name not in converted], ONLY_OURS, "ours")
    return Converted(state, ONLY_THEIRS, unused)


def _shapes(config: ModelConfig) -> dict[str, torch.Size]:
    with torch.device("meta"):
        model = AlphaFold3(config)
    return {name: value.shape for name, value in model.state_dict().items()}


def _listed(names: list[str], known: tuple[Unmatched, ...], side: str) -> tuple[Unmatched, ...]:
    """The entries of ``known`` that the names fall under; every name must."""
    found, strange = {}, []
    for name in names:
        text = pattern(name)
        entry = next((e for e in known if text == e.name or text.startswith(f"{e.name}.")), None)
        if entry is None:
            strange.append(name)
        else:
            found[entry.name] = entry
    if strange:
        raise CheckpointError(
            f"{len(strange)} weights of {side} are not in the table: {', '.join(sorted(strange))}"
        )
    return tuple(found.values())


def _to_ours(rule: Rule, parts: list[torch.Tensor], shape: torch.Size) -> torch.Tensor:
    if rule.how == ZERO:
        return torch.zeros(shape)
    if rule.how == STACK:
        return torch.cat(parts)
    if rule.how == BESIDE:
        return torch.cat(parts, dim=1)
    if rule.how == PRODUCT:
        return (parts[0].double() @ parts[1].double()).to(parts[0].dtype)
    if rule.how == TWICE:
        return 2.0 * parts[0]
    if rule.how == SWAP:
        return _swap_restypes(parts[0])
    if rule.how == CHAINS:
        return _swap_chain_classes(parts[0])
    return parts[0]


def _to_theirs(
    rule: Rule, value: torch.Tensor, state: Mapping[str, torch.Tensor]
) -> list[torch.Tensor]:
    if rule.how == ZERO:
        if bool((value != 0).any()):
            raise CheckpointError(f"{rule.ours} is not zero")
        return []
    if rule.how == STACK:
        return list(value.chunk(len(rule.theirs)))
    if rule.how == BESIDE:
        return list(value.split(_CONFORMER_COLUMNS, dim=1))
    if rule.how == PRODUCT:
        second = state[rule.theirs[1]]
        first = value.double() @ torch.linalg.pinv(second.double())
        error = (first @ second.double() - value.double()).norm()
        if error > _REPRESENTABLE * value.double().norm():
            raise CheckpointError(f"{rule.ours} is no product with {rule.theirs[1]}")
        return [first.to(value.dtype), second]
    if rule.how == TWICE:
        return [0.5 * value]
    if rule.how == SWAP:
        return [_swap_restypes(value)]
    if rule.how == CHAINS:
        return [_swap_chain_classes(value)]
    return [value]


def _swap_restypes(weight: torch.Tensor) -> torch.Tensor:
    """``[C, 108]`` with the columns of the two restypes exchanged."""
    start, number = _RESTYPE_COLUMNS
    end = weight.shape[1] - start - 2 * number
    first, one, other, last = weight.split([start, number, number, end], dim=1)
    return torch.cat([first, other, one, last], dim=1)


def _swap_chain_classes(weight: torch.Tensor) -> torch.Tensor:
    """``[C, 139]`` with the columns of chain offset 0 and of the last class exchanged.

    We give the last class to pairs within a chain, they to pairs of different entities. The
    offset is 0 in theirs within a chain, in ours between entities of as many copies.
    """
    order = list(range(weight.shape[1]))
    last, zero = len(order) - 1, len(order) - 1 - NUM_CHAIN_OFFSETS // 2
    order[last], order[zero] = zero, last
    return weight[:, order]

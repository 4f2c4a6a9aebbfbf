"""The kernels of LayerNorm + Linear as calls have them compiled, for compiling ahead of time."""

from __future__ import annotations

from dataclasses import replace

import torch

from megafold.ops.hopper import DEVICES, recording
from megafold.ops.layer_norm_linear import hopper, launch
from megafold.ops.layer_norm_linear.launch import HALVES
from megafold.ops.recording import distinct, recorded
from megafold.ops.tuning import Config, Entry, tables, use_config
from megafold.ops.tuning.table import DEFAULT
from megafold.ops.variants import KernelVariant

# Sites of AlphaFold 3: the pair representation into triangle attention and into a bias, a
# single representation, the widest; bf16 stands for fp16 as well: the two compile alike.
SHIPPED = (
    (147456, 128, 528, torch.bfloat16),
    (147456, 128, 128, torch.bfloat16),
    (147456, 128, 16, torch.bfloat16),
    (147456, 64, 32, torch.bfloat16),
    (768, 384, 1536, torch.bfloat16),
    (768, 833, 384, torch.bfloat16),
    (147456, 128, 128, torch.float32),
    (768, 833, 384, torch.float32),
)


# Of more outputs than 128: as many as those of the weight leave room for, and the site above.
ON_HOPPER = ((147456, 128, 576), (147456, 128, 528), (147456, 128, 512), (147456, 128, 256))
FORWARD_ON_HOPPER = (*ON_HOPPER, (147456, 128, 192))


def variants() -> list[KernelVariant]:
    """Every kernel with the block sizes of every table, for compiling ahead of time."""
    found = distinct(v for sizes in SHIPPED for v in variants_of(*sizes))
    sharing: dict[int, list[str]] = {}  # devices that have one table
    for device, entries in tables().items():
        sharing.setdefault(id(entries), []).append(device)
    for devices in sharing.values():
        if devices != [DEFAULT]:
            for entry in (e for e in tables()[devices[0]] if e.kernel in launch.KERNELS):
                made = _variant(entry)
                name = f"{made.name} {devices[0]}"
                found.append(replace(made, name=name, devices=tuple(devices)))
    return found + _on_hopper()


def _on_hopper() -> list[KernelVariant]:
    """The kernels that run on Hopper GPUs alone."""
    if not hopper.has_gluon():
        return []
    launched = []
    with recording():
        for dtype in HALVES:
            for sizes in ON_HOPPER:
                launched += variants_of(*sizes, dtype)
            for sizes in FORWARD_ON_HOPPER:
                launched += forward_of(*sizes, dtype, norm=True, bias=False)
                launched += forward_of(*sizes, dtype, norm=False, bias=True)
    found = [v for v in launched if v.name.split(".")[1].startswith("hopper")]
    return [replace(v, devices=DEVICES) for v in distinct(found)]


def _variant(entry: Entry) -> KernelVariant:
    """One kernel, as a call of the sizes of an entry has it compiled."""
    sizes = (entry.sizes[name] for name in "MCO")
    config = Config(entry.blocks, entry.num_warps, entry.num_stages, entry.max_registers)
    with use_config(entry.kernel, config):
        made = variants_of(*sizes, torch.bfloat16)
    return next(variant for variant in made if variant.name.startswith(f"{entry.kernel} "))


def variants_of(m: int, channels: int, outs: int, dtype: torch.dtype) -> list[KernelVariant]:
    """What both passes launch for x ``[m, channels]`` and all parameters, all gradients asked."""

    def empty(*shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    def call() -> None:
        operands = empty(m, channels), empty(channels), empty(channels), empty(outs, channels)
        bias = empty(outs)
        out, stats = launch.forward(*operands, bias, 1e-5)
        launch.backward(out, *operands, bias, stats, (True,) * 5)

    name = f"{str(dtype).removeprefix('torch.')} M{m} C{channels} O{outs}"
    return recorded(call, name)


def forward_of(
    m: int, channels: int, outs: int, dtype: torch.dtype, *, norm: bool, bias: bool
) -> list[KernelVariant]:
    """What the forward pass launches with the norm's parameters, or a bias, or without."""

    def empty(given: bool, *shape: int) -> torch.Tensor | None:
        return torch.empty(shape, dtype=dtype, device="meta") if given else None

    def call() -> None:
        norms = empty(norm, channels), empty(norm, channels)
        weight = empty(True, outs, channels)
        launch.forward(empty(True, m, channels), *norms, weight, empty(bias, outs), 1e-5)

    given = " ".join(name for name, there in (("norm", norm), ("bias", bias)) if there)
    name = f"{str(dtype).removeprefix('torch.')} M{m} C{channels} O{outs} {given or 'plain'}"
    return recorded(call, name)

"""The kernels of the gated linear layer as calls have them compiled, to compile ahead of time."""

from __future__ import annotations

from dataclasses import replace

import torch

from megafold.ops.gated_linear import hopper, launch
from megafold.ops.hopper import DEVICES, HALVES, recording
from megafold.ops.precision import IEEE, TF32, products_in
from megafold.ops.recording import distinct, recorded
from megafold.ops.tuning import Config, Entry, tables, use_config
from megafold.ops.tuning.table import DEFAULT
from megafold.ops.variants import KernelVariant

TOKENS = 384
# Channels, which are as many outputs, dtype, and that of the residual: AlphaFold 3's pair
# representation and that of the tiny model. bf16 stands for fp16 as well: the two compile alike.
SHIPPED = (
    (128, torch.bfloat16, torch.bfloat16),
    (128, torch.bfloat16, torch.float32),
    (128, torch.bfloat16, None),
    (64, torch.bfloat16, torch.bfloat16),
    (32, torch.bfloat16, torch.bfloat16),
    (128, torch.float32, torch.float32),
    (32, torch.float32, torch.float32),
)


def variants() -> list[KernelVariant]:
    """Every kernel with the block sizes of every table, for compiling ahead of time."""
    found = []
    for sizes in SHIPPED:
        for precision in (IEEE, TF32) if sizes[1] == torch.float32 else (IEEE,):
            with products_in(precision):
                found += variants_of(TOKENS, *sizes, tf32=precision == TF32)
    found = distinct(found)
    sharing: dict[int, list[str]] = {}  # devices that have one table
    for device, entries in tables().items():
        sharing.setdefault(id(entries), []).append(device)
    for devices in sharing.values():
        if devices != [DEFAULT]:
            for entry in (e for e in tables()[devices[0]] if e.kernel in launch.KERNELS):
                found += _of_entry(entry, devices)
    return found + _on_hopper()


def _on_hopper() -> list[KernelVariant]:
    """The kernel for Hopper GPUs: with dropout and without, and for rows of one dimension."""
    if not hopper.has_gluon():
        return []
    launched = []
    with recording():
        for dtype in HALVES:
            for of_residual in (dtype, None):
                launched += variants_of(TOKENS, 128, dtype, of_residual)
            launched += variants_of(TOKENS, 128, dtype, None, transposed=False)
    found = [v for v in launched if v.name.split(".")[1].startswith("hopper")]
    return [replace(v, devices=DEVICES) for v in distinct(found)]


def _of_entry(entry: Entry, devices: list[str]) -> list[KernelVariant]:
    """One kernel, as calls with the channels of an entry have it compiled."""
    config = Config(entry.blocks, entry.num_warps, entry.num_stages, entry.max_registers)
    channels, half = entry.sizes["C"], torch.bfloat16
    found = []
    for of_residual in (half, torch.float32, None):
        with use_config(entry.kernel, config):
            made = variants_of(TOKENS, channels, half, of_residual)
        own = next(variant for variant in made if variant.name.startswith(f"{entry.kernel} "))
        found.append(replace(own, name=f"{own.name} {devices[0]}", devices=tuple(devices)))
    return found


def variants_of(
    tokens: int,
    channels: int,
    dtype: torch.dtype,
    of_residual: torch.dtype | None,
    *,
    tf32: bool = False,
    transposed: bool = True,
) -> list[KernelVariant]:
    """What both passes launch for x ``[tokens, tokens, channels]``, all gradients asked.

    x is the transpose that attention around the ending node leaves, and gate a slice of the
    projection that feeds it.

    Args:
        of_residual: its dtype; None for neither a residual nor dropout.
        tf32: what the variants are called; their products are as set.
        transposed: False for x as attention around the starting node leaves it.
    """

    def empty(*shape: int, of: torch.dtype = dtype) -> torch.Tensor:
        return torch.empty(shape, dtype=of, device="meta")

    def call() -> None:
        x = empty(tokens, tokens, channels)
        x = x.transpose(0, 1) if transposed else x
        gate = empty(tokens, tokens, 4 * channels + 16)[..., 3 * channels : 4 * channels]
        weight = empty(channels, channels)
        residual = dropout = None
        if of_residual is not None:
            residual = empty(tokens, tokens, channels, of=of_residual)
            dropout = empty(tokens, 1, channels)
        out = launch.forward(x, gate, weight, residual, dropout)
        launch.backward(out, x, gate, weight, dropout, (True,) * 3)

    name = TF32 if tf32 else str(dtype).removeprefix("torch.")
    beside = "alone" if of_residual is None else f"on {str(of_residual).removeprefix('torch.')}"
    found = recorded(call, f"{name} C{channels} {beside}{'' if transposed else ' in order'}")
    return [v for v in found if v.name.startswith("gated_linear.")]

"""The kernels of triangle multiplication as calls have them compiled, to compile ahead of time."""

from __future__ import annotations

from dataclasses import replace

import torch

from megafold.ops.hopper import DEVICES, HALVES, recording
from megafold.ops.recording import distinct, recorded
from megafold.ops.triangle_multiplication import hopper, passes
from megafold.ops.variants import KernelVariant

TOKENS = 384
# Channels, dtype, and that of z where there are dropout and a residual: AlphaFold 3's pair
# representation and that of the tiny model; bf16 stands for fp16 as well: the two compile alike.
SHIPPED = (
    (128, torch.bfloat16, None),
    (128, torch.bfloat16, torch.bfloat16),
    (128, torch.bfloat16, torch.float32),
    (32, torch.bfloat16, None),
    (32, torch.bfloat16, torch.bfloat16),
    (128, torch.float32, None),
    (128, torch.float32, torch.float32),
)


def variants() -> list[KernelVariant]:
    """Every kernel with the block sizes of the default table, for compiling ahead of time."""
    found = [v for sizes in SHIPPED for v in variants_of(TOKENS, *sizes)]
    return distinct(found) + _on_hopper()


def _on_hopper() -> list[KernelVariant]:
    """The kernels that run on Hopper GPUs alone."""
    if not hopper.has_gluon():
        return []
    with recording():
        found = [
            v
            for dtype in HALVES
            for of_residual in (None, dtype)
            for v in variants_of(TOKENS, hopper.CHANNELS, dtype, of_residual)
        ]
    return [replace(v, devices=DEVICES) for v in distinct(found) if ".hopper" in v.name]


def variants_of(
    tokens: int, channels: int, dtype: torch.dtype, of_residual: torch.dtype | None = None
) -> list[KernelVariant]:
    """What both passes launch for z ``[1, tokens, tokens, channels]``, all gradients asked.

    Args:
        dtype: of the weights.
        of_residual: of z, where it is added to the update behind dropout; None for neither.
    """
    residual = of_residual is not None

    def empty(*shape: int, of: torch.dtype = dtype) -> torch.Tensor:
        return torch.empty(shape, dtype=of, device="meta")

    z = empty(1, tokens, tokens, channels, of=of_residual or dtype)
    dropout = empty(1, 1, tokens, channels) if residual else None
    mask = torch.empty(z.shape[:3], dtype=torch.bool, device="meta")
    norm = empty(channels), empty(channels)
    inward = empty(2 * channels, channels), empty(2 * channels, channels)
    outward = empty(channels, channels), empty(channels, channels)
    operands = (z, mask, *norm, *inward, *norm, *outward, dropout)

    def call() -> None:
        out, *kept = passes.forward(*operands, True, 1e-5, residual)
        passes.backward(out, *operands, *kept, True, residual, (True,) * len(passes.OPERANDS))

    name = f"{str(dtype).removeprefix('torch.')} C{channels}"
    if residual:
        name += f" on {str(of_residual).removeprefix('torch.')}"
    found = recorded(call, name)
    return list({v.kernel: v for v in reversed(found)}.values())[::-1]

"""The kernels of triangle multiplication as calls have them compiled, to compile ahead of time."""

from __future__ import annotations

import torch

from megafold.ops.recording import recorded
from megafold.ops.triangle_multiplication import passes
from megafold.ops.variants import KernelVariant

# AlphaFold 3's pair representation and that of the tiny model; bf16 stands for fp16 as well: the
# two compile alike.
TOKENS = 384
SHIPPED = ((128, torch.bfloat16), (32, torch.bfloat16), (128, torch.float32))


def variants() -> list[KernelVariant]:
    """Every kernel with the block sizes of the default table, for compiling ahead of time."""
    return [v for channels, dtype in SHIPPED for v in variants_of(TOKENS, channels, dtype)]


def variants_of(tokens: int, channels: int, dtype: torch.dtype) -> list[KernelVariant]:
    """What both passes launch for z ``[1, tokens, tokens, channels]``, all gradients asked."""

    def empty(*shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    z = empty(1, tokens, tokens, channels)
    mask = torch.empty(z.shape[:3], dtype=torch.bool, device="meta")
    norm = empty(channels), empty(channels)
    inward = empty(2 * channels, channels), empty(2 * channels, channels)
    outward = empty(channels, channels), empty(channels, channels)
    operands = (z, mask, *norm, *inward, *norm, *outward)

    def call() -> None:
        out, *kept = passes.forward(*operands, True, 1e-5)
        passes.backward(out, *operands, *kept, True, (True,) * len(passes.OPERANDS))

    name = f"{str(dtype).removeprefix('torch.')} C{channels}"
    found = recorded(call, name)
    return list({v.kernel: v for v in reversed(found)}.values())[::-1]

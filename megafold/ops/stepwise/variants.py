"""The kernels of steps without gradient as the sampler has them compiled."""

from __future__ import annotations

import torch

from megafold.ops.recording import distinct, recorded
from megafold.ops.stepwise import launch
from megafold.ops.variants import KernelVariant

TOKENS = ((384, 768), (3072, 128))  # and channels of AlphaFold 3's tokens and atoms


def variants() -> list[KernelVariant]:
    """The kernels of `kernels`; bf16 stands for fp16 as well: the two compile alike."""
    return distinct(
        v
        for dtype in (torch.bfloat16, torch.float32)
        for sizes in TOKENS
        for v in variants_of(*sizes, dtype)
    )


def variants_of(tokens: int, channels: int, dtype: torch.dtype) -> list[KernelVariant]:
    """What the block of one stack launches between its products."""

    def empty(*shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    def call() -> None:
        a, conditions = empty(1, tokens, channels), empty(1, tokens, 4 * channels)
        gate, shift, *_ = conditions.chunk(4, dim=-1)
        launch.modulate(a, gate, shift, 1e-5)
        launch.gate(a, gate, a)
        launch.gate(a, gate, None)

    return recorded(call, f"{str(dtype).removeprefix('torch.')} C{channels}")

"""The kernels of LayerNorm + Linear as calls have them compiled, for compiling ahead of time."""

from __future__ import annotations

import torch

from megafold.ops.layer_norm_linear import launch
from megafold.ops.recording import distinct, recorded
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


def variants() -> list[KernelVariant]:
    """Every kernel with the block sizes of the default table, for compiling ahead of time."""
    return distinct(v for sizes in SHIPPED for v in variants_of(*sizes))


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

"""The kernels of adaptive LayerNorm as calls have them compiled, for compiling ahead of time."""

from __future__ import annotations

import itertools

import torch

from megafold.ops.adaptive_layer_norm import launch
from megafold.ops.recording import distinct, recorded
from megafold.ops.variants import KernelVariant

OWN = (
    launch.modulate_kernel,
    launch.gradient_kernel,
    launch.gradient_rows_kernel,
    launch.finish_kernel,
)
# Sites of AlphaFold 3: tokens, each with a condition of its own, and atoms, whose condition all
# samples share; bf16 stands for fp16 as well: the two compile alike.
SHIPPED = (
    (48, 48, 384, 768, 384, torch.bfloat16),
    (48, 1, 9216, 128, 128, torch.bfloat16),
    (48, 48, 384, 768, 384, torch.float32),
)


def variants() -> list[KernelVariant]:
    """Every kernel with the block sizes of the default table, for compiling ahead of time."""
    kinds = itertools.product(SHIPPED, (False, True))
    return distinct(v for sizes, added in kinds for v in variants_of(*sizes, residual=added))


def variants_of(
    samples: int,
    conditions: int,
    tokens: int,
    channels: int,
    channels_s: int,
    dtype: torch.dtype,
    *,
    residual: bool = False,
) -> list[KernelVariant]:
    """What both passes launch for a ``[samples, tokens, channels]``, all gradients asked.

    Args:
        conditions: samples of s: as many as of a, or 1.
        residual: whether something is added to the gradient of a, as in the conditioned transition.
    """

    def empty(*shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    def call() -> None:
        operands = (
            empty(samples, tokens, channels),
            empty(conditions, tokens, channels_s),
            empty(channels_s),
            empty(channels, channels_s),
            empty(channels),
            empty(channels, channels_s),
        )
        forward, backward = launch.forward, launch.backward
        if launch.keeps(*operands[:2], operands[3]):
            forward, backward = launch.forward_keeping, launch.backward_from_kept
        out, *kept = forward(*operands, 1e-5, dtype)
        backward(out, *operands, *kept, (True,) * 6, added=out if residual else None)

    shared = "" if conditions == samples else " shared"
    name = f"{str(dtype).removeprefix('torch.')} S{samples} N{tokens} A{channels}{shared}"
    # The kernels that normalise the condition ship with LayerNorm + Linear.
    found = recorded(call, f"{name} residual" if residual else name)
    return [v for v in found if v.kernel in OWN]

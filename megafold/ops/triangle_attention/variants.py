"""Kernels of the parts as triangle attention has them compiled, for compiling ahead of time.

Those of the backward pass that write side by side, or add the residual's gradient; the others are
compiled as they are for the operators that they are parts of.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from megafold.ops.hopper import DEVICES, HALVES, recording
from megafold.ops.recording import distinct, recorded
from megafold.ops.triangle_attention import passes
from megafold.ops.triangle_attention.joint import ALIGNED
from megafold.ops.variants import KernelVariant

TOKENS, CHANNELS, HEADS = 384, 128, 4
OWN = ("grad_q", "grad_kv", "grad_x", "waiting", "hopper_backward")


def variants() -> list[KernelVariant]:
    """As calls of AlphaFold 3's sizes launch them; bf16 stands for fp16 where the two are alike."""
    found = variants_of(torch.bfloat16)
    with recording():
        on_hopper = [v for dtype in HALVES for v in variants_of(dtype)]
    known = {v.name for v in found}
    found += [replace(v, devices=DEVICES) for v in on_hopper if v.name not in known]
    return distinct(found)


def variants_of(dtype: torch.dtype) -> list[KernelVariant]:
    """What the backward pass launches in a way of its own, with dropout and the residual."""

    def empty(*shape: int, of: torch.dtype = dtype) -> torch.Tensor:
        return torch.empty(shape, dtype=of, device="meta")

    def call() -> None:
        z, norm = empty(1, TOKENS, TOKENS, CHANNELS), empty(CHANNELS)
        joint = empty(4 * CHANNELS + ALIGNED, CHANNELS)
        operands = (
            z, empty(1, TOKENS, TOKENS, of=torch.bool), norm, norm, joint,
            empty(CHANNELS, CHANNELS), empty(1, 1, TOKENS, CHANNELS),
        )  # fmt: skip
        out, *kept = passes.forward(*operands, HEADS, False, True, 1e-5)
        passes.backward(out, *operands, *kept, HEADS, False, True, (True,) * 5)

    name = f"{str(dtype).removeprefix('torch.')} of triangle attention"
    return [v for v in recorded(call, name) if v.name.split()[0].partition(".")[2] in OWN]

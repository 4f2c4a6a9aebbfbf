"""The kernels of the gate as calls have them compiled, for compiling ahead of time."""

from __future__ import annotations

import itertools

import torch

from megafold.ops.gated import launch
from megafold.ops.recording import distinct, recorded
from megafold.ops.variants import KernelVariant

# Samples of x and of the gate, tokens, channels, dtype: sites of AlphaFold 3, tokens and atoms;
# a gate that few rows have is summed by groups. bf16 stands for fp16 as well: they compile alike.
SHIPPED = (
    (48, 48, 384, 768, torch.bfloat16),
    (48, 1, 384, 768, torch.bfloat16),
    (48, 48, 9216, 128, torch.bfloat16),
    (48, 1, 9216, 128, torch.bfloat16),
    (48, 48, 384, 768, torch.float32),
    (48, 1, 9216, 128, torch.float32),
    (4096, 1, 1, 128, torch.bfloat16),
)
RESIDUALS = (None, torch.bfloat16, torch.float32)


def variants() -> list[KernelVariant]:
    """Every kernel with the block sizes of the default table, for compiling ahead of time."""
    kinds = itertools.product(SHIPPED, RESIDUALS)
    allowed = ((s, r) for s, r in kinds if s[-1] != torch.float32 or r != torch.bfloat16)
    return distinct(v for sizes, residual in allowed for v in variants_of(*sizes, residual))


def variants_of(
    samples: int,
    gates: int,
    tokens: int,
    channels: int,
    dtype: torch.dtype,
    of_residual: torch.dtype | None,
) -> list[KernelVariant]:
    """What both passes launch for x ``[samples, tokens, channels]``, both gradients asked.

    The gate is a slice of a projection, and x of a few more rows in each sample, as of windows.

    Args:
        gates: samples of the gate: as many as of x, or 1.
        of_residual: its dtype; None for no residual.
    """

    def empty(*shape: int, of: torch.dtype = dtype) -> torch.Tensor:
        return torch.empty(shape, dtype=of, device="meta")

    def call() -> None:
        x = empty(samples, tokens + 16, channels)[:, :tokens]
        wide = empty(gates, tokens, 4 * channels)
        gate = wide[..., 3 * channels :]
        residual = None if of_residual is None else empty(*x.shape, of=of_residual)
        gate = gate if gates == samples else gate[0]
        out = launch.forward(x, gate, residual)
        launch.backward(out, x, gate, (True, True))

    beside = "alone" if of_residual is None else f"on {str(of_residual).removeprefix('torch.')}"
    shared = "" if gates == samples else " shared"
    name = f"{str(dtype).removeprefix('torch.')} S{samples} N{tokens} A{channels}{shared} {beside}"
    own = (launch.forward_kernel, launch.backward_kernel)
    return [v for v in recorded(call, name) if v.kernel in own]

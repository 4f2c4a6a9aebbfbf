"""EvoAttention as PyTorch operators: what torch.compile, autograd and opcheck see of it."""

from __future__ import annotations

import torch

from megafold.ops.evo_attention import launch
from megafold.ops.registration import Passes, register


def _fake(q, k, v, mask, pair_bias, scale):
    batch, rows, queries, heads, _ = q.shape
    stats = q.new_empty((2, batch * rows, heads, queries), dtype=torch.float32)
    return q.new_empty(q.shape), stats


_call = register(
    Passes(
        name="evo_attention",
        operands=("Tensor q", "Tensor k", "Tensor v", "Tensor? mask", "Tensor? pair_bias"),
        options=("float scale",),
        kept=("Tensor stats",),
        forward=launch.forward,
        backward=launch.backward,
        fake=_fake,
        for_backward=("scale",),
        keeps_output=True,
    )
)


def attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: torch.Tensor | None,
    pair_bias: torch.Tensor | None,
    scale: float,
) -> torch.Tensor:
    """Attention by the kernels; arguments validated, of one half type or fp32."""
    return _call(q, k, v, mask, pair_bias, scale)[0]

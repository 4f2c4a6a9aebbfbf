"""Stacks of conditioned transformer blocks (Algorithm 23) in steps without gradient.

A denoising step of one structure is many small kernels, and most of the time lies between them.
Weights and pairs are the same in all steps of a structure: what follows from them alone is computed
once, and what has one input is one product. Shape letters: S structures, N tokens or atoms, B
blocks, H heads, C channels of a row, K of its condition.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import nn

from megafold import ops
from megafold.ops.checks import autocast_dtype
from megafold.ops.stepwise import gated, modulated, swiglu

if TYPE_CHECKING:
    from megafold.model.windows import AtomWindows


@dataclass(frozen=True)
class Conditions:
    """Two layers of the condition for each block, of ``[S or 1, N, K]``.

    The first is of the condition normalised but not scaled, whose scale is in the weights: gate and
    shift of attention's norm, gate and shift of the transition's. The second is of the condition as
    it is: what both updates end in.
    """

    modulation: torch.Tensor  # [B, 4 C, K]
    modulation_bias: torch.Tensor  # [B, 4 C]
    scale: torch.Tensor  # [B, 2 C, K]
    scale_bias: torch.Tensor  # [B, 2 C]


@dataclass(frozen=True)
class Prepared:
    """What the steps read of all blocks of a stack."""

    projection: torch.Tensor  # [B, 4 C, C], of queries, keys, values, gate
    projection_bias: torch.Tensor  # [B, 4 C]
    hidden: torch.Tensor  # [B, 2 hidden, C], the transition's gate and value
    biases: torch.Tensor  # [B, 1 or W, H, N, N] or of windows, what attention makes of pairs
    # What is made of the condition; or where that stays the same of each block what this gives.
    conditions: Conditions | tuple[tuple[torch.Tensor, torch.Tensor], ...]


def prepare(
    blocks: Sequence[nn.Module], pair: torch.Tensor, s: torch.Tensor | None = None
) -> Prepared:
    """What steps read of the blocks, whose attention has ``pair`` ``[N, N, c]`` or of windows.

    Args:
        s: their condition ``[S or 1, N, K]``, where it stays the same; else :func:`run` takes it.
    """
    attention = [block.attention_pair_bias for block in blocks]
    transition = [block.transition for block in blocks]
    norms = [
        norm
        for one, other in zip(attention, transition, strict=True)
        for norm in (one.norm, other.adaptive_layer_norm)
    ]
    first, many = attention[0].linear_q, len(blocks)
    dtype, none = autocast_dtype(first.weight), torch.zeros_like(first.bias)

    def stacked(parts: Iterable[torch.Tensor]) -> torch.Tensor:
        return torch.cat(list(parts)).unflatten(0, (many, -1))

    def side_by_side(layers: Iterable[nn.Linear]) -> torch.Tensor:
        return stacked(layer.weight for layer in layers).to(dtype)

    def biases(layers: Iterable[nn.Linear]) -> torch.Tensor:
        return stacked(none if layer.bias is None else layer.bias for layer in layers).to(dtype)

    modulations = [layer for norm in norms for layer in (norm.linear_gate, norm.linear_shift)]
    scales = [
        layer
        for one, other in zip(attention, transition, strict=True)
        for layer in (one.linear_scale, other.linear_scale)
    ]
    projections = [
        layer
        for one in attention
        for layer in (one.linear_q, one.linear_k, one.linear_v, one.linear_g)
    ]
    hidden = [layer for one in transition for layer in (one.linear_gate, one.linear_value)]
    scaled = torch.stack([norm.layer_norm_s.weight for norm in norms])
    scaled = scaled.repeat_interleave(2 * len(none), dim=0).unflatten(0, (many, -1))
    conditions = Conditions(
        modulation=(stacked(layer.weight for layer in modulations) * scaled).to(dtype),
        modulation_bias=biases(modulations),
        scale=side_by_side(scales),
        scale_bias=biases(scales),
    )
    if s is not None:
        read = _read(s, norms[0].layer_norm_s.eps, dtype)
        conditions = tuple(_condition(conditions, i, *read) for i in range(many))
    return Prepared(
        projection=side_by_side(projections),
        projection_bias=biases(projections),
        hidden=side_by_side(hidden),
        biases=_biases([one.pair_bias for one in attention], pair),
        conditions=conditions,
    )


def run(
    blocks: Sequence[nn.Module],
    prepared: Prepared,
    a: torch.Tensor,
    mask: torch.Tensor,
    s: torch.Tensor | None = None,
    windows: AtomWindows | None = None,
) -> torch.Tensor:
    """All blocks: a ``[S, N, C]``, mask ``[N]``; s ``[S, N, K]``, if it was not prepared with."""
    eps = blocks[0].transition.adaptive_layer_norm.layer_norm_s.eps
    read = () if s is None else _read(s, eps, prepared.projection.dtype)
    for i, block in enumerate(blocks):
        of = prepared.conditions
        both = _condition(of, i, *read) if isinstance(of, Conditions) else of[i]
        a = _block(block, prepared, i, a, *both, mask, windows, eps)
    return a


def _block(
    block: nn.Module, of: Prepared, i: int, a: torch.Tensor, modulation: torch.Tensor,
    scale: torch.Tensor, mask: torch.Tensor, windows: AtomWindows | None, eps: float,
) -> torch.Tensor:  # fmt: skip
    """One block; modulation ``[S or 1, N, 4 C]`` and scale ``[S or 1, N, 2 C]`` are of s."""
    attention, transition = block.attention_pair_bias, block.transition
    gate, shift, gate_transition, shift_transition = modulation.chunk(4, dim=-1)
    of_attention, of_transition = scale.chunk(2, dim=-1)
    x = modulated(a, gate, shift, eps)
    q, k, v, g = F.linear(x, of.projection[i], of.projection_bias[i]).chunk(4, dim=-1)
    out = attention.attend(q, k, v, of.biases[i], mask, windows)
    a = gated(attention.linear_out(gated(out, g)), of_attention, a)
    x = modulated(a, gate_transition, shift_transition, eps)
    out = transition.linear_out(swiglu(F.linear(x, of.hidden[i])))
    return gated(out, of_transition, a)


def _read(s: torch.Tensor, eps: float, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """A condition normalised, and as it is, as products take them."""
    return F.layer_norm(s, s.shape[-1:], eps=eps).to(dtype), s.to(dtype)


def _condition(
    of: Conditions, i: int, normal: torch.Tensor, s: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """What a block's norms are modulated by, and what its updates end in."""
    modulation = F.linear(normal, of.modulation[i], of.modulation_bias[i])
    return modulation, F.linear(s, of.scale[i], of.scale_bias[i])


def _biases(layers: Sequence[nn.Module], pair: torch.Tensor) -> torch.Tensor:
    """The biases of all blocks by one product: pairs are normalised once, scales are in weights."""
    norms = [layer.layer_norm for layer in layers]
    weight = torch.stack([layer.linear.weight for layer in layers])  # [B, H, c]
    offset = (weight * torch.stack([norm.bias for norm in norms])[:, None]).sum(dim=-1)
    weight = weight * torch.stack([norm.weight for norm in norms])[:, None]
    weight, offset = (t.flatten(0, 1).to(autocast_dtype(t)) for t in (weight, offset))
    found = ops.layer_norm_linear(pair, None, None, weight, offset, eps=norms[0].eps)
    found = found.unflatten(-1, (len(layers), -1)).movedim((-2, -1), (0, -3))
    return (found if found.dim() == 5 else found.unsqueeze(1)).contiguous()

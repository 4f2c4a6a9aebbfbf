"""The five projections of triangle attention as one: its weight, and its parts.

A row of it has queries, keys, values and gates of all heads, the biases of the heads, and zeros
up to a multiple of ALIGNED.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

# The kernels read a part 16 bytes at a time where each of its rows begins at such an address, else
# number by number.
ALIGNED = 16


class Parts(NamedTuple):
    """Views of the projections ``[B, N, N, 4 H D + H and zeros]``, as attention reads them.

    S are rows of pairs around the starting node, columns around the ending node: other strides,
    nothing copied.
    """

    q: torch.Tensor  # [B, S, N, H, D]
    k: torch.Tensor
    v: torch.Tensor
    gate: torch.Tensor  # [B, N, N, H D]
    bias: torch.Tensor  # [B, H, N, N]
    zeros: torch.Tensor  # [B, N, N, what is left]


def joint_weight(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, b: torch.Tensor, g: torch.Tensor
) -> torch.Tensor:
    """The weights of all projections, one below the other, and rows of zeros."""
    rows = sum(len(weight) for weight in (q, k, v, g, b))
    return torch.cat([q, k, v, g, b, b.new_zeros(-rows % ALIGNED, b.shape[1])])


def parts(joint: torch.Tensor, hidden: int, heads: int, starting: bool) -> Parts:
    """The parts of the projections; ``hidden`` is H D."""
    q, k, v, gate, rest = joint.split([hidden] * 4 + [joint.shape[-1] - 4 * hidden], dim=-1)
    q, k, v = (in_rows(t.unflatten(-1, (heads, -1)), starting) for t in (q, k, v))
    bias = in_rows(rest[..., :heads], starting).permute(0, 3, 1, 2)
    return Parts(q, k, v, gate, bias, rest[..., heads:])


def in_rows(pairs: torch.Tensor, starting: bool) -> torch.Tensor:
    """Pairs ``[B, N, N, ..]`` as the rows that attention goes along, or rows as pairs: a view."""
    return pairs if starting else pairs.transpose(1, 2)

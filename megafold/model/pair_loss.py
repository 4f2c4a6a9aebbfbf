"""Cross-entropy over pairs of tokens, whose logits are never there all at once.

For 768 tokens the logits of 64 bins would be 150 MB in float32, for each of three heads, and
autograd would keep as much again for the softmax. Here a few rows are worked out at a time, and
once more in the backward pass.

Shape letters: N tokens, R rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from torch.nn.functional import cross_entropy

from megafold.model.blocks import recomputed

# Logits held at once.
CHUNK_ENTRIES = 1 << 22

# z ``[R, N, c_z]`` and the same rows of its transpose to logits ``[R, N, bins]``.
Rows = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def pair_cross_entropy(
    logits_of: Rows, z: torch.Tensor, target: torch.Tensor, mask: torch.Tensor, bins: int
) -> torch.Tensor:
    """Mean cross-entropy over the pairs in ``mask``, 0 if there is none; a scalar.

    Args:
        logits_of: From rows of z and of its transpose to logits; called again for gradients. A
            method of the module whose parameters it uses, or a function without any.
        z: ``[N, N, c_z]``.
        target: ``[N, N]`` int64, the true bin.
        mask: ``[N, N]`` bool.
        bins: How many logits a pair has.
    """

    def part(rows: torch.Tensor, columns: torch.Tensor, true: torch.Tensor, keep: torch.Tensor):
        logits = logits_of(rows, columns).float()
        loss = cross_entropy(logits.flatten(0, 1), true.flatten(), reduction="none")
        return (loss * keep.flatten()).sum()

    owner = getattr(logits_of, "__self__", None)
    module = owner if isinstance(owner, nn.Module) else None
    total = z.new_zeros((), dtype=torch.float32)
    for rows in row_chunks(bins, z, z.transpose(0, 1), target, mask):
        again = torch.is_grad_enabled()
        total = total + (recomputed(part, *rows, of=module) if again else part(*rows))
    return total / mask.sum().clamp(min=1)


def row_chunks(bins: int, *tensors: torch.Tensor) -> Iterator[tuple[Any, ...]]:
    """Tensors ``[N, N, ...]`` in chunks of rows with at most ``CHUNK_ENTRIES`` logits."""
    n = tensors[0].shape[1]
    rows = max(1, CHUNK_ENTRIES // max(1, n * bins))
    yield from zip(*(tensor.split(rows) for tensor in tensors), strict=True)

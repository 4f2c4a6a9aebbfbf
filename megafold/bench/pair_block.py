"""The pair half of a Pairformer block as one function of tensors, to be measured as operators are.

Two triangle multiplications, two triangle attentions and a transition, each with its residual;
without dropout, which costs all implementations the same.
"""

from __future__ import annotations

from functools import lru_cache

import torch

from megafold import ops
from megafold.model.triangle import PairStack

Parameters = dict[str, torch.nn.Parameter]


@lru_cache(maxsize=8)
def stack(channels: int, heads: int) -> PairStack:
    """The module whose parameters are the arguments of :func:`pair_block`; it has no memory."""
    with torch.device("meta"):
        return PairStack(channels, heads, dropout=0.0).eval()


def parameters(channels: int, heads: int) -> Parameters:
    """The parameters by name."""
    return dict(stack(channels, heads).named_parameters())


def pair_block(
    z: torch.Tensor, mask: torch.Tensor, *, heads: int, **weights: torch.Tensor
) -> torch.Tensor:
    """The updated pair representation, by whatever implementation ``megafold.ops.use`` says.

    Args:
        z: ``[N, N, C]``.
        mask: bool ``[N, N]``.
        heads: of triangle attention.
        weights: every parameter of ``megafold.model.triangle.PairStack`` by name.

    Raises:
        RuntimeError: a parameter is missing, or one of another name was given.
    """
    module = stack(z.shape[-1], heads)
    return torch.func.functional_call(module, weights, (z, mask), strict=True)


def reference(
    z: torch.Tensor, mask: torch.Tensor, *, heads: int, **weights: torch.Tensor
) -> torch.Tensor:
    """The same in plain PyTorch."""
    with ops.use("torch"):
        return pair_block(z, mask, heads=heads, **weights)

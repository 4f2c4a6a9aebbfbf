"""Tensors as the kernels of a gated linear layer see them: rows of two dimensions, ``[I, J, C]``.

Attention leaves rows and columns of pairs in either order, and what dropout multiplies by repeats
along one of them: two strides reach either, where one would need a copy.
"""

from __future__ import annotations

import math
from functools import lru_cache
from itertools import pairwise
from typing import NamedTuple

import torch


class Rows(NamedTuple):
    """A tensor ``[..., C]`` whose channels are neighbours, and the strides of its rows."""

    tensor: torch.Tensor | None
    i: int
    j: int


def as_rows(lead: tuple[int, ...], *tensors: torch.Tensor | None) -> tuple[int, tuple[Rows, ...]]:
    """J, the same for all, and every tensor as ``[I, J, C]``; a copy where there is no such view.

    Args:
        lead: dimensions of the rows, of all tensors.
    """
    near = [None if t is None else with_neighbours(t) for t in tensors]
    inner, strides = _strides(tuple(lead), tuple(None if t is None else t.stride() for t in near))
    found = []
    for t, own in zip(near, strides, strict=True):
        if t is None:
            found.append(Rows(None, 0, 0))
        elif own is None:
            found.append(Rows(t.contiguous(), inner * t.shape[-1], t.shape[-1]))
        else:
            found.append(Rows(t, *own))
    return inner, tuple(found)


def with_neighbours(t: torch.Tensor) -> torch.Tensor:
    """The tensor, copied if numbers of its last dimension lie apart; what repeats still does."""
    if t.stride(-1) == 1 or t.shape[-1] == 1:
        return t
    once = t
    for dim in range(t.dim() - 1):
        if t.stride(dim) == 0 and t.shape[dim]:
            once = once.narrow(dim, 0, 1)
    return once.contiguous().expand(t.shape)


def expanded(t: torch.Tensor | None, shape: tuple[int, ...]) -> torch.Tensor | None:
    """What broadcasts to a shape, in this shape: nothing is copied."""
    return None if t is None else t.expand(shape)


@lru_cache(maxsize=4096)
def _strides(
    lead: tuple[int, ...], strides: tuple[tuple[int, ...] | None, ...]
) -> tuple[int, tuple[tuple[int, int] | None, ...]]:
    """J, and the strides of each tensor; None for those that must be copied, the fewest."""
    there = [dim for dim, size in enumerate(lead) if size != 1]

    def reached(split: int) -> list[tuple[int, int] | None]:
        both = (None if own is None else _of_both(lead, own, there, split) for own in strides)
        return list(both)

    # Of the ways to make two dimensions of them, that with the fewest copies; the first is one
    # dimension for all.
    split = max(range(len(there) + 1), key=lambda at: sum(two is not None for two in reached(at)))
    return math.prod(lead[dim] for dim in there[split:]), tuple(reached(split))


def _of_both(
    lead: tuple[int, ...], strides: tuple[int, ...], dims: list[int], split: int
) -> tuple[int, int] | None:
    """The strides of ``[I, J]``, of which J begins with the dimension ``dims[split]``."""
    i, j = (_of_one(lead, strides, part) for part in (dims[:split], dims[split:]))
    return None if i is None or j is None else (i, j)


def _of_one(lead: tuple[int, ...], strides: tuple[int, ...], dims: list[int]) -> int | None:
    """The stride of dimensions as one; None where there is none."""
    for dim, following in pairwise(dims):
        if strides[dim] != lead[following] * strides[following]:
            return None
    return strides[dims[-1]] if dims else 0

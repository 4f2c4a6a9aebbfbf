"""The largest tensor that a piece of code makes."""

from __future__ import annotations

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LargestTensor(TorchDispatchMode):
    """Remembers the most memory that any one tensor takes, and which operation made it."""

    def __init__(self) -> None:
        super().__init__()
        self.entries = 0
        self.made_by = ""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, torch.Tensor):
                # The storage counts: an expanded view of little is little.
                entries = leaf.untyped_storage().nbytes() // leaf.element_size()
                if entries > self.entries:
                    self.entries, self.made_by = entries, f"{func} {tuple(leaf.shape)}"
        return out


class TensorsOverPairs(TorchDispatchMode):
    """Remembers the operations that make a tensor over pairs of ``size`` things.

    One that has two axes as long, or is a flat axis over all pairs.
    """

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size = size
        self.found: set[str] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, torch.Tensor):
                long = [axis for axis in leaf.shape if axis >= self.size]
                if len(long) > 1 or max(long, default=0) >= self.size**2:
                    self.found.add(f"{func} {tuple(leaf.shape)}")
        return out

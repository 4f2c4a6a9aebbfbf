"""Batches in order, made ahead by other processes, from any step on.

PyTorch's ``DataLoader`` does the work. What is added: a batch crosses between processes as one
block of memory (some fifty tensors one by one cost more than making them), and the position is
kept. A dataset here makes each example from its seed and step alone, so that one number is all
there is to resume from, whatever the number of workers.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import Any, Protocol

import torch
from torch.utils.data import DataLoader, Dataset

from megafold.data.batch import TENSOR_FIELDS, Batch
from megafold.data.errors import DataError

_ALIGN = 64  # bytes


class StepDataset(Protocol):
    """Examples by step: the same step is the same example, in any process."""

    @property
    def identity(self) -> dict[str, Any]:
        """All that decides the examples, as JSON can hold it."""

    def __len__(self) -> int: ...

    def __getitem__(self, step: int) -> Batch: ...


class BatchLoader:
    """The batches of a dataset in order, from ``step`` to its end.

    ``state_dict()`` is where it stands: after the batches that were handed out, whatever workers
    have made ahead. Loaded into another loader, with as many workers as that one likes, the next
    batch is the one that would have come.
    """

    def __init__(self, dataset: StepDataset, *, workers: int = 0, prefetch: int = 2) -> None:
        """
        Args:
            dataset: Such as ``SampledDataset``.
            workers: Processes that make batches; 0 makes them in this one.
            prefetch: Batches that each of them makes ahead.

        Raises:
            ValueError: ``workers`` is negative or ``prefetch`` not positive.
        """
        if workers < 0 or prefetch < 1:
            raise ValueError(f"workers is {workers}, at least 0; prefetch {prefetch}, at least 1")
        self.dataset = dataset
        self.workers = workers
        self.prefetch = prefetch
        self.step = 0

    def __iter__(self) -> Iterator[Batch]:
        steps = range(self.step, len(self.dataset))
        for batch in self._load(steps) if self.workers else map(self.dataset.__getitem__, steps):
            self.step += 1
            yield batch

    def _load(self, steps: range) -> Iterator[Batch]:
        loader = DataLoader(
            _Packing(self.dataset),
            batch_size=None,
            sampler=steps,
            num_workers=self.workers,
            prefetch_factor=self.prefetch,
        )
        yield from map(unpack_batch, loader)

    def __len__(self) -> int:
        """Batches that are left."""
        return len(self.dataset) - self.step

    def state_dict(self) -> dict[str, Any]:
        """Where this loader stands, and on which dataset."""
        return {"step": self.step, "dataset": self.dataset.identity}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from where another loader stood.

        Raises:
            DataError: That was a loader of other examples.
        """
        mine, theirs = self.dataset.identity, state["dataset"]
        other = [k for k in sorted({*mine, *theirs}) if mine.get(k) != theirs.get(k)]
        if other:
            words = (f"{k} was {theirs.get(k)!r} and is {mine.get(k)!r}" for k in other)
            raise DataError(f"the loader's state is of other examples: {'; '.join(words)}")
        if not 0 <= state["step"] <= len(self.dataset):
            raise DataError(f"step {state['step']} of a dataset of {len(self.dataset)}")
        self.step = state["step"]


@dataclass(frozen=True)
class PackedBatch:
    """A batch whose tensors are one block of memory."""

    block: torch.Tensor  # [bytes] uint8
    tensors: tuple[tuple[torch.dtype, tuple[int, ...], int], ...]  # dtype, shape, first byte
    others: dict[str, Any]  # fields that are no tensors


def pack_batch(batch: Batch) -> PackedBatch:
    """Copy the tensors of a batch into one."""
    tensors = [*(getattr(batch, name) for name in TENSOR_FIELDS), *batch.symmetric_atoms]
    places, end = [], 0
    for tensor in tensors:
        places.append((tensor.dtype, tuple(tensor.shape), end))
        end += -(-tensor.nbytes // _ALIGN) * _ALIGN
    block = torch.empty(end, dtype=torch.uint8)
    for tensor, (_, _, first) in zip(tensors, places, strict=True):
        flat = tensor.contiguous().reshape(-1).view(torch.uint8)
        block[first : first + len(flat)] = flat
    tensor_names = {*TENSOR_FIELDS, "symmetric_atoms"}
    others = {f.name: getattr(batch, f.name) for f in fields(Batch) if f.name not in tensor_names}
    return PackedBatch(block, tuple(places), others)


def unpack_batch(packed: PackedBatch) -> Batch:
    """The batch again; its tensors are views of the block."""
    tensors = []
    for dtype, shape, first in packed.tensors:
        size = dtype.itemsize * torch.Size(shape).numel()
        tensors.append(packed.block[first : first + size].view(dtype).reshape(shape))
    named = dict(zip(TENSOR_FIELDS, tensors, strict=False))
    return Batch(**named, symmetric_atoms=tuple(tensors[len(TENSOR_FIELDS) :]), **packed.others)


class _Packing(Dataset):
    """The same examples, packed where they are made."""

    def __init__(self, dataset: StepDataset) -> None:
        self.dataset = dataset

    def __getitem__(self, step: int) -> PackedBatch:
        return pack_batch(self.dataset[step])

"""How an operator stands beside what could be used instead, from the records."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch

from megafold.bench import cases
from megafold.bench.memory import MB
from megafold.bench.records import Record

OURS = "megafold"
# The peer whose memory ours is held against: of attention the one that keeps no logits, of
# training steps the same model by PyTorch's operators.
LEAST_MEMORY = {"evo_attention": "flex", "train_step": "eager"}
FUSED = "compile"  # of every other operator: what PyTorch itself fuses


@dataclass(frozen=True)
class Comparison:
    """One case in one direction, as one run measured it."""

    op: str
    shape: str
    dtype: str
    direction: str
    device: str  # in words
    date: str  # of the run
    revision: str
    ms: Mapping[str, float]  # median, by implementation
    peak_mb: Mapping[str, float]  # by implementation

    @property
    def best_peer(self) -> str:
        """The fastest of the others."""
        return min((name for name in self.ms if name != OURS), key=self.ms.__getitem__)

    @property
    def speedup(self) -> float:
        """The time of the best peer over ours: above 1, ours is the faster."""
        return self.ms[self.best_peer] / self.ms[OURS]

    @property
    def memory_peer(self) -> str:
        """The implementation whose peak memory ours is held against."""
        return LEAST_MEMORY.get(self.op, FUSED)

    @property
    def memory_ratio(self) -> float | None:
        """Our peak memory over that of ``memory_peer``; None where the run did not measure that."""
        theirs = self.peak_mb.get(self.memory_peer)
        return self.peak_mb[OURS] / theirs if theirs else None

    @property
    def work_ratio(self) -> float | None:
        """The same of the memory beyond output and gradients, which every implementation holds.

        None where the record does not say what those are (a training step), or theirs is nothing.
        """
        theirs = self.peak_mb.get(self.memory_peer)
        if theirs is None or self.op not in cases.SHAPES:
            return None
        case, dtype = cases.case(self.op, self.shape), getattr(torch, self.dtype, None)
        if dtype is None:  # "tf32": operands are fp32
            dtype = torch.float32
        held = case.result_bytes(self.direction, dtype) / MB
        # What is left of theirs may be no more than records round off.
        return (self.peak_mb[OURS] - held) / (theirs - held) if theirs > 1.001 * held else None


def compare(records: Iterable[Record]) -> list[Comparison]:
    """The newest run of each case, dtype, direction and device that measured ours and a peer.

    Times of two runs are never set side by side: the machine, the versions or what else ran may
    have changed between them. A run that measured one implementation alone compares nothing and
    is passed over. Cases come in the order of the records.
    """
    runs: dict[tuple[str, ...], dict[str, dict[str, Record]]] = {}
    for r in records:
        of_case = runs.setdefault((r.op, r.shape, r.dtype, r.direction, r.device), {})
        of_case.setdefault(r.date, {})[r.impl] = r
    found = []
    for case, by_date in runs.items():
        dates = [date for date, run in by_date.items() if OURS in run and len(run) > 1]
        if dates:
            run = by_date[max(dates)]
            found.append(
                Comparison(
                    *case,
                    date=max(dates),
                    revision=run[OURS].revision,
                    ms={name: r.ms for name, r in run.items()},
                    peak_mb={name: r.peak_mb for name, r in run.items()},
                )
            )
    return found

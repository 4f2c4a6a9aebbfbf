"""Measure the data pipeline: stores against each other, and the steps of a training loop.

Three designs make the same training example: ``uncached`` does everything afresh, ``gzip
pickle`` loads a compressed pickle as the paper's code does, ``megafold`` maps its cache.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
from torch.utils.data import Dataset

from megafold.bench.data_inputs import Input
from megafold.bench.records import environment
from megafold.bench.store_records import StepRecord, StoreRecord
from megafold.bench.store_trials import build_seconds, draw_times, draws_per_second, kill_writers
from megafold.bench.stores import STORES, open_store
from megafold.data.batch import Batch, make_batch
from megafold.data.dataset import draw_crop
from megafold.data.features import Features
from megafold.data.featurization import featurize
from megafold.data.loader import BatchLoader

_STORE_OF = {"gzip pickle": "gzip pickle", "megafold": "safetensors"}


@dataclass(frozen=True)
class Plan:
    """What to measure, and how long."""

    crop: int = 384  # tokens
    rows: int = 1024  # of the alignment, drawn
    repeats: int = 15  # of what takes milliseconds
    slow_repeats: int = 3  # of what takes seconds
    readers: int = 2
    seconds: float = 3.0  # that readers read
    kills: int = 10
    workers: int = 2  # of the loader: 0, 1, ... to this
    steps: int = 40  # of the loader, for each number of workers


def measure_stores(
    given: Input, entries: Mapping[str, Features], folder: Path, plan: Plan
) -> Iterator[StoreRecord]:
    """Every store with the same entries, then featurising afresh.

    Args:
        given: The entry that crops are drawn of.
        entries: Features by name, ``given``'s among them.
        folder: For the stores; what they leave stays there.
        plan: Sizes and repeats.
    """
    common = _common(given, entries[given.name], plan)
    for kind in STORES:
        place = folder / kind
        builds = [build_seconds(kind, place, entries) for _ in range(plan.slow_repeats)]
        store = open_store(kind, place)
        times = draw_times(
            lambda generator, store=store: store.draw(given.name, plan.crop, plan.rows, generator),
            plan.repeats,
        )
        store.close()
        rate = draws_per_second(
            kind, place, given.name, plan.crop, plan.rows,
            readers=plan.readers, seconds=plan.seconds,
        )  # fmt: skip
        torn, wrong = kill_writers(kind, folder / "killed", entries[given.name], plan.kills)
        yield StoreRecord(
            store=kind,
            entries=len(entries),
            build_s=statistics.median(builds),
            size_mb=sum(p.stat().st_size for p in place.rglob("*") if p.is_file()) / 1e6,
            **_quartiles("draw_ms", times),
            readers=plan.readers,
            draws_per_s=rate,
            kills=plan.kills,
            torn=torn,
            wrong=wrong,
            **common,
        )
    times = draw_times(
        lambda generator: draw_crop(
            given.features(), plan.crop, msa_rows=plan.rows, generator=generator
        ),
        plan.slow_repeats,
    )
    nothing = dict.fromkeys(("build_s", "size_mb", "draws_per_s", "torn", "wrong"))
    yield StoreRecord(
        store="uncached", entries=len(entries), **_quartiles("draw_ms", times),
        readers=0, kills=0, **nothing, **common,
    )  # fmt: skip


def measure_steps(
    given: Input, features: Features, folder: Path, plan: Plan
) -> Iterator[StepRecord]:
    """Each stage of each design alone, then the wait for an example with 0, 1, ... workers.

    Args:
        given: The entry that crops are drawn of.
        features: Of it.
        folder: Where ``measure_stores`` left its stores.
        plan: Sizes and repeats.
    """
    common = _common(given, features, plan)
    for design in ("uncached", "gzip pickle", "megafold"):
        slow = design == "uncached"
        examples = Examples(given, design, folder, plan)
        examples[0]  # not counted: loads the dictionary, makes conformers, fills the page cache
        stages: dict[str, list[float]] = {}
        for index in range(plan.slow_repeats if slow else plan.repeats):
            for stage, ms in examples.timed(index)[0].items():
                stages.setdefault(stage, []).append(ms)
        for stage, times in stages.items():
            yield StepRecord(
                design=design, stage=stage, workers=0, **_quartiles("ms", times), **common
            )
        for workers in range(plan.workers + 1):
            count = plan.slow_repeats * max(1, workers) if slow else plan.steps
            waits = loader_waits(examples, workers, count, chunks=min(5, plan.slow_repeats))
            yield StepRecord(
                design=design, stage="step", workers=workers, **_quartiles("ms", waits), **common
            )


class Examples(Dataset):
    """Training examples of one entry, by one design; the index decides what is drawn."""

    def __init__(self, given: Input, design: str, folder: Path, plan: Plan) -> None:
        self.given, self.design, self.folder, self.plan = given, design, folder, plan
        self._store = None

    def __len__(self) -> int:
        return 1 << 30

    def __getitem__(self, index: int) -> Batch:
        return self.timed(index)[1]

    def timed(self, index: int) -> tuple[dict[str, float], Batch]:
        """Milliseconds of each stage, and the example."""
        generator, stages = np.random.default_rng(index), {}

        def run(stage: str, work: Callable):
            begin = time.perf_counter()
            result = work()
            stages[stage] = 1e3 * (time.perf_counter() - begin)
            return result

        if self.design == "uncached":
            structure = run("structure", self.given.read)
            alignments = run("alignments", lambda: self.given.read_alignments(structure))
            whole = run("featurize", lambda: featurize(structure, alignments))
        else:
            if self._store is None:  # in the process that reads
                kind = _STORE_OF[self.design]
                self._store = open_store(kind, self.folder / kind)
            whole = run("load", lambda: self._store.load(self.given.name))
        rows = self.plan.rows
        part = run(
            "crop", lambda: draw_crop(whole, self.plan.crop, msa_rows=rows, generator=generator)
        )
        batch = run(
            "batch", lambda: make_batch(part, generator=generator, msa_rows=rows, whole=whole)
        )
        return stages, batch


def loader_waits(examples: Dataset, workers: int, count: int, chunks: int) -> list[float]:
    """Mean milliseconds a loop that does nothing else waits for an example, chunk by chunk.

    The first example of each worker is not counted.
    """
    arrivals = []
    for _ in islice(BatchLoader(examples, workers=workers), workers + count + 1):
        arrivals.append(time.perf_counter())
    arrivals = np.array(arrivals[workers:])
    edges = np.linspace(0, len(arrivals) - 1, chunks + 1).round().astype(int)
    return (1e3 * np.diff(arrivals[edges]) / np.diff(edges)).tolist()


def _common(given: Input, features: Features, plan: Plan) -> dict[str, object]:
    machine = environment("cpu")
    return {
        "entry": given.name,
        "tokens": features.num_tokens,
        "rows": len(features.msa),
        "made_up_rows": given.made_up_rows,
        "crop": plan.crop,
        "crop_rows": plan.rows,
        "device": machine.device,
        "revision": machine.revision,
        "date": machine.date,
    }


def _quartiles(name: str, times: list[float]) -> dict[str, float]:
    q1, median, q3 = np.percentile(times, (25, 50, 75)).tolist()
    return {name: median, f"{name}_q1": q1, f"{name}_q3": q3}

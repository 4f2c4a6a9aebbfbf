"""Trials of a store: how long it takes, how many can read at once, what a kill leaves."""

from __future__ import annotations

import multiprocessing
import os
import random
import shutil
import signal
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np

from megafold.bench.stores import open_store
from megafold.data.entry import to_arrays
from megafold.data.features import Features

_FORK = multiprocessing.get_context("fork")  # what is loaded need not be loaded again
_KILL_TOKENS = 100  # of the entry that is being written when a process is killed


def build_seconds(kind: str, folder: Path, entries: Mapping[str, Features]) -> float:
    """Write all entries into a new store."""
    shutil.rmtree(folder, ignore_errors=True)
    begin = time.perf_counter()
    store = open_store(kind, folder)
    for name, features in entries.items():
        store.put(name, features)
    store.close()
    return time.perf_counter() - begin


def draw_times(draw: Callable[[np.random.Generator], Features], repeats: int) -> list[float]:
    """Milliseconds of each of ``repeats`` draws, another one each time, after one not counted."""
    times = []
    for seed in range(repeats + 1):
        generator = np.random.default_rng(seed)
        begin = time.perf_counter()
        draw(generator)
        times.append(1e3 * (time.perf_counter() - begin))
    return times[1:]


def draws_per_second(
    kind: str, folder: Path, name: str, size: int, rows: int, *, readers: int, seconds: float
) -> float:
    """Crops drawn by several processes at once, for so many seconds, all together."""
    begin, counts = _FORK.Barrier(readers), _FORK.Queue()
    arguments = (kind, folder, name, size, rows, seconds, begin, counts)
    processes = [_FORK.Process(target=_read, args=(*arguments, i)) for i in range(readers)]
    for process in processes:
        process.start()
    total = sum(counts.get(timeout=120 + 10 * seconds) for _ in processes)
    for process in processes:
        process.join()
    return total


def _read(kind, folder, name, size, rows, seconds, begin, counts, seed) -> None:
    store, drawn = open_store(kind, folder), 0
    store.draw(name, size, rows, np.random.default_rng([seed, 0]))
    begin.wait()
    start = time.perf_counter()
    while (elapsed := time.perf_counter() - start) < seconds:
        drawn += 1
        store.draw(name, size, rows, np.random.default_rng([seed, drawn]))
    counts.put(drawn / elapsed)


def kill_writers(kind: str, folder: Path, features: Features, kills: int) -> tuple[int, int]:
    """Kill a process that writes entries, at random moments.

    Returns:
        How many kills left an entry that is there and cannot be read, and how many one that is
        read and is not what was written.
    """
    part = features.select(np.arange(min(_KILL_TOKENS, features.num_tokens)))
    once = build_seconds(kind, folder, {"0": part})
    rng, torn, wrong = random.Random(0), 0, 0
    for _ in range(kills):
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        ready = _FORK.Event()
        writer = _FORK.Process(target=_write, args=(kind, folder, part, ready))
        writer.start()
        ready.wait()
        time.sleep(rng.uniform(0, 3 * once))
        os.kill(writer.pid, signal.SIGKILL)
        writer.join()
        left = _left(kind, folder, part)
        torn += "torn" in left
        wrong += "wrong" in left
    shutil.rmtree(folder, ignore_errors=True)
    return torn, wrong


def _write(kind: str, folder: Path, features: Features, ready) -> None:
    store = open_store(kind, folder)
    ready.set()
    for i in range(1000):
        store.put(str(i), features)


def _left(kind: str, folder: Path, expected: Features) -> set[str]:
    """What a store has after its writer was killed."""
    found = set()
    store = open_store(kind, folder)
    names = [name for name in map(str, range(1000)) if name in store]
    for name in names:
        try:
            features = store.load(name)
        except Exception:  # whatever a store says of an entry that was half written
            found.add("torn")
        else:
            found.add("whole" if same_features(features, expected) else "wrong")
    store.close()
    return found


def same_features(one: Features, two: Features) -> bool:
    """Whether every array is equal, the names of atoms included."""
    ours, theirs = to_arrays(one), to_arrays(two)
    return ours.keys() == theirs.keys() and all(
        a.dtype == theirs[name].dtype
        and np.array_equal(a, theirs[name], equal_nan=a.dtype.kind == "f")
        for name, a in ours.items()
    )

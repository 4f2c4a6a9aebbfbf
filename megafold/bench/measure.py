"""How long a call takes: median and quartiles of repeated runs."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from megafold.bench.cases import Inputs, check_direction, differentiable

FLUSH_BYTES = 256 * 2**20  # larger than the last-level cache of any current GPU
MAX_FLUSHES = 200  # some 20 ms


@dataclass(frozen=True)
class Timing:
    """Milliseconds per call."""

    ms: float  # median
    ms_q1: float  # first quartile
    ms_q3: float  # third quartile
    repeats: int


def call_for(
    function: Callable[[Inputs], torch.Tensor], inputs: Inputs, direction: str
) -> Callable[[], object]:
    """What is timed: one forward pass, or one forward and backward pass.

    Args:
        function: from inputs to the output.
        inputs: by name. For ``"full"`` every tensor that has a gradient is made to require it, in
            place, and every gradient is computed, from one fixed gradient of the output.
        direction: ``"forward"`` (as in inference, nothing is saved) or ``"full"``.
    """
    check_direction(direction)
    if direction == "forward":

        def forward() -> torch.Tensor:
            with torch.no_grad():
                return function(inputs)

        return forward

    leaves = list(differentiable(inputs).values())
    for leaf in leaves:
        leaf.requires_grad_()
    with torch.no_grad():
        grad = torch.ones_like(function(inputs))

    def full() -> tuple[torch.Tensor, ...]:
        return torch.autograd.grad(function(inputs), leaves, grad)

    return full


def time_call(
    call: Callable[[], object],
    device: torch.device | str,
    *,
    seconds: float = 1.0,
    min_repeats: int = 5,
    max_repeats: int = 100,
) -> Timing:
    """Time ``call`` until ``seconds`` have passed, within the bounds on the repeats.

    One call warms up (and compiles). On a GPU every run is timed by events on the device, after
    its cache was overwritten, so that no run finds its input there, and with the whole call
    queued before it begins (:func:`host_ms` is the time that takes): a run that began earlier is
    done again. Of a call that takes longer to queue than ``MAX_FLUSHES`` overwrite the cache, the
    time has waiting for Python in it. On the CPU every run is timed by the clock.
    """
    (timing,) = time_in_turns(
        [call], device, seconds=seconds, min_repeats=min_repeats, max_repeats=max_repeats
    )
    return timing


def time_in_turns(
    calls: Sequence[Callable[[], object]],
    device: torch.device | str,
    *,
    seconds: float = 1.0,
    min_repeats: int = 5,
    max_repeats: int = 100,
) -> list[Timing]:
    """Time several calls, one run of each after the other, as :func:`time_call` times one.

    What is to be compared is measured in turns: where the machine slows down meanwhile, by heat
    or by other work, it slows down for all alike.

    Args:
        seconds: for each call, on average.
    """
    device = torch.device(device)
    timed = _timed_on_gpu if device.type == "cuda" else _timed_on_cpu
    runs = [timed(call, device) for call in calls]
    for run in runs:
        run()
    times: list[list[float]] = []
    start = time.perf_counter()
    while len(times) < max_repeats and (
        len(times) < min_repeats or time.perf_counter() - start < seconds * len(runs)
    ):
        times.append([run() for run in runs])
    return [_timing(of_one) for of_one in zip(*times, strict=True)]


def _timing(times: Sequence[float]) -> Timing:
    share = torch.tensor([0.25, 0.5, 0.75], dtype=torch.float64)
    q1, median, q3 = torch.tensor(times, dtype=torch.float64).quantile(share).tolist()
    return Timing(ms=median, ms_q1=q1, ms_q3=q3, repeats=len(times))


def _timed_on_cpu(call: Callable[[], object], device: torch.device) -> Callable[[], float]:
    def run() -> float:
        start = time.perf_counter()
        result = call()
        elapsed = time.perf_counter() - start
        del result
        return elapsed * 1e3

    return run


def _timed_on_gpu(call: Callable[[], object], device: torch.device) -> Callable[[], float]:
    flush = torch.empty(FLUSH_BYTES, dtype=torch.uint8, device=device)
    stream = torch.cuda.current_stream(device)

    def between(work: Callable[[], object]) -> tuple[float, bool]:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record(stream)
        work()
        end.record(stream)
        early = start.query()  # the GPU was there before all was queued
        end.synchronize()
        return start.elapsed_time(end), early

    call()
    flush.zero_()
    flushing, _ = between(flush.zero_)
    # The GPU is kept busy until all of the call is queued, as in a training step: what is timed
    # is its own work, not its waiting for Python.
    flushes = min(MAX_FLUSHES, 1 + math.ceil(1.5 * host_ms(call, device) / flushing))

    def run() -> float:
        nonlocal flushes
        while True:
            for _ in range(flushes):
                flush.zero_()
            ms, early = between(call)
            if not early or flushes == MAX_FLUSHES:
                return ms
            flushes = min(MAX_FLUSHES, 2 * flushes)  # Python was slower this time

    return run


def host_ms(call: Callable[[], object], device: torch.device | str, repeats: int = 20) -> float:
    """How long Python takes to queue one call on a GPU, in milliseconds (median).

    The call has to have run before. A training step cannot be faster than this.
    """
    times = []
    for _ in range(repeats):
        torch.cuda.synchronize(device)
        start = time.perf_counter()
        call()
        times.append((time.perf_counter() - start) * 1e3)
    torch.cuda.synchronize(device)
    return statistics.median(times)

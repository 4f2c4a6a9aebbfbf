"""Measure cases: time, memory and error of every implementation, as records."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass

import torch

from megafold.bench import accuracy, measure, memory, peers
from megafold.bench.cases import Case, Inputs
from megafold.bench.records import Environment, Record, environment

SEED = 20  # of the inputs and of the gradient of the output


@dataclass(frozen=True)
class Outcome:
    """One measurement, or why there is none."""

    case: Case
    impl: str
    direction: str
    record: Record | None
    reason: str = ""  # why it was not measured, where it was not
    failed: bool = False  # it should have run and did not


def run(
    cases: Iterable[Case],
    impls: Iterable[str] | None,
    directions: Iterable[str],
    device: torch.device | str,
    dtype: torch.dtype,
    *,
    seconds: float = 1.0,
) -> Iterator[Outcome]:
    """Measure every combination; what cannot run is an outcome too, with its reason.

    Implementations of one case are timed in turns, and all rows carry one date.

    Args:
        impls: names in ``peers.PEERS``; None for all that compute the operator.
        seconds: how long to repeat each call.
    """
    device = torch.device(device)
    directions = tuple(directions)
    impls = None if impls is None else tuple(impls)
    around = environment(device)
    for case in cases:
        torch.compiler.reset()  # what is compiled is compiled for this case's shapes
        for direction in directions:
            chosen = peers.peers_of(case.op) if impls is None else impls
            yield from _together(case, chosen, direction, device, dtype, seconds, around)


def measure_case(
    case: Case,
    impl: str,
    direction: str,
    device: torch.device | str,
    dtype: torch.dtype,
    *,
    seconds: float = 1.0,
) -> Record:
    """Time, peak memory and error of one implementation of one case.

    The error is the worst relative root mean square error against fp64 among the results of
    this direction; None where the fp64 reference does not fit into memory.

    Raises:
        peers.Unavailable: the implementation does not compute this operator.
        NotImplementedError: the implementation says that it cannot run this on this device.
    """
    device = torch.device(device)
    prepared = _prepare(case, impl, direction, device, dtype)
    timing = measure.time_call(prepared.call, device, seconds=seconds)
    return _record(prepared, timing, direction, dtype, environment(device))


@dataclass(frozen=True)
class _Prepared:
    """An implementation that ran, with what was measured beside its time."""

    case: Case
    impl: str
    call: Callable[[], object]
    error: float | None
    peak: int


def _together(
    case: Case,
    impls: Iterable[str],
    direction: str,
    device: torch.device,
    dtype: torch.dtype,
    seconds: float,
    around: Environment,
) -> Iterator[Outcome]:
    """Measure the implementations of one case, timed in turns."""
    prepared: list[_Prepared] = []
    for impl in impls:
        try:
            prepared.append(_prepare(case, impl, direction, device, dtype))
        except (peers.Unavailable, NotImplementedError) as why:
            yield Outcome(case, impl, direction, None, str(why).strip().splitlines()[0])
        except Exception as error:  # whatever a peer raises is what there is to report
            why = f"{type(error).__name__}: {str(error).strip().splitlines()[0]}"
            yield Outcome(case, impl, direction, None, why, failed=True)
    if not prepared:
        return
    timings = measure.time_in_turns([p.call for p in prepared], device, seconds=seconds)
    for one, timing in zip(prepared, timings, strict=True):
        record = _record(one, timing, direction, dtype, around)
        yield Outcome(case, one.impl, direction, record)


def _prepare(
    case: Case, impl: str, direction: str, device: torch.device, dtype: torch.dtype
) -> _Prepared:
    """Run an implementation, for its error and its peak memory."""
    function = peers.implementation(impl, case)
    generator = torch.Generator().manual_seed(SEED)
    inputs = case.make_inputs(device, dtype, generator)
    grad = None
    if direction == "full":
        grad = torch.randn(case.output_shape, generator=generator).to(device, dtype)
    error = _error(case, function, inputs, grad)
    call = measure.call_for(function, inputs, direction)
    return _Prepared(case, impl, call, error, memory.peak_bytes(call, device))


def _error(
    case: Case, function: accuracy.Function, inputs: Inputs, grad: torch.Tensor | None
) -> float | None:
    """The worst error of any result; None where fp64 does not fit into this device's memory."""
    result = accuracy.results(function, inputs, grad)
    try:
        exact = accuracy.exact_results(case, inputs, grad)
    except torch.OutOfMemoryError:
        return None
    return max(accuracy.relative_errors(result[name], exact[name])[0] for name in exact)


def _record(
    prepared: _Prepared,
    timing: measure.Timing,
    direction: str,
    dtype: torch.dtype,
    around: Environment,
) -> Record:
    return Record(
        op=prepared.case.op,
        shape=prepared.case.shape,
        dtype=str(dtype).removeprefix("torch."),
        impl=prepared.impl,
        direction=direction,
        ms=timing.ms,
        ms_q1=timing.ms_q1,
        ms_q3=timing.ms_q3,
        peak_mb=prepared.peak / memory.MB,
        error=prepared.error,
        **asdict(around),
    )

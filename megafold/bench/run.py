"""Measure cases: time, memory and error of every implementation, as records."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
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

    All rows carry one date.

    Args:
        impls: names in ``peers.PEERS``; None for all that compute the operator.
        seconds: how long to repeat each call.
    """
    device = torch.device(device)
    impls, directions = None if impls is None else tuple(impls), tuple(directions)
    around = environment(device)
    for case in cases:
        for impl in peers.peers_of(case.op) if impls is None else impls:
            for direction in directions:
                yield _outcome(case, impl, direction, device, dtype, seconds, around)


def measure_case(
    case: Case,
    impl: str,
    direction: str,
    device: torch.device | str,
    dtype: torch.dtype,
    *,
    seconds: float = 1.0,
    around: Environment | None = None,
) -> Record:
    """Time, peak memory and error of one implementation of one case.

    The error is the worst relative root mean square error against fp64 among the results of
    this direction; None where the fp64 reference does not fit into memory.

    Raises:
        peers.Unavailable: the implementation does not compute this operator.
        NotImplementedError: the implementation says that it cannot run this on this device.
    """
    device = torch.device(device)
    function = peers.implementation(impl, case)
    generator = torch.Generator().manual_seed(SEED)
    inputs = case.make_inputs(device, dtype, generator)
    grad = None
    if direction == "full":
        grad = torch.randn(case.output_shape, generator=generator).to(device, dtype)
    error = _error(case, function, inputs, grad)
    call = measure.call_for(function, inputs, direction)
    timing = measure.time_call(call, device, seconds=seconds)
    return Record(
        op=case.op,
        shape=case.shape,
        dtype=str(dtype).removeprefix("torch."),
        impl=impl,
        direction=direction,
        ms=timing.ms,
        ms_q1=timing.ms_q1,
        ms_q3=timing.ms_q3,
        peak_mb=memory.peak_bytes(call, device) / memory.MB,
        error=error,
        **asdict(around or environment(device)),
    )


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


def _outcome(
    case: Case,
    impl: str,
    direction: str,
    device: torch.device,
    dtype: torch.dtype,
    seconds: float,
    around: Environment,
) -> Outcome:
    try:
        record = measure_case(case, impl, direction, device, dtype, seconds=seconds, around=around)
    except (peers.Unavailable, NotImplementedError) as reason:
        return Outcome(case, impl, direction, None, str(reason).strip().splitlines()[0])
    except Exception as error:  # whatever a peer raises is what there is to report
        reason = f"{type(error).__name__}: {str(error).strip().splitlines()[0]}"
        return Outcome(case, impl, direction, None, reason, failed=True)
    return Outcome(case, impl, direction, record)

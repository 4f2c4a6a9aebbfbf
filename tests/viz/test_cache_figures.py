"""The figure of the data pipeline shows what its records say."""

from __future__ import annotations

import pytest

from megafold.bench.store_records import DESIGNS, StepRecord
from megafold.viz.cache_figures import step_times

COMMON = {
    "entry": "9ZZZ", "tokens": 500, "rows": 16_000, "made_up_rows": 4000, "crop": 384,
    "crop_rows": 1024, "device": "a CPU", "revision": "abc",
}  # fmt: skip


def _record(design: str, stage: str, workers: int, ms: float, date: str = "2026-01-01"):
    return StepRecord(
        design=design, stage=stage, workers=workers, ms=ms, ms_q1=0.9 * ms, ms_q3=1.2 * ms,
        date=date, **COMMON,
    )  # fmt: skip


RECORDS = [
    _record("megafold", "step", 1, 30.0),
    _record("megafold", "step", 0, 50.0),
    _record("megafold", "crop", 0, 4.0),
    _record("megafold", "load", 0, 1.0),
    _record("uncached", "alignments", 0, 7000.0),
    _record("uncached", "step", 0, 8000.0),
]


def _traces(figure, design: str) -> list:
    return [trace for trace in figure.data if trace.legendgroup == design]


def test_stages_of_a_design_stand_in_their_order_with_quartiles() -> None:
    stages, _ = _traces(step_times(RECORDS), "megafold")
    assert list(stages.y) == ["load features", "crop, draw rows"]
    assert list(stages.x) == [1.0, 4.0]
    assert list(stages.error_x.array) == pytest.approx([0.2, 0.8])
    assert list(stages.error_x.arrayminus) == pytest.approx([0.1, 0.4])


def test_waits_are_drawn_by_the_number_of_workers() -> None:
    _, steps = _traces(step_times(RECORDS), "megafold")
    assert (list(steps.x), list(steps.y)) == ([0, 1], [50.0, 30.0])


def test_every_design_is_named_once() -> None:
    figure = step_times(RECORDS)
    shown = [trace.legendgroup for trace in figure.data if trace.showlegend]
    assert shown == list(DESIGNS)


def test_the_caption_says_what_was_measured_where_and_when() -> None:
    (caption,) = [a.text for a in step_times(RECORDS).layout.annotations if a.name == "caption"]
    for part in ("9ZZZ", "16,000 alignment rows, 4,000 of them made up", "a CPU", "2026-01-01"):
        assert part in caption


def test_runs_are_not_mixed() -> None:
    other = _record("megafold", "step", 0, 9.0, date="2026-02-02")
    with pytest.raises(ValueError, match="records of one run are drawn, not of 2"):
        step_times([*RECORDS, other])
    with pytest.raises(ValueError, match="not of 0"):
        step_times([])

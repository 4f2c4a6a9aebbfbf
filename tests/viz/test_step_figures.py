"""What a training step costs, drawn."""

from __future__ import annotations

import pytest

from megafold.viz import step_figures
from tests.viz.test_paper_figures import record


def test_each_configuration_is_one_line_in_order_of_length() -> None:
    rows = [
        record(shape="tiny N64", ms=400.0, ms_q1=300.0, ms_q3=600.0, peak_mb=80.0),
        record(shape="tiny N32", ms=200.0, ms_q1=200.0, ms_q3=200.0, peak_mb=20.0),
        record(shape="tiny checkpointed N32", ms=300.0),
    ]
    figure = step_figures.step_costs(rows)
    time = figure.data[0]
    assert time.name == "tiny"
    assert list(time.x) == [32, 64]
    assert list(time.y) == [0.2, 0.4]
    assert list(time.error_y.array) == pytest.approx([0.0, 0.2])
    assert list(figure.data[1].y) == pytest.approx([0.02, 0.08])
    assert {trace.name for trace in figure.data} == {"tiny", "tiny checkpointed"}
    assert "NVIDIA H200" in figure.to_json()


def test_implementations_are_lines_of_their_own_where_there_are_several() -> None:
    rows = [record(shape="af3 N32", impl="megafold"), record(shape="af3 N32", impl="eager")]
    figure = step_figures.step_costs(rows)
    assert {trace.name for trace in figure.data} == {"af3, megafold", "af3, eager"}


def test_other_records_are_refused() -> None:
    with pytest.raises(ValueError, match="draws records of train_step, got"):
        step_figures.step_costs([record(op="transition")])
    with pytest.raises(ValueError, match="none"):
        step_figures.step_costs([])

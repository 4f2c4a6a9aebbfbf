"""The paper's figures, redrawn."""

from __future__ import annotations

from collections.abc import Callable

import plotly.graph_objects as go
import pytest

from megafold.bench.records import Record
from megafold.viz import paper_figures, reference, theme
from megafold.viz.reference import OOM, Point


def on(device: str) -> list[Point]:
    return [p for p in reference.step_time() if p.device == device]


def record(**changes: object) -> Record:
    values = {
        "op": "train_step", "shape": "af3 N256", "dtype": "bfloat16", "impl": "megafold",
        "direction": "full", "ms": 3000.0, "ms_q1": 2900.0, "ms_q3": 3100.0,
        "peak_mb": 41000.0, "error": None, "device": "NVIDIA H200", "driver": "1",
        "torch": "2", "triton": "3", "revision": "abc", "date": "2030-02-01T10:00:00+00:00",
    }  # fmt: skip
    return Record(**{**values, **changes})  # type: ignore[arg-type]


def trace(figure: go.Figure, name: str) -> go.Scatter:
    (found,) = [t for t in figure.data if t.name == name]
    return found


def caption(figure: go.Figure) -> str:
    (found,) = [a for a in figure.layout.annotations if a.name == "caption"]
    return found.text


def test_a_line_has_every_finite_value() -> None:
    line = trace(paper_figures.step_time(on("NVIDIA H200")), "MegaFold (paper)")
    assert list(line.x) == [128, 256, 384, 512, 640, 768]
    assert list(line.y) == [3.72, 4.53, 7.30, 8.50, 13.26, 17.80]


def test_out_of_memory_is_drawn_above_every_value_and_not_left_out() -> None:
    figure = paper_figures.step_time(on("NVIDIA H200"))
    crosses = [t for t in figure.data if t.marker.symbol == "x"]
    failed = {(t.legendgroup, n) for t in crosses for n in t.customdata}
    assert failed == {
        ("PyTorch eager", 640), ("PyTorch eager", 768), ("torch.compile", 640),
        ("torch.compile", 768), ("DeepSpeed EvoformerAttention", 768),
    }  # fmt: skip
    highest = max(max(t.y) for t in figure.data if t.name)
    assert all(min(t.y) > highest for t in crosses)
    assert "out of memory" in {a.text for a in figure.layout.annotations}


def test_where_nothing_ran_out_of_memory_there_is_no_band() -> None:
    finite = [p for p in on("NVIDIA H200") if p.value is not OOM]
    figure = paper_figures.step_time(finite)
    assert "out of memory" not in {a.text for a in figure.layout.annotations}


def test_the_authors_megafold_is_not_taken_for_this_project() -> None:
    figure = paper_figures.step_time(on("NVIDIA H200"), [record()])
    assert trace(figure, "MegaFold (this project)").line.color == theme.look("megafold").color
    assert trace(figure, "MegaFold (paper)").line.color != theme.look("megafold").color


def test_measurements_are_drawn_in_the_units_of_the_paper() -> None:
    time = paper_figures.step_time(
        on("NVIDIA H200"), [record(), record(shape="af3 N128", ms=1500.0)]
    )
    assert list(trace(time, "MegaFold (this project)").x) == [128, 256]
    assert list(trace(time, "MegaFold (this project)").y) == [1.5, 3.0]
    memory = paper_figures.peak_memory(reference.peak_memory(), [record()])
    assert list(trace(memory, "MegaFold (this project)").y) == [41.0]


def test_the_caption_says_whose_values_they_are_and_when_ours_were_measured() -> None:
    without = caption(paper_figures.step_time(on("NVIDIA H200")))
    assert "arXiv 2506.20686" in without
    assert "This project: not measured yet." in without
    measured = caption(paper_figures.step_time(on("NVIDIA H200"), [record()]))
    assert "This project: NVIDIA H200, 2030-02-01." in measured
    assert "not measured" not in measured


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"op": "transition"}, r"a record of 'transition' does not belong here"),
        ({"device": "AMD MI250"}, r"a record of 'AMD MI250' beside the paper's 'NVIDIA H200'"),
        ({"shape": "B1 C128"}, r"no length N\.\.\. in the shape 'B1 C128'"),
    ],
)
def test_a_record_that_cannot_be_compared_is_refused(changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        paper_figures.step_time(on("NVIDIA H200"), [record(**changes)])


def test_devices_are_not_mixed() -> None:
    with pytest.raises(ValueError, match=r"points of one device"):
        paper_figures.step_time(reference.step_time())


def test_speed_up_is_a_ratio_of_times() -> None:
    figure = paper_figures.speed_up(on("NVIDIA H200"))
    bars = trace(figure, "MegaFold (paper)")
    assert list(bars.x) == ["128", "256", "384", "512"]
    assert bars.y[3] == pytest.approx(14.74 / 8.50)
    assert "At 640 and 768 tokens PyTorch eager runs out of memory." in caption(figure)


@pytest.mark.parametrize(
    "draw",
    [
        lambda: paper_figures.peak_memory(reference.peak_memory()),
        lambda: paper_figures.longest_sequence(reference.longest_sequence()),
        lambda: paper_figures.operator_calls(reference.operator_calls()),
        lambda: paper_figures.evo_attention_memory(reference.evo_attention_memory()),
        lambda: paper_figures.speed_up(on("AMD MI250")),
    ],
)
def test_every_figure_has_a_title_a_unit_and_a_source(draw: Callable[[], go.Figure]) -> None:
    figure = draw()
    assert figure.layout.title.text
    assert figure.layout.yaxis.title.text
    assert "arXiv 2506.20686" in caption(figure)


def test_the_memory_of_attention_lies_between_quadratic_and_cubic_growth() -> None:
    figure = paper_figures.evo_attention_memory(reference.evo_attention_memory())
    cubic = trace(figure, "cubic growth").y[-1]
    quadratic = trace(figure, "quadratic growth").y[-1]
    assert quadratic == pytest.approx(15.0)
    assert quadratic < trace(figure, "PyTorch eager").y[-1] < cubic


def test_runs_in_several_dtypes_are_told_apart() -> None:
    figure = paper_figures.step_time(on("NVIDIA H200"), [record(), record(dtype="float32")])
    assert trace(figure, "MegaFold (this project, bfloat16)")
    assert trace(figure, "MegaFold (this project, float32)")

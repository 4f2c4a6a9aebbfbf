"""Figures about operators show what they are given."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from megafold.bench.accuracy import Comparison
from megafold.bench.compile import Compiled
from megafold.bench.memory import SavedTensor, TrainingMemory
from megafold.bench.records import Record
from megafold.viz import operator_figures

RECORD = Record(
    op="transition", shape="M4 C8 H16", dtype="float32", impl="eager", direction="full",
    ms=2.0, ms_q1=1.5, ms_q3=3.0, peak_mb=1.0, error=1e-7, device="a CPU", driver="",
    torch="2", triton="3", revision="abc", date="2026-01-01T00:00:00+00:00",
)  # fmt: skip
KERNEL = Compiled("swiglu", "sm_90", "NVIDIA H200", 32, 0, 0, 128)


def caption(figure):
    return next(a.text for a in figure.layout.annotations if a.name == "caption")


def test_growth_names_the_fitted_power():
    figure = operator_figures.growth({"kept": {8: 64.0, 16: 512.0, 32: 4096.0}}, title="t")
    assert figure.data[0].name == "kept: N<sup>3.00</sup>"
    assert list(figure.data[0].y) == [64, 512, 4096]


def test_growth_without_series_is_refused():
    with pytest.raises(ValueError, match="no series to draw"):
        operator_figures.growth({}, title="t")


def test_times_show_median_and_quartiles_of_the_newest_row():
    older = replace(RECORD, ms=9.0, date="2025-01-01T00:00:00+00:00")
    figure = operator_figures.times([RECORD, older], title="t")
    (points,) = figure.data
    assert (points.name, list(points.y)) == ("PyTorch eager", [2.0])
    assert (list(points.error_y.array), list(points.error_y.arrayminus)) == ([1.0], [0.5])
    assert caption(figure).endswith("a CPU, float32, measured 2026-01-01")


def test_times_on_a_device_with_a_data_sheet_have_the_roofline_beside_them():
    of_gpu = replace(
        RECORD, device="NVIDIA H200", op="evo_attention", shape="B1 S384 N384 H4 D32",
        dtype="bfloat16", direction="forward", impl="megafold",
    )  # fmt: skip
    figure = operator_figures.times([of_gpu], title="t", direction="forward")
    (line,) = figure.layout.shapes
    assert (line.name, line.showlegend) == ("roofline", True)
    assert line.y0 == line.y1 == pytest.approx(0.032, rel=0.02)  # 153 MB at 4.8 TB/s
    assert operator_figures.times([RECORD], title="t").layout.shapes == ()


def test_times_of_many_shapes_stand_in_rows_of_equal_length():
    shapes = [f"M{n} C8 H16" for n in range(1, 7)]
    records = [replace(RECORD, shape=s, impl=i) for s in shapes for i in ("eager", "megafold")]
    figure = operator_figures.times(records, title="t")
    assert [list(trace.x) for trace in figure.data] == [shapes[:3]] * 2 + [shapes[3:]] * 2
    assert [trace.showlegend for trace in figure.data] == [True, True, False, False]
    assert [trace.yaxis for trace in figure.data] == ["y", "y", "y2", "y2"]


def test_times_of_two_devices_or_dtypes_are_not_put_side_by_side():
    for other in (replace(RECORD, device="a GPU"), replace(RECORD, dtype="bfloat16")):
        with pytest.raises(ValueError, match="not comparable"):
            operator_figures.times([RECORD, other], title="t")


def test_times_of_a_direction_nobody_measured_are_refused():
    with pytest.raises(ValueError, match="no records of direction 'forward'"):
        operator_figures.times([RECORD], title="t", direction="forward")


def test_registers_say_what_spilt():
    spilt = replace(KERNEL, target="sm_80", gpu="NVIDIA A100", registers=255, spill_bytes=64)
    figure = operator_figures.registers([KERNEL, spilt], title="t")
    assert list(figure.data[0].text) == ["32", "255, 64 B spilt"]


def test_kinds_nobody_calls_are_left_out():
    counts = {"a": {"linear": 3, "softmax": 0}, "b": {"linear": 5, "softmax": 0}}
    figure = operator_figures.calls_by_kind(counts, title="t", source="s")
    assert [list(bars.y) for bars in figure.data] == [["linear"], ["linear"]]
    assert [list(bars.x) for bars in figure.data] == [[3], [5]]


def test_training_memory_stacks_the_four_parts_in_megabytes():
    points = {16: TrainingMemory(1_000_000, 1_000_000, 2_000_000, 4_000_000)}
    *bars, share = operator_figures.training_memory(points, title="t", source="s").data
    assert [bar.y[0] for bar in bars] == [4, 1, 1, 2]
    assert list(share.y) == [50]


def test_rows_of_an_accuracy_table_say_what_breaks_the_rule():
    good = Comparison("output", 1e-7, 2e-7, 1e-7, 1e-7, 1e-9)
    bad = replace(good, result="grad x", error=4e-7)
    rows = operator_figures.accuracy_rows({"float32": [good, bad]})
    assert [row["within the rule"] for row in rows] == ["yes", "NO"]
    assert [row["ratio"] for row in rows] == ["0.50", "2.00"]


def test_rows_of_saved_tensors_are_largest_first_without_inputs():
    saved = [
        SavedTensor((4, 2), torch.float32, 32, "Silu", existing=False),
        SavedTensor((4, 6), torch.float32, 96, "Softmax", existing=False),
        SavedTensor((100,), torch.float32, 400, "", existing=True),
    ]
    rows = operator_figures.saved_rows(saved)
    assert [row["computed by"] for row in rows] == ["Softmax", "Silu"]
    assert [row["share"] for row in rows] == ["75.0%", "25.0%"]

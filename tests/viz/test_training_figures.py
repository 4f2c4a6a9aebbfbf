"""How training goes, and how near a prediction comes."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest

from megafold.train import StepRecord
from megafold.train.memorising import Evaluation
from megafold.viz import training_figures


def history(steps: int = 60) -> list[StepRecord]:
    return [
        StepRecord(i, {"total": 5.0 - i / 20, "mse": 1.0, "distogram": 2.0}, 1.0, 1e-3, 0.1)
        for i in range(steps)
    ]


def test_every_loss_has_a_line() -> None:
    figure = training_figures.loss_curve(history(), source="CPU, today")
    named = [trace.name for trace in figure.data if trace.showlegend is not False]
    assert named == ["total", "diffusion: mean squared error", "distogram"]
    assert figure.layout.yaxis.type == "log"
    assert "CPU, today" in figure.layout.annotations[0].text


def test_a_loss_that_is_always_zero_has_no_line() -> None:
    records = [StepRecord(i, {"total": 5.0, "bond": 0.0}, 1.0, 1e-3, 0.1) for i in range(3)]
    figure = training_figures.loss_curve(records)
    assert [trace.name for trace in figure.data if trace.showlegend is not False] == ["total"]


def test_a_history_that_cannot_be_drawn_is_refused() -> None:
    with pytest.raises(ValueError, match=r"no step"):
        training_figures.loss_curve([])
    broken = [*history(2), SimpleNamespace(step=2, losses={"total": 1.0})]
    with pytest.raises(ValueError, match=r"not every step has the losses total, mse, distogram"):
        training_figures.loss_curve(broken)


def test_the_running_median_looks_back_only_and_ignores_an_outlier() -> None:
    values = np.array([1.0, 1.0, 100.0, 1.0, 1.0])
    assert training_figures.running_median(values, 3).tolist() == [1, 1, 1, 1, 1]
    assert training_figures.running_median(np.array([4.0, 2.0, 6.0]), 2).tolist() == [4, 3, 4]


def test_lddt_is_drawn_from_nought_to_one() -> None:
    figure = training_figures.lddt_curve([Evaluation(150, 0.4, 0.5), Evaluation(300, 0.7, 0.8)])
    assert [trace.name for trace in figure.data] == ["all atoms", "CA"]
    assert figure.layout.yaxis.range[0] == 0
    with pytest.raises(ValueError, match=r"no evaluation"):
        training_figures.lddt_curve([])


def test_runs_are_lines_side_by_side() -> None:
    runs = {"one": [Evaluation(1, 0.4, 0.5), Evaluation(3, 0.7, 0.8)], "two": [Evaluation(2, 1, 1)]}
    figure = training_figures.lddt_curves(runs, title="Learnt by heart")
    assert [(t.name, list(t.x), list(t.y)) for t in figure.data] == [
        ("one", [1, 3], [0.4, 0.7]),
        ("two", [2], [1]),
    ]
    for without in ({}, {"one": []}):
        with pytest.raises(ValueError, match=r"no evaluation to draw: (no run|one)"):
            training_figures.lddt_curves(without, title="")


def test_distance_maps_show_distances_and_their_difference() -> None:
    true = np.array([[0.0, 0, 0], [3, 4, 0], [0, 0, 12]])
    figure = training_figures.distance_maps(2 * true, true)
    predicted, truth, difference = (trace.z for trace in figure.data)
    assert truth[0].tolist() == [0, 5, 12]
    assert predicted[0].tolist() == [0, 10, 24]
    assert difference[1, 2] == pytest.approx(13.0)


def test_distances_without_a_truth_are_blank() -> None:
    true = np.arange(12.0).reshape(4, 3)
    known = np.array([True, True, False, True])
    figure = training_figures.distance_maps(true, true, known)
    blank = np.isnan(figure.data[1].z)
    assert blank[2].all()
    assert blank[:, 2].all()
    assert not blank[np.ix_(known, known)].any()
    assert not np.isnan(figure.data[0].z).any()


@pytest.mark.parametrize(
    ("predicted", "mask", "message"),
    [
        (np.zeros((4, 3)), None, r"predicted is \(4, 3\) and true \(5, 3\)"),
        (np.zeros((5, 2)), None, r"predicted must be \[N, 3\].*\(5, 2\)"),
        (np.zeros((5, 3)), np.ones(5), r"mask must be bool \(5,\), not float64"),
    ],
)
def test_shapes_that_do_not_agree_are_named(predicted, mask, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        training_figures.distance_maps(predicted, np.zeros((5, 3)), mask)


def test_residues_without_a_score_leave_a_gap() -> None:
    figure = training_figures.per_residue_lddt([0.5, float("nan"), 0.7], residues=[4, 5, 6])
    assert np.isnan(figure.data[0].y[1])
    assert figure.data[0].connectgaps is False
    assert list(figure.data[0].x) == [4, 5, 6]


def test_several_rows_are_told_apart() -> None:
    figure = training_figures.per_residue_lddt({"before": [0.1, 0.2], "after": [0.8, 0.9]})
    assert [trace.name for trace in figure.data] == ["before", "after"]
    assert figure.layout.showlegend
    with pytest.raises(ValueError, match=r"before: 2 values for 3 residues"):
        training_figures.per_residue_lddt({"before": [0.1, 0.2]}, residues=[1, 2, 3])

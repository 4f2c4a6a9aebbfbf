"""The frame browser, driven without a browser."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from megafold.data import Structure
from megafold.viz import frame_browser, viewer
from megafold.viz.widgets import FrameBrowser


@pytest.fixture
def frames(peptide: Structure) -> np.ndarray:
    """A peptide that comes out of noise; each frame lies elsewhere in space."""
    rng = np.random.default_rng(0)
    noise = [peptide.positions + rng.normal(scale=s, size=(185, 3)) for s in (20.0, 2.0, 0.0)]
    turn = np.linalg.qr(rng.normal(size=(3, 3)))[0]
    return np.stack([frame @ (turn * np.linalg.det(turn)) + 30 for frame in noise])


@pytest.fixture
def displayed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """HTML that the widget displays."""
    shown: list[str] = []
    monkeypatch.setattr("megafold.viz.widgets.display", lambda html: shown.append(html.data))
    return shown


@pytest.fixture
def browsing(
    peptide: Structure, frames: np.ndarray, displayed: list[str], monkeypatch: pytest.MonkeyPatch
) -> FrameBrowser:
    """Somebody watches a browser of three frames."""
    monkeypatch.setenv("MEGAFOLD_HEADLESS", "0")
    labels = ["noise 20 Å", "noise 2 Å", "no noise"]
    return frame_browser(peptide, frames, labels=labels, truth=peptide)


def test_it_begins_with_the_last_frame(browsing: FrameBrowser, peptide: Structure) -> None:
    assert browsing.slider.value == 2
    assert browsing.label == "no noise"


def test_frames_are_superposed_on_the_truth(browsing: FrameBrowser, peptide: Structure) -> None:
    assert browsing.structure.positions == pytest.approx(peptide.positions, abs=1e-3)


def test_without_a_truth_frames_are_superposed_on_the_last(
    peptide: Structure, frames: np.ndarray
) -> None:
    browser = frame_browser(peptide, frames)
    assert browser.structure.positions == pytest.approx(frames[-1], abs=1e-3)
    browser.slider.value = 1
    assert np.linalg.norm(browser.structure.positions - frames[-1], axis=1).mean() < 5


def test_moving_the_slider_draws_the_frame_into_the_same_view(
    browsing: FrameBrowser, displayed: list[str]
) -> None:
    browsing.slider.value = 1
    (script,) = displayed
    assert f"viewer_{browsing._shown.view.uniqueid}.removeAllModels()" in script
    assert "noise 2 \\u00c5" in script
    assert script.count("addModel") == 2  # the truth and the frame


def test_a_frame_whose_backbone_is_broken_is_a_trace_and_says_so(
    browsing: FrameBrowser, displayed: list[str]
) -> None:
    browsing.slider.value = 0
    assert "backbone drawn as a trace" in displayed[-1]
    assert "addAtoms" in displayed[-1]


def test_the_slider_reports_when_it_is_let_go(browsing: FrameBrowser) -> None:
    assert browsing.slider.continuous_update is False


def test_an_error_while_drawing_is_not_swallowed(
    browsing: FrameBrowser, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("the view cannot be drawn")

    monkeypatch.setattr(viewer, "update_html", fail)
    with pytest.raises(RuntimeError, match=r"cannot be drawn"):
        browsing.slider.value = 0


def test_headless_the_whole_view_is_drawn_again_so_that_the_still_is_the_frame(
    peptide: Structure, frames: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    shown: list[object] = []
    monkeypatch.setattr("megafold.viz.widgets.display", shown.append)
    monkeypatch.setenv("MEGAFOLD_HEADLESS", "1")
    browser = frame_browser(peptide, frames, labels=["a", "b", "c"])
    browser.slider.value = 1
    assert [view.title for view in shown] == ["b"]  # type: ignore[attr-defined]


def test_labels_and_truth_must_fit_the_frames(peptide: Structure, frames: np.ndarray) -> None:
    with pytest.raises(ValueError, match=r"2 labels for 3 frames"):
        frame_browser(peptide, frames, labels=["a", "b"])
    half = replace(
        peptide,
        layout=type(peptide.layout)(
            **{name: values[:10] for name, values in vars(peptide.layout).items()}
        ),
    )
    with pytest.raises(ValueError, match=r"truth has 10 atoms and structure 185"):
        frame_browser(peptide, frames, truth=half)

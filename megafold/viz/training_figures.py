"""How training goes, and how near a prediction comes to the truth."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from megafold.viz import theme

LOSSES = {
    "total": "total",
    "mse": "diffusion: mean squared error",
    "bond": "diffusion: bonds of ligands",
    "smooth_lddt": "diffusion: smooth lDDT",
    "distogram": "distogram",
    "plddt": "confidence: pLDDT",
    "pde": "confidence: PDE",
    "resolved": "confidence: resolved",
    "pae": "confidence: PAE",
}
_COLORS = (theme.INK, *theme.PALETTE)
_LEAST_LOSS = 0.01  # drawn; below it, as of atoms that are all resolved, nothing is left to see


class StepLike(Protocol):
    """A training step's record, as ``megafold.train.StepRecord``."""

    @property
    def step(self) -> int: ...
    @property
    def losses(self) -> Mapping[str, float]: ...


class EvaluationLike(Protocol):
    """A sampled structure's score, as ``megafold.train.Evaluation``; lDDT from 0 to 1."""

    @property
    def step(self) -> int: ...
    @property
    def lddt(self) -> float: ...
    @property
    def lddt_centre(self) -> float: ...


def loss_curve(history: Sequence[StepLike], *, window: int = 25, source: str = "") -> go.Figure:
    """Every loss against the training step, smoothed, on a logarithmic axis.

    A loss that is 0 throughout, as that of bonds without any ligand bound, is not drawn.

    Args:
        history: one record per step, in order.
        window: steps in the running median; the total's single steps are drawn faintly behind.
        source: a line for the caption, such as device and date.

    Raises:
        ValueError: the history is empty, or its steps differ in which losses they have.
    """
    if not history:
        raise ValueError("the history has no step to draw")
    names = list(history[0].losses)
    if any(list(record.losses) != names for record in history):
        raise ValueError(f"not every step has the losses {', '.join(names)}")
    names = [name for name in names if any(record.losses[name] for record in history)]
    steps = np.array([record.step for record in history], dtype=np.int32)
    figure = go.Figure()
    for name, color in zip(names, _COLORS, strict=False):
        values = np.array([record.losses[name] for record in history], dtype=np.float32)
        if name == "total":
            figure.add_scatter(
                x=steps,
                y=values,
                mode="lines",
                line={"color": color, "width": 0.6},
                opacity=0.25,
                showlegend=False,
                hoverinfo="skip",
            )
        figure.add_scatter(
            x=steps,
            y=running_median(values, window),
            mode="lines",
            name=LOSSES.get(name, name.replace("_", " ")),
            line={"color": color, "width": 2.5 if name == "total" else 2},
            hovertemplate="step %{x}: %{y:.3g}<extra>%{fullData.name}</extra>",
        )
    figure.update_layout(
        title="Training loss",
        xaxis_title_text="step",
        yaxis={"title": {"text": "loss"}, "type": "log", "dtick": 1, "minor": {"dtick": "D1"},
               "autorangeoptions": {"minallowed": math.log10(_LEAST_LOSS)}},
        legend={"orientation": "v", "x": 1.02, "y": 1.0, "xanchor": "left", "yanchor": "top"},
    )  # fmt: skip
    return theme.caption(figure, _lines(f"Running median over {window} steps.", source))


def lddt_curve(evaluations: Sequence[EvaluationLike], *, source: str = "") -> go.Figure:
    """lDDT of sampled structures against the training step, of all atoms and of centre atoms.

    Raises:
        ValueError: there is no evaluation.
    """
    if not evaluations:
        raise ValueError("there is no evaluation to draw")
    steps = [e.step for e in evaluations]
    lines = {
        "all atoms": (steps, [e.lddt for e in evaluations]),
        "CA": (steps, [e.lddt_centre for e in evaluations]),
    }
    return _lddt_lines(lines, "lDDT of sampled structures", "lDDT", source)


def lddt_curves(
    runs: Mapping[str, Sequence[EvaluationLike]], *, title: str, source: str = ""
) -> go.Figure:
    """lDDT of all atoms of sampled structures against the training step, a line for each run.

    Raises:
        ValueError: there is no run, or one without any evaluation.
    """
    empty = [name for name, evaluations in runs.items() if not evaluations]
    if empty or not runs:
        raise ValueError(f"there is no evaluation to draw: {', '.join(empty) or 'no run'}")
    lines = {name: ([e.step for e in run], [e.lddt for e in run]) for name, run in runs.items()}
    return _lddt_lines(lines, title, "lDDT, all atoms", source)


def _lddt_lines(
    lines: Mapping[str, tuple[list[int], list[float]]], title: str, what: str, source: str
) -> go.Figure:
    """Scores from 0 to 1 against training steps, by name."""
    figure = go.Figure()
    for number, (name, (steps, scores)) in enumerate(lines.items()):
        figure.add_scatter(
            x=steps,
            y=scores,
            mode="lines+markers",
            name=name,
            line_color=theme.PALETTE[number % len(theme.PALETTE)],
            hovertemplate="step %{x}: %{y:.3f}<extra>%{fullData.name}</extra>",
        )
    figure.update_layout(
        title=title,
        xaxis={"title": {"text": "training step"}, "rangemode": "tozero"},
        yaxis={"title": {"text": what}, "range": [0, 1.03]},
        showlegend=True,  # also of a single run: its name stands nowhere else
    )
    return theme.caption(figure, source) if source else figure


def distance_maps(
    predicted: np.ndarray, true: np.ndarray, mask: np.ndarray | None = None
) -> go.Figure:
    """Distances between tokens: predicted, true, and their difference.

    Args:
        predicted: `[N, 3]` float, angstrom, one point per token.
        true: `[N, 3]` float, angstrom.
        mask: `[N]` bool, False where the truth is unknown; such rows are left blank.

    Raises:
        ValueError: the shapes do not agree.
    """
    predicted, true = _points(predicted, "predicted"), _points(true, "true")
    if predicted.shape != true.shape:
        raise ValueError(f"predicted is {predicted.shape} and true {true.shape}: not the same")
    known = np.ones(len(true), bool) if mask is None else np.asarray(mask)
    if known.shape != (len(true),) or known.dtype != bool:
        raise ValueError(f"mask must be bool {(len(true),)}, not {known.dtype} {known.shape}")
    guess, truth = _distances(predicted), _distances(true)
    truth[~known] = truth[:, ~known] = np.nan
    furthest = float(np.nanmax([np.nanmax(truth, initial=0), guess.max(initial=0)]))
    difference = guess - truth
    widest = float(np.nanmax(np.abs(difference), initial=1e-3))
    titles = ("predicted", "true", "predicted minus true")
    figure = make_subplots(1, 3, subplot_titles=titles, horizontal_spacing=0.06)
    for column, values in enumerate((guess, truth, difference), start=1):
        figure.add_heatmap(
            z=values.round(2).astype(np.float32),
            x0=1,
            y0=1,
            coloraxis="coloraxis" if column < 3 else "coloraxis2",
            hovertemplate="%{x}, %{y}: %{z:.1f} Å<extra></extra>",
            row=1,
            col=column,
        )
    for column in (1, 2, 3):
        axis = "x" if column == 1 else f"x{column}"
        square = {"scaleanchor": axis, "autorange": "reversed", "constrain": "domain"}
        figure.update_yaxes(**square, showgrid=False, row=1, col=column)
        figure.update_xaxes(
            title_text="token", constrain="domain", showgrid=False, row=1, col=column
        )
    figure.update_yaxes(title_text="token", row=1, col=1)
    bar: dict[str, Any] = {"orientation": "h", "thickness": 12, "y": -0.42, "yanchor": "top"}
    bar |= {"title": {"side": "bottom"}}
    figure.update_layout(
        title="Distances between tokens",
        width=900,
        height=470,
        margin={"t": 80, "b": 110},
        coloraxis={
            "colorscale": theme.SEQUENTIAL,
            "reversescale": True,
            "cmin": 0,
            "cmax": furthest,
            "colorbar": {**bar, "x": 0.31, "len": 0.62, "title_text": "distance (Å)"},
        },
        coloraxis2={
            "colorscale": theme.DIVERGING,
            "cmin": -widest,
            "cmax": widest,
            "colorbar": {**bar, "x": 0.86, "len": 0.28, "title_text": "difference (Å)"},
        },
    )
    return figure


def per_residue_lddt(
    scores: Mapping[str, Sequence[float]] | Sequence[float],
    residues: Sequence[int] | None = None,
    *,
    source: str = "",
) -> go.Figure:
    """lDDT along the chain, 0 to 1; a gap where there is none (NaN).

    Args:
        scores: one value per residue, or several such rows by name.
        residues: residue numbers; from 1 if left out.
        source: a line for the caption.

    Raises:
        ValueError: rows and residue numbers differ in length.
    """
    rows = scores if isinstance(scores, Mapping) else {"lDDT": scores}
    figure = go.Figure()
    for number, (name, values) in enumerate(rows.items()):
        places = range(1, len(values) + 1) if residues is None else residues
        if len(places) != len(values):
            raise ValueError(f"{name}: {len(values)} values for {len(places)} residues")
        figure.add_scatter(
            x=list(places),
            y=np.asarray(values, dtype=np.float32).round(4),
            name=name,
            mode="lines+markers",
            line={"width": 2, "color": theme.PALETTE[number % len(theme.PALETTE)]},
            marker={"size": 5},
            connectgaps=False,
            hovertemplate=f"residue %{{x}}, {name}: %{{y:.2f}}<extra></extra>",
        )
    figure.update_layout(
        title="lDDT along the chain",
        xaxis_title_text="residue",
        yaxis={"title": {"text": "lDDT"}, "range": [0, 1.03]},
        showlegend=len(rows) > 1,
    )
    return theme.caption(figure, source) if source else figure


def running_median(values: np.ndarray, window: int) -> np.ndarray:
    """Median over the last ``window`` values, fewer at the start. `[N]` in, `[N]` out."""
    if window < 1:
        raise ValueError(f"window must be at least 1, not {window}")
    padded = np.concatenate([np.full(window - 1, np.nan, values.dtype), values])
    return np.nanmedian(np.lib.stride_tricks.sliding_window_view(padded, window), axis=1)


def _distances(points: np.ndarray) -> np.ndarray:
    return np.linalg.norm(points[:, None] - points[None], axis=-1)


def _points(values: np.ndarray, name: str) -> np.ndarray:
    points = np.asarray(values, dtype=np.float64)
    if points.ndim != 2 or points.shape[1] != 3 or len(points) == 0:
        raise ValueError(f"{name} must be [N, 3] with N at least 1, not {points.shape}")
    return points


def _lines(*parts: str) -> str:
    return "<br>".join(part for part in parts if part)

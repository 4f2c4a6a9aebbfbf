"""What the feature cache saves: stages of a training example, and the wait for the next one."""

from __future__ import annotations

from collections.abc import Sequence

import plotly.graph_objects as go
from plotly.subplots import make_subplots

from megafold.bench.store_records import DESIGNS, STAGES, StepRecord
from megafold.viz import theme

_LOOKS = {
    "uncached": theme.Look("uncached", theme.PALETTE[7], "square"),
    "gzip pickle": theme.Look("paper's design (gzip pickle)", theme.PALETTE[3], "diamond"),
    "megafold": theme.Look("ours (memory map)", theme.PALETTE[0], "circle"),
}
_STAGE_NAMES = {
    "structure": "read the structure",
    "alignments": "read the alignments",
    "featurize": "featurise",
    "load": "load features",
    "crop": "crop, draw rows",
    "batch": "make the batch",
}


def step_times(records: Sequence[StepRecord]) -> go.Figure:
    """Time of each stage by design, and the wait for an example by number of workers.

    Both axes of time are logarithmic, and lines reach from the first to the third quartile.

    Args:
        records: Of one run of ``megafold bench-data``.

    Raises:
        ValueError: There is none, or they are of several runs.
    """
    runs = {record.date for record in records}
    if len(runs) != 1:
        raise ValueError(f"records of one run are drawn, not of {len(runs)}")
    figure = make_subplots(
        cols=2,
        column_widths=[0.56, 0.44],
        horizontal_spacing=0.13,
        subplot_titles=("one stage, one core", "wait for the next example"),
    )
    for design in DESIGNS:
        stages = [r for r in records if r.design == design and r.stage != "step"]
        steps = [r for r in records if r.design == design and r.stage == "step"]
        stages.sort(key=lambda r: STAGES.index(r.stage))
        steps.sort(key=lambda r: r.workers)
        names = [_STAGE_NAMES[r.stage] for r in stages]
        _add(figure, design, stages, y=names, column=1)
        _add(figure, design, steps, x=[r.workers for r in steps], column=2)
    order = [_STAGE_NAMES[stage] for stage in STAGES if stage in _STAGE_NAMES]
    figure.update_xaxes(type="log", title_text="milliseconds", dtick=1, col=1)
    figure.update_yaxes(
        categoryorder="array", categoryarray=order[::-1], showline=False, ticks="", col=1
    )
    figure.update_yaxes(type="log", title_text="milliseconds", dtick=1, rangemode="tozero", col=2)
    figure.update_xaxes(title_text="loader's workers", dtick=1, col=2)
    one = records[0]
    figure.update_layout(title="Making a training example", height=460, margin_t=112, legend_y=1.1)
    made_up = f", {one.made_up_rows:,} of them made up" if one.made_up_rows else ""
    return theme.caption(
        figure,
        f"{one.entry}: {one.tokens} tokens, {one.rows:,} alignment rows{made_up}; crops of "
        f"{one.crop} tokens and {one.crop_rows:,} rows.<br>{one.device}, {one.date[:10]}. "
        "Components and conformers are loaded already; nothing is searched for.",
    )


def _add(
    figure: go.Figure,
    design: str,
    records: Sequence[StepRecord],
    *,
    x: Sequence[int] | None = None,
    y: Sequence[str] | None = None,
    column: int,
) -> None:
    """One design's points with their quartiles, time along the axis that is not given."""
    look = _LOOKS[design]
    ms = [r.ms for r in records]
    error = {
        "array": [r.ms_q3 - r.ms for r in records],
        "arrayminus": [r.ms - r.ms_q1 for r in records],
        "thickness": 1.5,
        "width": 3,
    }
    figure.add_trace(
        go.Scatter(
            x=ms if x is None else x,
            y=ms if y is None else y,
            error_x=error if x is None else None,
            error_y=error if y is None else None,
            mode="markers" if x is None else "lines+markers",
            name=look.label,
            legendgroup=design,
            showlegend=column == 1,
            marker={"color": look.color, "symbol": look.symbol, "size": 10},
            line={"color": look.color},
            hovertemplate="%{x}, %{y}<extra>%{fullData.name}</extra>",
        ),
        row=1,
        col=column,
    )

"""Figures and tables about operators: memory, time, accuracy, and what compilers say."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

import plotly.graph_objects as go
import torch
from plotly.subplots import make_subplots

from megafold.bench import cases, roofline, scaling
from megafold.bench.accuracy import Comparison
from megafold.bench.compile import Compiled
from megafold.bench.memory import MB, SavedTensor, TrainingMemory
from megafold.bench.records import Record, newest
from megafold.viz import theme

SHAPES_IN_A_ROW = 5  # of a figure, at most
PARTS = ("activations", "parameters", "gradients", "optimizer")


def growth(
    series: Mapping[str, Mapping[int, float]],
    *,
    title: str,
    x_title: str = "tokens N",
    y_title: str = "megabytes",
    fitted: int = 3,
    source: str = "",
) -> go.Figure:
    """Quantities against size, both logarithmic; the legend gives the fitted power of each.

    Args:
        series: name -> {size: value}, every value positive.
        fitted: how many of the largest sizes the power is fitted to.
        source: where the numbers come from, for the caption.

    Raises:
        ValueError: there is nothing to draw.
    """
    if not series:
        raise ValueError("no series to draw")
    figure = go.Figure()
    variable = x_title.split()[-1]
    for number, (name, points) in enumerate(series.items()):
        sizes, values = list(points), list(points.values())
        power = scaling.exponent(sizes[-fitted:], values[-fitted:])
        figure.add_scatter(
            x=sizes,
            y=values,
            name=f"{name}: {variable}<sup>{power:.2f}</sup>",
            mode="lines+markers",
            line_color=theme.PALETTE[number],
            hovertemplate=f"{name}<br>{variable} = %{{x}}: %{{y:.4g}} {y_title}<extra></extra>",
        )
    sizes = sorted({size for points in series.values() for size in points})
    figure.update_xaxes(type="log", title=x_title, tickvals=sizes, ticktext=[str(n) for n in sizes])
    log_y(figure, y_title, [v for points in series.values() for v in points.values()])
    figure.update_layout(title=title)
    note = f"powers fitted to the {fitted} largest sizes"
    return theme.caption(figure, "<br>".join(filter(None, (source, note))))


def times(records: Iterable[Record], *, title: str, direction: str = "full") -> go.Figure:
    """Median time of every implementation and shape, with quartiles; the newest rows count.

    On a device that has a data sheet, dashes mark the time below which a shape cannot run on it.

    Raises:
        ValueError: no record of this direction, or records that cannot be compared: of several
            devices or dtypes.
    """
    rows = [r for r in newest(records) if r.direction == direction]
    if not rows:
        raise ValueError(f"no records of direction {direction!r} to draw")
    if len({(r.device, r.dtype) for r in rows}) > 1:
        raise ValueError(f"not comparable: {records_source(rows)}")
    shapes = list(dict.fromkeys(r.shape for r in rows))
    in_a_row = math.ceil(len(shapes) / math.ceil(len(shapes) / SHAPES_IN_A_ROW))  # none left alone
    panels = [shapes[i : i + in_a_row] for i in range(0, len(shapes), in_a_row)]
    figure = make_subplots(rows=len(panels), vertical_spacing=0.2 / len(panels))
    named: set[str] = set()
    for row, panel in enumerate(panels, start=1):
        of_panel = [r for r in rows if r.shape in panel]
        for impl in dict.fromkeys(r.impl for r in of_panel):
            found = [r for shape in panel for r in of_panel if (r.shape, r.impl) == (shape, impl)]
            _times_of(figure, row, impl, found, first=impl not in named)
            named.add(impl)
        bounds = _bounds(of_panel)
        for number, shape in enumerate(panel):
            if shape in bounds:
                figure.add_shape(
                    type="line", x0=number - 0.42, x1=number + 0.42, y0=bounds[shape],
                    y1=bounds[shape], line={"color": theme.INK, "width": 2, "dash": "dot"},
                    name="roofline", showlegend="roofline" not in named, row=row, col=1,
                )  # fmt: skip
                named.add("roofline")
        values = [t for r in of_panel for t in (r.ms_q1, r.ms_q3)] + list(bounds.values())
        what = "forward and backward" if direction == "full" else "forward"
        log_y(figure, f"ms, {what}", values, row=row, col=1)
        figure.update_xaxes(
            categoryorder="array", categoryarray=panel, tickvals=panel, showgrid=False,
            ticktext=[_two_lines(s) if len(panel) > 4 else s for s in panel], row=row, col=1,
        )  # fmt: skip
    height = theme.HEIGHT + 300 * (len(panels) - 1)
    figure.update_layout(
        title={"text": title, "y": 1 - 15 / height},  # in pixels, however high the figure is
        legend_y=1 + 6 / (height - 160),
        scattermode="group",
        scattergap=0.4,
        height=height,
        margin_t=84 if len(named) <= 5 else 116,  # a legend of two lines
    )
    lines = 2 if len(panels[-1]) > 4 else 1
    return theme.caption(figure, f"median and quartiles · {records_source(rows)}", tick_lines=lines)


def _times_of(
    figure: go.Figure, row: int, impl: str, found: Sequence[Record], *, first: bool
) -> None:
    """The times of one implementation in one panel."""
    look = theme.look(impl)
    figure.add_scatter(
        x=[r.shape for r in found],
        y=[r.ms for r in found],
        name=look.label,
        legendgroup=impl,
        showlegend=first,
        mode="markers",
        marker={"color": look.color, "symbol": look.symbol, "size": 11},
        error_y={
            "type": "data",
            "symmetric": False,
            "array": [r.ms_q3 - r.ms for r in found],
            "arrayminus": [r.ms - r.ms_q1 for r in found],
            "thickness": 1.5,
            "width": 3,
        },
        hovertemplate="%{x}<br>%{y:.3g} ms<extra>" + look.label + "</extra>",
        row=row,
        col=1,
    )


def _two_lines(shape: str) -> str:
    """``"B1 S384 N384<br>H4 D32"``"""
    words = shape.split()
    half = (len(words) + 1) // 2
    return " ".join(words[:half]) + "<br>" + " ".join(words[half:])


def _bounds(rows: Sequence[Record]) -> dict[str, float]:
    """The roofline of each shape, ms; none for a device without a data sheet."""
    peaks = roofline.known_peaks(rows[0].device)
    if peaks is None:
        return {}
    return {
        r.shape: roofline.bound_ms(
            cases.case(r.op, r.shape), r.direction, getattr(torch, r.dtype), peaks
        )
        for r in rows
        if r.op in cases.SHAPES
    }


def log_y(figure: go.Figure, title: str, values: Sequence[float], **where: int) -> None:
    """A logarithmic axis over ``values``, with ticks at 1, 2 and 5 times the powers of ten.

    Args:
        where: ``row`` and ``col`` of a figure that has several axes.
    """
    low, high = math.log10(min(values)), math.log10(max(values))
    ticks = [
        digit * 10.0**power
        for power in range(math.floor(low) - 1, math.ceil(high) + 1)
        for digit in (1, 2, 5)
    ]
    margin = 0.06 * max(high - low, 0.5)
    figure.update_yaxes(
        type="log",
        title=title,
        range=[low - margin, high + margin],
        tickvals=ticks,
        ticktext=[f"{tick:g}" for tick in ticks],
        **where,
    )


def records_source(rows: Sequence[Record]) -> str:
    """Device, dtype and date of records, for a caption."""
    devices = " and ".join(dict.fromkeys(r.device for r in rows))
    dtypes = ", ".join(dict.fromkeys(r.dtype for r in rows))
    dates = sorted({r.date[:10] for r in rows})
    when = dates[0] if len(dates) == 1 else f"{dates[0]} to {dates[-1]}"
    return f"{devices}, {dtypes}, measured {when}"


def registers(compiled: Sequence[Compiled], *, title: str) -> go.Figure:
    """Registers per thread of every kernel on every GPU; spills are written on the bar."""
    figure = go.Figure()
    for number, kernel in enumerate(dict.fromkeys(c.kernel for c in compiled)):
        rows = [c for c in compiled if c.kernel == kernel]
        figure.add_bar(
            x=[f"{c.gpu}<br>({c.target})" for c in rows],
            y=[c.registers for c in rows],
            name=kernel,
            marker_color=theme.PALETTE[number],
            text=[
                f"{c.registers}" + (f", {c.spill_bytes} B spilt" * (c.spill_bytes > 0))
                for c in rows
            ],
            textposition="outside",
            cliponaxis=False,
        )
    figure.update_layout(title=title, barmode="group", yaxis_title="vector registers per thread")
    limits = "a thread has at most 255 on NVIDIA; on these AMD GPUs 512, accumulators included"
    return theme.caption(
        figure, f"compiled ahead of time by Triton, without these GPUs<br>{limits}"
    )


def calls_by_kind(counts: Mapping[str, Mapping[str, int]], *, title: str, source: str) -> go.Figure:
    """How often each kind of operation is called, one bar per column of ``counts``.

    Args:
        counts: what was counted -> kind -> calls; kinds nobody calls are left out.
    """
    figure = go.Figure()
    kinds = [k for k in next(iter(counts.values())) if any(c[k] for c in counts.values())]
    kinds.sort(key=lambda kind: max(c[kind] for c in counts.values()))
    for number, (name, by_kind) in enumerate(counts.items()):
        figure.add_bar(
            y=kinds,
            x=[by_kind[kind] for kind in kinds],
            name=name,
            orientation="h",
            marker_color=theme.PALETTE[number],
            text=[f"{by_kind[kind]:,}" for kind in kinds],
            textposition="outside",
            cliponaxis=False,
        )
    figure.update_layout(title=title, xaxis_title="calls", margin_r=70, showlegend=len(counts) > 1)
    return theme.caption(figure, source)


def training_memory(points: Mapping[int, TrainingMemory], *, title: str, source: str) -> go.Figure:
    """Memory of a training step by what it holds, against tokens; and the activations' share."""
    sizes = [str(tokens) for tokens in points]
    figure = make_subplots(
        cols=2, column_widths=[0.62, 0.38], horizontal_spacing=0.14,
        subplot_titles=("what the memory holds", "share of the activations"),
    )  # fmt: skip
    for number, part in enumerate(PARTS):
        figure.add_bar(
            x=sizes,
            y=[getattr(m, part) / MB for m in points.values()],
            name=part if part != "optimizer" else "optimizer state",
            marker_color=theme.PALETTE[number],
            hovertemplate="%{x} tokens: %{y:.4g} MB<extra>" + part + "</extra>",
            row=1,
            col=1,
        )
    figure.add_scatter(
        x=sizes,
        y=[100 * m.activations / m.total for m in points.values()],
        mode="lines+markers",
        marker_color=theme.PALETTE[0],
        showlegend=False,
        hovertemplate="%{x} tokens: %{y:.1f} %<extra></extra>",
        row=1,
        col=2,
    )
    figure.update_xaxes(title="tokens", type="category")
    figure.update_yaxes(title="megabytes", row=1, col=1)
    figure.update_yaxes(title="percent", range=[0, 102], row=1, col=2)
    figure.update_layout(title=title, barmode="stack", legend_y=1.08, margin_t=112)
    figure.update_layout(legend_traceorder="normal")
    return theme.caption(figure, source)


def accuracy_rows(comparisons: Mapping[str, Sequence[Comparison]]) -> list[dict[str, object]]:
    """Errors beside those of PyTorch eager, by dtype and result: rows for ``notebook.table``."""
    return [
        {
            "dtype": dtype,
            "result": c.result,
            "error": f"{c.error:.1e}",
            "eager's error": f"{c.eager_error:.1e}",
            "ratio": f"{c.error / c.eager_error:.2f}" if c.eager_error else "",
            "within the rule": "yes" if c.passes else "NO",
        }
        for dtype, of_dtype in comparisons.items()
        for c in of_dtype
    ]


def saved_rows(saved: Iterable[SavedTensor]) -> list[dict[str, object]]:
    """What autograd keeps beyond inputs and parameters, largest first, for ``notebook.table``."""
    kept = sorted((s for s in saved if not s.existing), key=lambda s: -s.bytes)
    total = sum(s.bytes for s in kept)
    return [
        {
            "computed by": s.made_by or "statistics, mask",
            "shape": " x ".join(map(str, s.shape)),
            "dtype": str(s.dtype).removeprefix("torch."),
            "MB": f"{s.bytes / MB:.3f}",
            "share": f"{s.bytes / total:.1%}",
        }
        for s in kept
    ]

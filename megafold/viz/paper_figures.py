"""The paper's figures, redrawn from its values, with this project's measurements on top.

Every function takes plain rows (``megafold.viz.reference``, ``megafold.bench.records``) and
returns a Plotly figure that says where its numbers come from.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import plotly.graph_objects as go

from megafold.viz import reference, theme
from megafold.viz.reference import OOM, Calls, Longest, Point

if TYPE_CHECKING:
    from megafold.bench.records import Record

SETTING = (
    "Full AlphaFold 3, batch 1, 48 Pairformer blocks, 48 diffusion samples, activation "
    "checkpointing, data loading included."
)
NOT_MEASURED = "This project: not measured yet."


@dataclass(frozen=True)
class _Line:
    """One curve against length: finite values, and the lengths that ran out of memory."""

    look: theme.Look
    points: tuple[tuple[int, float], ...]
    failed: tuple[int, ...]
    measured: bool


def step_time(points: Sequence[Point], measured: Sequence[Record] = ()) -> go.Figure:
    """Time of one training step against sequence length, one device.

    Args:
        points: the paper's, of one device; seconds.
        measured: this project's records of ``train_step`` on the same kind of device.

    Raises:
        ValueError: points of several devices, or a record of another operator or device.
    """
    _check(points, measured)
    ours = [(record, record.ms / 1e3) for record in measured]
    return _against_length(
        points,
        ours,
        title=f"Time of one training step, {points[0].device}",
        unit="seconds per step",
        hover="%{y:.2f} s",
    )


def peak_memory(points: Sequence[Point], measured: Sequence[Record] = ()) -> go.Figure:
    """Peak memory of one training step against length. Arguments as for :func:`step_time`."""
    _check(points, measured)
    ours = [(record, record.peak_mb / 1e3) for record in measured]
    return _against_length(
        points,
        ours,
        title=f"Peak memory of one training step, {points[0].device}",
        unit="gigabytes",
        hover="%{y:.1f} GB",
    )


def speed_up(points: Sequence[Point], over: str = "eager") -> go.Figure:
    """How many times faster than ``over`` each implementation is, by length, one device."""
    _check(points, ())
    base = {p.tokens: p.value for p in points if p.implementation == over}
    lengths = [n for n, value in base.items() if value is not OOM]
    if not lengths:
        raise ValueError(f"no finite value of {over!r} to compare with")
    figure = go.Figure()
    for name in _implementations(points):
        if name == over:
            continue
        look = theme.look(_published(name))
        here = {p.tokens: p.value for p in points if p.implementation == name}
        shown = [(n, base[n] / here[n]) for n in lengths if here.get(n, OOM) is not OOM]
        figure.add_bar(
            x=[str(n) for n, _ in shown],
            y=[ratio for _, ratio in shown],
            name=look.label,
            marker_color=look.color,
            text=[f"{ratio:.2f}" for _, ratio in shown],
            textposition="outside",
            hovertemplate=f"{look.label}, %{{x}} tokens: %{{y:.2f}} times<extra></extra>",
        )
    figure.add_hline(y=1, line={"color": theme.MUTED, "width": 1, "dash": "dot"})
    figure.update_layout(
        title=f"Speed-up over {theme.look(over).label}, {points[0].device}",
        xaxis={"title": {"text": "sequence length (tokens)"}, "type": "category"},
        yaxis={"title": {"text": f"{theme.look(over).label} time / time"}, "rangemode": "tozero"},
    )
    failed = [str(n) for n, value in base.items() if value is OOM]
    note = f"Ratios of {reference.SOURCE}."
    if failed:
        note += f"<br>At {' and '.join(failed)} tokens {theme.look(over).label} runs out of memory."
    return theme.caption(figure, note)


def longest_sequence(rows: Sequence[Longest]) -> go.Figure:
    """Longest sequence that trains, by number of GPUs."""
    if not rows:
        raise ValueError("no rows to draw")
    figure = go.Figure()
    for name in dict.fromkeys(row.implementation for row in rows):
        look = theme.look(_published(name))
        here = [row for row in rows if row.implementation == name]
        figure.add_bar(
            x=[str(row.gpus) for row in here],
            y=[row.tokens for row in here],
            name=look.label,
            marker_color=look.color,
            text=[row.tokens for row in here],
            textposition="outside",
            hovertemplate=f"{look.label}, %{{x}} GPUs: %{{y}} tokens<extra></extra>",
        )
    figure.update_layout(
        title="Longest sequence that trains, pair tensor sharded over GPUs",
        xaxis={"title": {"text": f"number of GPUs ({rows[0].device})"}, "type": "category"},
        yaxis_title_text="tokens",
    )
    text = f"Second version of the paper; {reference.SOURCE}.<br>{NOT_MEASURED}"
    return theme.caption(figure, text)


def operator_calls(rows: Sequence[Calls]) -> go.Figure:
    """Operator calls in one training step, by kind of operator and model; logarithmic."""
    if not rows:
        raise ValueError("no rows to draw")
    figure = go.Figure()
    colors = (theme.PALETTE[0], theme.PALETTE[7])
    signs = {"about": "≈", "below": "<"}
    for model, color in zip(dict.fromkeys(row.model for row in rows), colors, strict=True):
        here = [row for row in rows if row.model == model]
        figure.add_bar(
            x=[row.operator for row in here],
            y=[row.calls for row in here],
            name=model,
            marker={
                "color": color,
                # An upper bound is hatched: the bar could be shorter.
                "pattern": {"shape": ["/" if r.relation == "below" else "" for r in here]},
            },
            text=[f"{signs[row.relation]} {row.calls:,}" for row in here],
            textposition="outside",
            hovertemplate="%{x}: %{text}<extra>" + model + "</extra>",
        )
    figure.update_layout(
        title="Operator calls in one training step",
        yaxis={"title": {"text": "calls"}, "type": "log", "range": [0, 5.1], "dtick": 1},
    )
    return theme.caption(figure, f"Hatched: an upper bound. {_capital(reference.SOURCE)}.")


def evo_attention_memory(points: Sequence[tuple[int, float]]) -> go.Figure:
    """Activation memory of unfused EvoAttention, between quadratic and cubic growth."""
    (first, start), *_ = points
    last = max(tokens for tokens, _ in points)
    figure = go.Figure()
    for growth, power, dash in (("cubic growth", 3, "dash"), ("quadratic growth", 2, "dot")):
        end = start * (last / first) ** power
        figure.add_scatter(
            x=[first, last],
            y=[start, end],
            mode="lines",
            name=growth,
            line={"color": theme.MUTED, "width": 1.5, "dash": dash},
            hoverinfo="skip",
        )
    look = theme.look("eager")
    figure.add_scatter(
        x=[tokens for tokens, _ in points],
        y=[gigabytes for _, gigabytes in points],
        mode="markers+text",
        name=look.label,
        marker={"color": theme.PALETTE[1], "size": 11},
        text=[f"{gigabytes:g} GB" for _, gigabytes in points],
        textposition="bottom right",
        hovertemplate="%{x} tokens: %{y:.2f} GB<extra></extra>",
    )
    ticks = [1, 2, 5, 10, 20, 50]
    figure.update_layout(
        title="Activation memory of EvoAttention, not fused",
        xaxis={
            "title": {"text": "sequence length (tokens)"},
            "type": "log",
            "tickvals": [tokens for tokens, _ in points],
            "range": _log_range(first * 0.85, last * 1.3),
        },
        yaxis={
            "title": {"text": "gigabytes"},
            "type": "log",
            "tickvals": ticks,
            "range": _log_range(2, 50),
        },
    )
    return theme.caption(figure, f"{_capital(reference.SOURCE)}.")


def _against_length(
    points: Sequence[Point],
    ours: Sequence[tuple[Record, float]],
    *,
    title: str,
    unit: str,
    hover: str,
) -> go.Figure:
    lines = [*_published_lines(points), *_measured_lines(ours)]
    top = max(value for line in lines for _, value in line.points)
    any_failed = any(line.failed for line in lines)
    band = (1.08 * top, 1.24 * top)
    figure = go.Figure()
    spread = 0.012 * (max(p.tokens for p in points) - min(p.tokens for p in points))
    for number, line in enumerate(lines):
        _draw(figure, line, hover, faint=bool(ours) and not line.measured)
        shift = (number - (len(lines) - 1) / 2) * spread
        _draw_failed(figure, line, sum(band) / 2, shift)
    if any_failed:
        figure.add_hrect(y0=band[0], y1=band[1], fillcolor="#F3F4F6", line_width=0, layer="below")
        figure.add_annotation(
            text="out of memory",
            xref="paper",
            x=0.01,
            y=sum(band) / 2,
            xanchor="left",
            showarrow=False,
            font={"size": 12, "color": theme.MUTED},
        )
    figure.update_layout(
        title=title,
        xaxis={
            "title": {"text": "sequence length (tokens)"},
            "tickvals": sorted({n for line in lines for n, _ in line.points} | _failures(lines)),
        },
        yaxis={"title": {"text": unit}, "range": [0, band[1] if any_failed else 1.06 * top]},
    )
    if ours:
        figure.update_layout(margin_t=108)  # the legend has a second row
    return theme.caption(figure, f"Paper: {SETTING}<br>{_sources(ours)}")


def _published_lines(points: Sequence[Point]) -> list[_Line]:
    lines = []
    for name in _implementations(points):
        here = [p for p in points if p.implementation == name]
        finite = tuple((p.tokens, p.value) for p in here if p.value is not OOM)
        failed = tuple(p.tokens for p in here if p.value is OOM)
        lines.append(_Line(theme.look(_published(name)), finite, failed, measured=False))
    return lines


def _measured_lines(ours: Sequence[tuple[Record, float]]) -> list[_Line]:
    lines = []
    several = len({record.dtype for record, _ in ours}) > 1
    for name, dtype in dict.fromkeys((record.impl, record.dtype) for record, _ in ours):
        look = theme.look(name)
        label = f"{look.label} (this project{f', {dtype}' if several else ''})"
        here = sorted(
            (length(r.shape), value) for r, value in ours if (r.impl, r.dtype) == (name, dtype)
        )
        look = theme.Look(label, look.color, look.symbol)
        lines.append(_Line(look, tuple(here), (), measured=True))
    return lines


def _draw(figure: go.Figure, line: _Line, hover: str, *, faint: bool) -> None:
    symbol = f"{line.look.symbol}-open" if faint else line.look.symbol
    figure.add_scatter(
        x=[tokens for tokens, _ in line.points],
        y=[value for _, value in line.points],
        name=line.look.label,
        legendgroup=line.look.label,
        mode="lines+markers",
        line={
            "color": line.look.color,
            "width": 1.5 if faint else 2.5,
            "dash": "dot" if faint else "solid",
        },
        marker={"symbol": symbol, "size": 9},
        hovertemplate=f"{line.look.label}, %{{x}} tokens: {hover}<extra></extra>",
    )


def _draw_failed(figure: go.Figure, line: _Line, height: float, shift: float) -> None:
    """Crosses in the band above the plot, and a thin lead from the last value to the first."""
    if not line.failed:
        return
    figure.add_scatter(
        x=[tokens + shift for tokens in line.failed],
        y=[height] * len(line.failed),
        customdata=line.failed,
        mode="markers",
        marker={"symbol": "x", "size": 10, "color": line.look.color},
        legendgroup=line.look.label,
        showlegend=False,
        hovertemplate=(f"{line.look.label}, %{{customdata}} tokens: out of memory<extra></extra>"),
    )
    tokens, value = line.points[-1]
    figure.add_scatter(
        x=[tokens, line.failed[0] + shift],
        y=[value, height],
        mode="lines",
        line={"color": line.look.color, "width": 1, "dash": "dot"},
        legendgroup=line.look.label,
        showlegend=False,
        hoverinfo="skip",
    )


def length(shape: str) -> int:
    """The number of tokens in a record's shape key: 384 in ``"N384"`` or ``"B1 N384"``."""
    match = re.search(r"(?:^| )N(\d+)(?: |$)", shape)
    if match is None:
        raise ValueError(f"no length N... in the shape {shape!r}")
    return int(match[1])


def _sources(ours: Sequence[tuple[Record, float]]) -> str:
    text = f"{_capital(reference.SOURCE)}."
    if not ours:
        return f"{text} {NOT_MEASURED}"
    runs = sorted({(record.device, record.date[:10]) for record, _ in ours})
    said = "; ".join(f"{device}, {date}" for device, date in runs)
    return f"{text} This project: {said}."


def _published(name: str) -> str:
    """The look of a published implementation: the authors' MegaFold is not this project."""
    return "paper" if name == "megafold" else name


def _implementations(points: Sequence[Point]) -> list[str]:
    return list(dict.fromkeys(p.implementation for p in points))


def _failures(lines: Sequence[_Line]) -> set[int]:
    return {tokens for line in lines for tokens in line.failed}


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]


def _log_range(low: float, high: float) -> list[float]:
    return [math.log10(low), math.log10(high)]


def _check(points: Sequence[Point], measured: Sequence[Record]) -> None:
    devices = sorted({p.device for p in points})
    if len(devices) != 1:
        raise ValueError(f"points of one device are drawn together, not of {devices or 'none'}")
    for record in measured:
        if record.op != "train_step":
            raise ValueError(f"a record of {record.op!r} does not belong here, but train_step")
        if not reference.same_device(record.device, devices[0]):
            raise ValueError(f"a record of {record.device!r} beside the paper's {devices[0]!r}")

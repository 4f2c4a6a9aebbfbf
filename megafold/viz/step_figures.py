"""What a training step costs, against the number of tokens."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

import plotly.graph_objects as go
from plotly.subplots import make_subplots

from megafold.viz import theme

if TYPE_CHECKING:
    from megafold.bench.records import Record


def step_costs(records: Sequence[Record]) -> go.Figure:
    """Time (median and quartiles) and peak memory of training steps, side by side.

    Args:
        records: rows of ``op`` ``train_step``; one line for each configuration and
            implementation.

    Raises:
        ValueError: there is no row, or one of another operator.
    """
    wrong = {record.op for record in records} - {"train_step"}
    if not records or wrong:
        raise ValueError(f"step_costs draws records of train_step, got {sorted(wrong) or 'none'}")
    several = len({record.impl for record in records}) > 1
    lines: dict[str, list[tuple[int, Record]]] = {}
    for record in records:
        name, tokens = re.fullmatch(r"(.*) N(\d+)", record.shape).groups()
        if several:
            name = f"{name}, {record.impl}"
        lines.setdefault(name, []).append((int(tokens), record))
    titles = ("time of a step", "peak memory of a step")
    figure = make_subplots(1, 2, subplot_titles=titles, horizontal_spacing=0.12)
    for number, (name, rows) in enumerate(lines.items()):
        rows.sort(key=lambda row: row[0])
        tokens = [n for n, _ in rows]
        style = {
            "name": name,
            "legendgroup": name,
            "mode": "lines+markers",
            "line_color": theme.PALETTE[number % len(theme.PALETTE)],
        }
        spread = {
            "type": "data",
            "symmetric": False,
            "array": [(r.ms_q3 - r.ms) / 1e3 for _, r in rows],
            "arrayminus": [(r.ms - r.ms_q1) / 1e3 for _, r in rows],
        }
        seconds = [r.ms / 1e3 for _, r in rows]
        figure.add_scatter(x=tokens, y=seconds, error_y=spread, **style, row=1, col=1)
        peaks = [r.peak_mb / 1e3 for _, r in rows]
        figure.add_scatter(x=tokens, y=peaks, **style, showlegend=False, row=1, col=2)
    figure.update_xaxes(title_text="tokens", rangemode="tozero")
    figure.update_yaxes(title_text="seconds", rangemode="tozero", row=1, col=1)
    figure.update_yaxes(title_text="GB", rangemode="tozero", row=1, col=2)
    figure.update_layout(
        title="One training step against length",
        width=900,
        height=470,
        margin_t=120,
        legend={"y": 1.12, "yanchor": "bottom"},
    )
    devices = sorted({f"{r.device}, {r.date[:10]}" for r in records})
    return theme.caption(figure, "Measured on " + "; ".join(devices) + ".")

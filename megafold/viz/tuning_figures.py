"""What the kernel tuner shows: registers and times of configurations, as a figure and a table."""

from __future__ import annotations

import html
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import plotly.graph_objects as go
from plotly.subplots import make_subplots

from megafold.bench.compile import Compiled
from megafold.bench.occupancy import LIMITS, Occupancy
from megafold.bench.tuning_records import TuningRecord
from megafold.ops.tuning import Config
from megafold.viz import theme
from megafold.viz.operator_figures import log_y

TRIED, FAILED = theme.PALETTE[0], theme.PALETTE[1]
RECORDED = (theme.PALETTE[7], theme.PALETTE[5], theme.PALETTE[4], theme.PALETTE[3])


@dataclass(frozen=True)
class TunerTrial:
    """One configuration of one kernel: what the compiler made of it, and how long it took."""

    kernel: str
    config: Config
    target: str  # the chip it was compiled for: "sm_90"
    compiled: Compiled | None  # None where it does not compile
    occupancy: Occupancy | None
    ms: float | None  # median on the GPU at hand; None without one, or where it failed
    note: str  # what is wrong with it; empty where nothing is

    @property
    def failed(self) -> bool:
        """Whether it does not compile, does not fit, spills registers, or was wrong."""
        return bool(self.note)


def tile(blocks: Mapping[str, int]) -> str:
    """Block sizes as a label: ``"1 x 64 x 32"``."""
    return " x ".join(str(size) for size in blocks.values())


def trials_figure(
    trials: Sequence[TunerTrial],
    records: Sequence[TuningRecord],
    *,
    title: str,
    device: str,
    bounds: Mapping[str, float],
) -> go.Figure:
    """Times (where there are any) and registers of one kernel's configurations, by block sizes.

    Failed trials are hollow and red; recorded measurements lie behind those made here.

    Args:
        trials: of one kernel; those with a time were measured on ``device``.
        records: of the same kernel, of any devices; those without a time are left out.
        bounds: device -> the time below which the kernel cannot run there, ms.

    Raises:
        ValueError: there is nothing to draw.
    """
    timed = [t for t in trials if t.ms is not None]
    recorded = [r for r in records if r.ms is not None]
    compiled = [t for t in trials if t.compiled is not None]
    panels = ["ms"] * bool(timed or recorded) + ["registers"] * bool(compiled)
    if not panels:
        raise ValueError("neither a trial nor a record to draw")
    figure = make_subplots(rows=len(panels), shared_xaxes=True, vertical_spacing=0.07)
    if "ms" in panels:
        for number, name in enumerate(dict.fromkeys(r.device for r in recorded)):
            of_device = [r for r in recorded if r.device == name]
            _points(
                figure, 1, f"recorded on {name}", RECORDED[number % len(RECORDED)],
                [r.config for r in of_device], [r.ms for r in of_device], "%{y:.4g} ms", size=7,
            )  # fmt: skip
        tried = {str(t.config) for t in trials}
        again = [r for r in recorded if str(r.config) in tried]
        _points(
            figure, 1, "recorded, and tried here", TRIED,
            [r.config for r in again], [r.ms for r in again], "%{y:.4g} ms", size=13, hollow=True,
        )  # fmt: skip
        _points(
            figure, 1, f"measured on {device}", TRIED,
            [t.config for t in timed], [t.ms for t in timed], "%{y:.4g} ms",
        )  # fmt: skip
        log_y(figure, "ms", [*(x.ms for x in (*recorded, *timed)), *bounds.values()], row=1, col=1)
        for name, ms in bounds.items():
            _line(figure, 1, ms, f"roofline of {name}: {ms:.3g} ms", log=True)
    if "registers" in panels:
        row = len(panels)
        for failed, name in ((False, "compiled"), (True, "failed")):
            found = [t for t in compiled if t.failed == failed]
            _points(
                figure, row, name, FAILED if failed else TRIED,
                [t.config for t in found], [t.compiled.registers for t in found],
                "%{y} registers", hollow=failed, legend=failed or "ms" not in panels,
            )  # fmt: skip
        limit = max(LIMITS[t.target].registers_per_thread for t in compiled)
        _line(figure, row, limit, f"{limit}: all that a thread can have")
        figure.update_yaxes(title="registers per thread", rangemode="tozero", row=row, col=1)
    configs = [t.config for t in trials] + [r.config for r in recorded]
    order = sorted({tuple(c.blocks.values()) for c in configs})
    labels = [tile(dict(enumerate(sizes))) for sizes in order]
    figure.update_xaxes(type="category", categoryorder="array", categoryarray=labels)
    names = " x ".join(name.lower() for name in configs[0].blocks)
    figure.update_xaxes(title=names, row=len(panels), col=1)
    figure.update_layout(title=title, height=300 + 170 * len(panels))
    if sum(trace.showlegend for trace in figure.data) > 3:
        figure.update_layout(margin_t=116)  # a legend of two lines
    return figure


def _line(figure: go.Figure, row: int, y: float, text: str, *, log: bool = False) -> None:
    dashed = {"dash": "dash", "color": theme.MUTED, "width": 1.2}
    figure.add_hline(y, line=dashed, row=row, col=1)
    figure.add_annotation(
        x=1,
        xref="x domain",
        y=math.log10(y) if log else y,  # where annotations stand on a logarithmic axis
        yref="y" if row == 1 else f"y{row}",
        text=text,
        showarrow=False,
        xanchor="right",
        yanchor="bottom",
        font={"size": 12, "color": theme.MUTED},
    )


def _points(
    figure: go.Figure,
    row: int,
    name: str,
    color: str,
    configs: Sequence[Config],
    values: Sequence[float],
    shown: str,
    *,
    size: int = 11,
    hollow: bool = False,
    legend: bool = True,
) -> None:
    if not configs:
        return
    figure.add_scatter(
        x=[tile(c.blocks) for c in configs],
        y=list(values),
        name=name,
        mode="markers",
        marker={
            "color": color,
            "size": size,
            "symbol": "circle-open" if hollow else "circle",
            "line": {"width": 2.5 if hollow else 0},
        },
        text=[str(c) for c in configs],
        hovertemplate="%{text}<br>" + shown + f"<extra>{name}</extra>",
        showlegend=legend,
        row=row,
        col=1,
    )


def trials_table(trials: Sequence[TunerTrial], recorded: Mapping[str, str]) -> str:
    """The trials as an HTML table, the newest first; failed ones in red with what is wrong.

    Args:
        recorded: what to write as the time of a configuration, by its ``str``, where it was not
            measured here; empty where there are no recorded times.
    """
    titles = ("configuration", "chip", "registers", "spilt, B", "shared, B",
              "programs per multiprocessor", "ms", "")  # fmt: skip
    head = "".join(f"<th style='text-align:left'>{title}</th>" for title in titles)
    lines = "".join(_row(trial, recorded) for trial in reversed(trials))
    return f"<table><thead><tr>{head}</tr></thead><tbody>{lines}</tbody></table>"


def _row(trial: TunerTrial, recorded: Mapping[str, str]) -> str:
    numbers, programs = ("", "", ""), ""
    if trial.compiled is not None:
        made = trial.compiled
        numbers = (f"{made.registers}", f"{made.spill_bytes:,}", f"{made.shared_bytes:,}")
    if trial.occupancy is not None:
        filled = trial.occupancy
        programs = f"{filled.programs}, bound by {filled.limited_by}; {filled.share:.0%} of threads"
    ms = "" if trial.ms is None else f"{trial.ms:.4g}"
    if trial.ms is None and recorded:
        ms = recorded.get(str(trial.config), "not recorded")
    cells = (str(trial.config), trial.target, *numbers, programs, ms, trial.note)
    color = f" style='color:{FAILED}'" if trial.failed else ""
    texts = "".join(f"<td style='text-align:left'>{html.escape(cell)}</td>" for cell in cells)
    return f"<tr{color}>{texts}</tr>"

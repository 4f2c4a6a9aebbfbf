"""One look for every figure: palette, template, captions.

Colours are Okabe and Ito's, which stay apart for colour-blind readers and in print. An
implementation has the same colour, name and marker in every figure of the project.
"""

from __future__ import annotations

from dataclasses import dataclass

import plotly.graph_objects as go
import plotly.io as pio

PALETTE = (
    "#0072B2",  # blue
    "#D55E00",  # vermilion
    "#009E73",  # green
    "#E69F00",  # orange
    "#CC79A7",  # pink
    "#56B4E9",  # sky
    "#7A5195",  # violet
    "#6B7280",  # grey
)
INK, MUTED, GRID, PAPER = "#1F2933", "#5B6770", "#E4E7EB", "#FFFFFF"
FONT = "Inter, Helvetica Neue, Helvetica, Arial, sans-serif"
SEQUENTIAL = "Cividis"  # perceptually uniform, colour-blind safe
DIVERGING = "RdBu"

WIDTH, HEIGHT = 760, 440


@dataclass(frozen=True)
class Look:
    """How one implementation is drawn."""

    label: str
    color: str
    symbol: str


IMPLEMENTATIONS = {
    "megafold": Look("MegaFold", PALETTE[0], "circle"),
    "eager": Look("PyTorch eager", PALETTE[7], "square"),
    "compile": Look("torch.compile", PALETTE[3], "diamond"),
    "sdpa": Look("PyTorch SDPA", PALETTE[4], "triangle-up"),
    "flex": Look("FlexAttention", PALETTE[2], "triangle-down"),
    "cuequivariance": Look("cuEquivariance", PALETTE[6], "pentagon"),
    "trifast": Look("trifast", PALETTE[5], "hexagon"),
    "paper": Look("MegaFold (paper)", "#12355B", "star"),
    "deepspeed": Look("DeepSpeed EvoformerAttention", PALETTE[1], "cross"),
}


def look(implementation: str) -> Look:
    """Label, colour and marker of an implementation.

    Raises:
        KeyError: for a name that no figure knows, listing those known.
    """
    if implementation not in IMPLEMENTATIONS:
        known = ", ".join(IMPLEMENTATIONS)
        raise KeyError(f"no look for implementation {implementation!r}; known: {known}")
    return IMPLEMENTATIONS[implementation]


def install() -> None:
    """Register the template ``megafold`` and make it Plotly's default."""
    pio.templates["megafold"] = _template()
    pio.templates.default = "megafold"


def caption(figure: go.Figure, text: str, *, tick_lines: int = 1) -> go.Figure:
    """Write ``text`` below the plot: where the numbers come from (device, date, source).

    Returns the same figure. The bottom margin grows by what the lines need.

    Args:
        tick_lines: of the labels of the horizontal axis.
    """
    lines = text.count("<br>") + tick_lines
    below = 58 + 16 * lines
    figure.add_annotation(
        text=text,
        name="caption",
        xref="paper",
        yref="paper",
        x=0,
        y=0,
        yshift=-below + 4,
        xanchor="left",
        yanchor="bottom",
        align="left",
        showarrow=False,
        font={"size": 12, "color": MUTED},
    )
    return figure.update_layout(margin_b=below)


def _template() -> go.layout.Template:
    axis = {
        "gridcolor": GRID,
        "linecolor": MUTED,
        "ticks": "outside",
        "tickcolor": MUTED,
        "ticklen": 4,
        "zeroline": False,
        "showline": True,
        "title": {"standoff": 10, "font": {"size": 13}},
        "automargin": True,
    }
    layout = go.Layout(
        width=WIDTH,
        height=HEIGHT,
        colorway=PALETTE,
        font={"family": FONT, "size": 13, "color": INK},
        title={"x": 0.01, "xanchor": "left", "y": 0.965, "yanchor": "top", "font": {"size": 17}},
        paper_bgcolor=PAPER,
        plot_bgcolor=PAPER,
        margin={"l": 64, "r": 28, "t": 84, "b": 58},
        xaxis=axis,
        yaxis=axis,
        legend={"orientation": "h", "x": 0, "y": 1.02, "xanchor": "left", "yanchor": "bottom"},
        hoverlabel={"font": {"family": FONT, "size": 12}},
        colorscale={"sequential": SEQUENTIAL, "diverging": DIVERGING},
        bargap=0.25,
        bargroupgap=0.06,
    )
    template = go.layout.Template(layout=layout)
    template.data.scatter = [go.Scatter(line={"width": 2.5}, marker={"size": 8})]
    template.data.bar = [go.Bar(marker={"line": {"width": 0}})]
    template.data.heatmap = [go.Heatmap(colorscale=SEQUENTIAL, colorbar={"thickness": 14})]
    return template

"""What the data pipeline makes: tokens, distances, alignments, crops, loading times."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from megafold.viz import theme

if TYPE_CHECKING:
    from megafold.data.alignment import Alignment
    from megafold.data.features import Features
    from megafold.data.loading import LoadingCost

_GAP = 31  # class of a gap in an alignment
_ABSENT = "#F3F4F6"  # neither this nor that
_MAX_ROWS = 150  # of an alignment that are drawn
_TRUE = "yes"


def token_tracks(features: Features, *, title: str = "Tokens") -> go.Figure:
    """The tokens in order: which chain each is of, and three things that are true or not.

    Args:
        features: Any; N tokens along the x axis.
        title: Of the figure.
    """
    marks = {
        "one atom": features.is_atom,
        "centre unresolved": ~features.resolved[features.center_atom],
        "near another chain": features.is_interface,
    }
    tracks = {"chain": _chain_labels(features)}
    tracks |= {name: np.where(mask, _TRUE, "") for name, mask in marks.items()}
    return _strips(tracks, title=title)


def crop_tracks(features: Features, crops: Mapping[str, np.ndarray], *, title: str) -> go.Figure:
    """Which tokens each crop takes, coloured by chain.

    Args:
        features: Of the whole structure, N tokens.
        crops: Rows of tokens by name of the crop.
        title: Of the figure.
    """
    chains = _chain_labels(features)
    tracks = {"all": chains}
    for name, rows in crops.items():
        taken = np.zeros(features.num_tokens, dtype=bool)
        taken[rows] = True
        tracks[name] = np.where(taken, chains, "")
    return _strips(tracks, title=title)


def _chain_labels(features: Features) -> np.ndarray:
    """``A: protein``, ``B: DNA``, ``C: ATP`` for each token. [N] str."""
    layout, rows = features.layout, features.center_atom
    kinds = {"protein": "protein", "dna": "DNA", "rna": "RNA"}
    chains = layout.chain_id[rows].tolist()
    types, names = layout.chain_type[rows].tolist(), layout.residue_name[rows].tolist()
    first: dict[str, str] = {}
    for chain, kind, name in zip(chains, types, names, strict=True):
        first.setdefault(chain, f"{chain}: {kinds.get(kind, name)}")
    return np.array([first[chain] for chain in chains])


def _strips(tracks: Mapping[str, np.ndarray], *, title: str) -> go.Figure:
    """Categories along the tokens, one strip each; an empty category is left pale."""
    categories = list(dict.fromkeys(c for values in tracks.values() for c in values.tolist() if c))
    index = {category: i for i, category in enumerate(categories, start=1)}
    palette = [theme.INK if c == _TRUE else theme.PALETTE[i % len(theme.PALETTE)]
               for i, c in enumerate(categories)]  # fmt: skip
    colors = [_ABSENT, *palette]
    z = np.array([[index.get(c, 0) for c in v.tolist()] for v in tracks.values()], dtype=np.uint8)
    top = len(colors)
    scale = [(edge / top, colors[min(i, top - 1)]) for i in range(top) for edge in (i, i + 1)]
    figure = go.Figure(
        go.Heatmap(
            z=z,
            y=list(tracks),
            text=np.stack(list(tracks.values())),
            hovertemplate="token %{x}: %{text}<extra>%{y}</extra>",
            colorscale=scale,
            zmin=0,
            zmax=top,
            showscale=False,
            ygap=6,
        )
    )
    for category, i in index.items():
        if category == _TRUE:
            continue  # its name stands beside the strip
        marker = {"symbol": "square", "color": colors[i], "size": 10}
        figure.add_scatter(x=[None], y=[None], mode="markers", marker=marker, name=category)
    return figure.update_layout(
        title=title,
        xaxis_title_text="token",
        yaxis={"autorange": "reversed", "showline": False, "ticks": ""},
        height=190 + 34 * len(tracks),
        legend={"y": 1.0},
    )


def pair_distances(features: Features, *, title: str = "Distances between tokens") -> go.Figure:
    """Distance between the representative atoms of every two tokens, white where unresolved.

    Args:
        features: N tokens; at most a few hundred read well.
        title: Of the figure.
    """
    rows = features.representative_atom
    positions = np.where(features.resolved[rows, None], features.positions[rows], np.nan)
    distance = np.linalg.norm(positions[:, None] - positions[None], axis=-1)
    figure = go.Figure(
        go.Heatmap(
            z=np.round(distance, 1).astype(np.float32),
            colorscale=theme.SEQUENTIAL,
            reversescale=True,
            colorbar={"title": {"text": "Å"}, "thickness": 14},
            hovertemplate="tokens %{x} and %{y}: %{z:.1f} Å<extra></extra>",
        )
    )
    for edge in np.flatnonzero(np.diff(features.asym_id)) + 0.5:
        for add in (figure.add_vline, figure.add_hline):
            add(edge, line={"color": theme.INK, "width": 1})
    return figure.update_layout(
        title=title,
        xaxis={"title": {"text": "token"}, "constrain": "domain", "showgrid": False},
        yaxis={"title": {"text": "token"}, "autorange": "reversed", "scaleanchor": "x",
               "constrain": "domain", "showgrid": False},
        width=600,
        height=500,
        margin_t=56,
    )  # fmt: skip


def alignment_coverage(alignment: Alignment, *, title: str = "Alignment") -> go.Figure:
    """Every row of an alignment, the most similar to the query on top, and how deep it is.

    A row is coloured by the share of the query's residues that it has where it is aligned;
    where it has a gap it is white. Of a deep alignment evenly spaced rows are drawn.
    """
    msa, present = alignment.msa, alignment.msa != _GAP
    same = ((msa == msa[0]) & present).sum(axis=1) / np.maximum(present.sum(axis=1), 1)
    order = np.argsort(-same, kind="stable")
    drawn = order[np.unique(np.linspace(0, len(order) - 1, _MAX_ROWS).round().astype(int))]
    z = np.where(present[drawn], same[drawn, None], np.nan).astype(np.float32)
    figure = make_subplots(
        rows=2, cols=1, shared_xaxes=True, row_heights=[0.28, 0.72], vertical_spacing=0.05
    )
    figure.add_scatter(
        x=np.arange(1, msa.shape[1] + 1, dtype=np.int32),
        y=present.sum(axis=0).astype(np.int32),
        mode="lines",
        fill="tozeroy",
        line={"color": theme.PALETTE[0], "width": 1.5},
        hovertemplate="residue %{x}: %{y} rows<extra></extra>",
        showlegend=False,
    )
    figure.add_trace(
        go.Heatmap(
            z=np.round(z, 2),
            x=np.arange(1, msa.shape[1] + 1, dtype=np.int32),
            zmin=0,
            zmax=1,
            colorscale=theme.SEQUENTIAL,
            colorbar={"title": {"text": "identity"}, "thickness": 14, "len": 0.72, "y": 0.36},
            hovertemplate="residue %{x}: identity %{z:.2f}<extra></extra>",
        ),
        row=2,
        col=1,
    )
    figure.update_yaxes(title_text="rows", rangemode="tozero", row=1, col=1)
    figure.update_yaxes(
        title_text="by identity", autorange="reversed", showticklabels=False, ticks="",
        showgrid=False, row=2, col=1,
    )  # fmt: skip
    figure.update_xaxes(showgrid=False)
    figure.update_xaxes(title_text="residue of the query", row=2, col=1)
    figure.update_layout(title=title, height=480, margin_t=56)
    every = "" if len(drawn) == len(msa) else f", {len(drawn)} of them drawn"
    return theme.caption(figure, f"{len(msa)} rows of {msa.shape[1]} columns{every}.")


def loading_times(costs: Sequence[LoadingCost], *, source: str = "") -> go.Figure:
    """Time to a crop, fresh and from the cache, on a logarithmic axis.

    Args:
        costs: One for each structure, as ``megafold.data.loading.loading_cost`` measures.
        source: A line for the caption, such as device and date.

    Raises:
        ValueError: There is nothing to draw.
    """
    if not costs:
        raise ValueError("there is no measurement to draw")
    names = [
        f"{c.name}: {c.tokens:,} tokens, {c.alignment_rows:,} row{'s' * (c.alignment_rows > 1)}"
        for c in costs
    ]
    figure = go.Figure()
    for name, cost in zip(names, costs, strict=True):
        figure.add_scatter(
            x=[cost.cached_ms, cost.fresh_ms],
            y=[name, name],
            mode="lines",
            line={"color": theme.GRID, "width": 6},
            showlegend=False,
            hoverinfo="skip",
        )
    for label, attribute, side, color in (
        ("from the cache", "cached_ms", "left", theme.PALETTE[0]),
        ("made afresh", "fresh_ms", "right", theme.PALETTE[7]),
    ):
        values = [getattr(cost, attribute) for cost in costs]
        figure.add_scatter(
            x=values,
            y=names,
            mode="markers+text",
            name=label,
            marker={"color": color, "size": 11},
            text=[f"{value:.2g}" if value < 100 else f"{value:.0f}" for value in values],
            textposition=f"middle {side}",
            hovertemplate="%{y}: %{x:.3g} ms<extra>%{fullData.name}</extra>",
        )
    smallest, largest = min(c.cached_ms for c in costs), max(c.fresh_ms for c in costs)
    figure.update_layout(
        title="Time to the features of a crop",
        xaxis={
            "title": {"text": "milliseconds"},
            "type": "log",
            "range": [np.log10(smallest) - 0.5, np.log10(largest) + 0.5],
            "dtick": 1,
        },
        yaxis={"autorange": "reversed", "showline": False, "ticks": "", "showgrid": False},
        height=200 + 44 * len(costs),
    )
    return theme.caption(figure, source) if source else figure

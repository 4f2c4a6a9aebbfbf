"""Figures of how sure a model says it is."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
import plotly.graph_objects as go

WIDEST = 31.75  # angstrom, the centre of the last bin of the error


def aligned_error(
    pae: np.ndarray, chain_ids: Sequence[str], *, title: str = "Predicted aligned error"
) -> go.Figure:
    """PAE as a heat map, with lines between chains.

    Args:
        pae: `[N, N]` float, angstrom; row: the token whose frame is superposed, column: the token
            whose error it is. NaN is left blank.
        chain_ids: chain of each token, `[N]`.
        title: Of the figure.

    Raises:
        ValueError: the shapes do not agree.
    """
    pae = np.asarray(pae, dtype=np.float32)
    n = len(chain_ids)
    if pae.shape != (n, n):
        raise ValueError(f"pae is {pae.shape}, but there are {n} tokens with a chain")
    figure = go.Figure(
        go.Heatmap(
            z=pae.round(2),
            x0=1,
            y0=1,
            zmin=0,
            zmax=WIDEST,
            colorscale="Greens_r",
            colorbar={"title": {"text": "Å"}, "thickness": 14},
            hovertemplate="frame of %{y}, error of %{x}: %{z:.1f} Å<extra></extra>",
        )
    )
    borders = [i + 1.5 for i, (a, b) in enumerate(itertools.pairwise(chain_ids)) if a != b]
    for border in borders:
        figure.add_hline(border, line={"color": "black", "width": 1})
        figure.add_vline(border, line={"color": "black", "width": 1})
    figure.update_xaxes(title_text="token", constrain="domain", showgrid=False)
    figure.update_yaxes(
        title_text="token whose frame is superposed",
        scaleanchor="x",
        autorange="reversed",
        constrain="domain",
        showgrid=False,
    )
    figure.update_layout(title=title, width=560, height=520)
    return figure

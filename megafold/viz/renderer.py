"""How Plotly figures are displayed in a notebook."""

from __future__ import annotations

import base64
from typing import Any

from plotly.io.base_renderers import MimetypeRenderer, PlotlyRenderer

from megafold.viz import browser

# No button that sends a figure to a server.
CONFIG = {"displaylogo": False, "showSendToCloud": False, "responsive": False}


class NotebookRenderer(MimetypeRenderer):
    """Plotly's interactive figure and, where a browser is found, a PNG of it.

    JupyterLab shows the PNG first and draws the figure when the pointer comes. Untrusted
    viewers, which cannot draw it, show the PNG. Plotly's own ``plotly_mimetype+png`` does the
    same but starts a browser per figure.
    """

    def to_mimebundle(self, fig_dict: dict[str, Any]) -> dict[str, Any]:
        # One pixel per pixel: JupyterLab shows the PNG as large as it is, until the pointer comes.
        picture = browser.figure_image(fig_dict, scale=1) if browser.find_browser() else None
        bundle = PlotlyRenderer(config=CONFIG).to_mimebundle(fig_dict)
        if picture is not None:
            bundle["image/png"] = base64.b64encode(picture).decode("ascii")
        return bundle

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

    JupyterLab draws the first. Exported pages and untrusted viewers, which cannot, show the
    second. Plotly's own ``plotly_mimetype+png`` does the same but starts a browser per figure.
    """

    def to_mimebundle(self, fig_dict: dict[str, Any]) -> dict[str, Any]:
        picture = browser.figure_image(fig_dict) if browser.find_browser() else None
        bundle = PlotlyRenderer(config=CONFIG).to_mimebundle(fig_dict)
        if picture is not None:
            bundle["image/png"] = base64.b64encode(picture).decode("ascii")
        return bundle

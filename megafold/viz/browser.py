"""Pictures through a browser: Plotly figures and web pages as PNG or SVG.

A browser is optional. ``find_browser`` says whether there is one; the other functions raise
``BrowserNotFound`` where there is none, and never return an empty picture.
"""

from __future__ import annotations

import asyncio
import atexit
import base64
import functools
import io
import json
import os
import shutil
from collections.abc import Coroutine
from concurrent.futures import TimeoutError as FutureTimeout
from threading import Thread
from typing import Any

import plotly.graph_objects as go
from PIL import Image

TIMEOUT = 60.0  # seconds for one picture; 0.2 to 2 are usual, and 3 to start the browser

# Any of these draws both kinds of picture; the headless shell is the smallest.
_NAMES = (
    "chromium-headless-shell",
    "chrome-headless-shell",
    "chromium",
    "chromium-browser",
    "google-chrome",
    "google-chrome-stable",
    "microsoft-edge",
)


class BrowserNotFound(RuntimeError):
    """No Chromium or Chrome on this machine, and a picture was asked for."""

    def __init__(self) -> None:
        super().__init__(
            "no browser found to draw the picture: install chromium "
            "(Debian: apt-get install chromium-headless-shell) or set BROWSER_PATH to one"
        )


def find_browser() -> str | None:
    """Path of a Chromium or Chrome, or None: ``$BROWSER_PATH`` first, then the usual names.

    Raises:
        FileNotFoundError: ``$BROWSER_PATH`` is set and no executable stands there.
    """
    chosen = os.environ.get("BROWSER_PATH")
    if chosen:
        if not os.access(chosen, os.X_OK):
            raise FileNotFoundError(f"BROWSER_PATH is {chosen!r}, and no executable stands there")
        return chosen
    found = (shutil.which(name) for name in _NAMES)
    return next((path for path in found if path), None)


def figure_image(
    figure: go.Figure | dict[str, Any], format: str = "png", *, scale: float = 1.5
) -> bytes:
    """One figure, or its dictionary, as ``png`` or ``svg``; the browser stays open for the next.

    Raises:
        BrowserNotFound: there is no browser.
        TimeoutError: the browser did not answer.
    """
    path = find_browser()
    if path is None:
        raise BrowserNotFound
    options = {"format": format, "scale": scale if format == "png" else 1}
    plain = figure.to_dict() if isinstance(figure, go.Figure) else figure
    picture = _open_browser(path).figure(plain, options)
    return _small(picture) if format == "png" else picture


def page_image(html: str, width: int, height: int, *, ready: str = "null") -> bytes:
    """A PNG of the web page ``html``, as drawn in a window of ``width`` x ``height`` pixels.

    Args:
        html: the page; its scripts run.
        width, height: pixels.
        ready: a JavaScript expression; a promise is waited for before the picture is taken.

    Raises:
        BrowserNotFound: there is no browser.
        RuntimeError: a script of the page failed; with what the browser said.
        TimeoutError: the browser did not answer.
    """
    path = find_browser()
    if path is None:
        raise BrowserNotFound
    return _small(_open_browser(path).page(html, width, height, ready))


def _small(png: bytes) -> bytes:
    """The same picture in 256 colours: less than half the size, and notebooks store many."""
    packed = io.BytesIO()
    Image.open(io.BytesIO(png)).convert("RGB").quantize(
        256, method=Image.Quantize.MAXCOVERAGE
    ).save(packed, "PNG", optimize=True)
    return packed.getvalue()


class _Browser:
    """One browser for all pictures of this process.

    It runs in a thread of its own, so that it serves notebooks, which run a loop already.
    Kaleido's browser draws WebGL on the CPU and runs without a sandbox, which root (in
    containers) cannot have; the pages shown are our own.
    """

    def __init__(self, path: str) -> None:
        from kaleido import Kaleido

        self._loop = asyncio.new_event_loop()
        Thread(target=self._loop.run_forever, name="megafold-browser", daemon=True).start()
        # MathJax would be fetched from the network.
        self._kaleido = Kaleido(n=1, timeout=TIMEOUT, mathjax=False, path=path)
        self._call(self._kaleido.open())
        atexit.register(self.close)

    def figure(self, figure: dict[str, Any], options: dict[str, Any]) -> bytes:
        return self._call(self._kaleido.calc_fig(figure, opts=options))

    def page(self, html: str, width: int, height: int, ready: str) -> bytes:
        return self._call(self._page(html, width, height, ready))

    def close(self) -> None:
        self._call(self._kaleido.close())
        self._loop.call_soon_threadsafe(self._loop.stop)

    async def _page(self, html: str, width: int, height: int, ready: str) -> bytes:
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
        tab = await self._kaleido.create_tab("about:blank")
        try:
            await tab.send_command("Emulation.setDeviceMetricsOverride", params=size)
            script = {"expression": _WRITE % (json.dumps(html), ready), "awaitPromise": True}
            done = await tab.send_command("Runtime.evaluate", params=script)
            if failure := done["result"].get("exceptionDetails"):
                raise RuntimeError(f"the page failed in the browser: {failure}")
            taken = await tab.send_command("Page.captureScreenshot", params={"format": "png"})
            return base64.b64decode(taken["result"]["data"])
        finally:
            await self._kaleido.close_tab(tab.target_id)

    def _call(self, coroutine: Coroutine) -> Any:
        future = asyncio.run_coroutine_threadsafe(coroutine, self._loop)
        try:
            return future.result(TIMEOUT)
        except FutureTimeout:
            future.cancel()
            raise TimeoutError(f"the browser did not answer within {TIMEOUT:.0f} s") from None


# Write the page, wait for what it waits for, then for two frames to be drawn.
_WRITE = """document.open(); document.write(%s); document.close();
(async () => {
  await (%s);
  for (let i = 0; i < 2; i++) await new Promise((drawn) => requestAnimationFrame(drawn));
})()"""


@functools.cache
def _open_browser(path: str) -> _Browser:
    return _Browser(path)

"""Pictures through a browser: Plotly figures and web pages as PNG or SVG.

A browser is optional. ``find_browser`` says whether there is one; the other functions raise
``BrowserNotFound`` where there is none, and never return an empty picture.
"""

from __future__ import annotations

import asyncio
import atexit
import functools
import os
import shutil
import subprocess
import tempfile
from collections.abc import Coroutine
from concurrent.futures import TimeoutError as FutureTimeout
from pathlib import Path
from threading import Thread
from typing import Any

import plotly.graph_objects as go

TIMEOUT = 60.0  # seconds for one picture; 0.2 to 3 are usual

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
# No sandbox: root (containers) cannot have one, and the pages shown are our own.
# Swiftshader draws WebGL on the CPU.
_FLAGS = (
    "--headless",
    "--no-sandbox",
    "--hide-scrollbars",
    "--use-angle=swiftshader",
    "--enable-unsafe-swiftshader",
    "--disable-extensions",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--no-first-run",
    "--no-default-browser-check",
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
    return _renderer(path).image(plain, options)


def page_image(html: str, width: int, height: int) -> bytes:
    """A PNG of the web page ``html``, as drawn in a window of ``width`` x ``height`` pixels.

    Raises:
        BrowserNotFound: there is no browser.
        RuntimeError: the browser failed; with what it said.
    """
    path = find_browser()
    if path is None:
        raise BrowserNotFound
    with tempfile.TemporaryDirectory(prefix="megafold-page-") as folder:
        page, picture = Path(folder, "page.html"), Path(folder, "page.png")
        page.write_text(html, encoding="utf-8")
        command = [
            path,
            *_FLAGS,
            f"--user-data-dir={folder}/profile",
            f"--window-size={width},{height}",
            f"--screenshot={picture}",
            page.as_uri(),
        ]
        done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT)
        if done.returncode != 0 or not picture.exists():
            said = done.stderr.strip()[-500:]
            raise RuntimeError(f"{path} drew nothing (exit status {done.returncode}): {said}")
        return picture.read_bytes()


class _FigureRenderer:
    """Kaleido in a thread of its own, so that it serves notebooks, which run a loop already."""

    def __init__(self, browser: str) -> None:
        from kaleido import Kaleido

        self._loop = asyncio.new_event_loop()
        Thread(target=self._loop.run_forever, name="megafold-figures", daemon=True).start()
        # MathJax would be fetched from the network.
        self._kaleido = Kaleido(n=1, timeout=TIMEOUT, mathjax=False, path=browser)
        self._call(self._kaleido.open())
        atexit.register(self.close)

    def image(self, figure: dict[str, Any], options: dict[str, Any]) -> bytes:
        return self._call(self._kaleido.calc_fig(figure, opts=options))

    def close(self) -> None:
        self._call(self._kaleido.close())
        self._loop.call_soon_threadsafe(self._loop.stop)

    def _call(self, coroutine: Coroutine) -> Any:
        future = asyncio.run_coroutine_threadsafe(coroutine, self._loop)
        try:
            return future.result(TIMEOUT)
        except FutureTimeout:
            future.cancel()
            raise TimeoutError(f"the browser did not answer within {TIMEOUT:.0f} s") from None


@functools.cache
def _renderer(browser: str) -> _FigureRenderer:
    return _FigureRenderer(browser)

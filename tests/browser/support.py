"""What the browser tests look at: requests, and pixels."""

from __future__ import annotations

import io
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np
from PIL import Image
from playwright.sync_api import BrowserContext, ConsoleMessage, Locator, Page, Request

CHECKOUT = Path(__file__).resolve().parents[2]
PICTURES = CHECKOUT / "outputs" / "browser"  # screenshots, for people to look at
TOKEN = "only-for-this-test"  # JupyterLab's
LOCAL = {"127.0.0.1", "localhost", ""}  # no host: file, data and blob


@dataclass
class Traffic:
    """What the pages of one test asked for, and what went wrong in them."""

    requests: list[str] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)

    def watch(self, context: BrowserContext) -> None:
        def note_failure(request: Request) -> None:
            self.failed.append(f"{request.url[:200]}: {request.failure}")

        def note_message(message: ConsoleMessage) -> None:
            if message.type == "error":
                self.errors.append(message.text)

        context.on("request", lambda request: self.requests.append(request.url))
        context.on("requestfailed", note_failure)
        context.on("console", note_message)
        context.on("weberror", lambda error: self.errors.append(str(error.error)))

    @property
    def outside(self) -> list[str]:
        """Requests to any machine but this one."""
        return [url for url in self.requests if (urlsplit(url).hostname or "") not in LOCAL]


def colours(locator: Locator) -> int:
    """Number of distinct colours an element shows: 1 where nothing is drawn."""
    picture = Image.open(io.BytesIO(locator.screenshot())).convert("RGB")
    return len(np.unique(np.asarray(picture).reshape(-1, 3), axis=0))


def wait_until(page: Page, condition: Callable[[], bool], what: str, seconds: float = 30) -> None:
    """Wait for what the page offers no event for: pixels.

    Raises:
        AssertionError: naming ``what``, when it has not come to pass.
    """
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"after {seconds:.0f} s: not {what}"
        page.wait_for_timeout(250)


def keep_picture(page: Page, name: str) -> None:
    """Write a screenshot of the page into ``outputs/browser/``."""
    PICTURES.mkdir(parents=True, exist_ok=True)
    page.screenshot(path=PICTURES / f"{name}.png", full_page=True)

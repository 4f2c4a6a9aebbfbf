"""Pictures through a browser, and what happens where there is none."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import plotly.graph_objects as go
import pytest
from PIL import Image

from megafold.viz import browser


def test_the_browser_chosen_by_the_user_comes_first(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    chosen = tmp_path / "my-browser"
    chosen.write_text("#!/bin/sh\n")
    chosen.chmod(0o755)
    monkeypatch.setenv("BROWSER_PATH", str(chosen))
    assert browser.find_browser() == str(chosen)


def test_a_chosen_browser_that_is_not_there_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BROWSER_PATH", "/no/such/browser")
    with pytest.raises(FileNotFoundError, match=r"/no/such/browser"):
        browser.find_browser()


@pytest.mark.usefixtures("no_browser")
def test_without_a_browser_a_picture_is_an_error_that_says_what_to_install() -> None:
    with pytest.raises(browser.BrowserNotFound, match=r"install chromium"):
        browser.figure_image(go.Figure())
    with pytest.raises(browser.BrowserNotFound, match=r"install chromium"):
        browser.page_image("<p>page", 100, 100)


@pytest.mark.browser
@pytest.mark.usefixtures("browser_path")
class TestWithABrowser:
    def test_a_page_is_drawn_at_the_size_asked_for(self) -> None:
        red = "<body style='margin:0;background:#f00'>"
        picture = np.asarray(
            Image.open(io.BytesIO(browser.page_image(red, 120, 80))).convert("RGB")
        )
        assert picture.shape == (80, 120, 3)
        assert np.abs(picture.astype(int) - (255, 0, 0)).max() < 4

    def test_the_picture_waits_for_what_the_page_waits_for(self) -> None:
        page = (
            "<body style='margin:0'><script>window.later = new Promise((done) => setTimeout(() => "
            "{ document.body.style.background = '#00f'; done(); }, 300))</script>"
        )
        drawn = browser.page_image(page, 20, 20, ready="later")
        pixel = Image.open(io.BytesIO(drawn)).convert("RGB").getpixel((10, 10))
        assert pixel[2] > 250
        assert pixel[0] < 5

    def test_a_page_that_fails_says_why(self) -> None:
        with pytest.raises(RuntimeError, match=r"notDefinedAnywhere"):
            browser.page_image("<p>page", 20, 20, ready="notDefinedAnywhere.at.all")

    def test_a_figure_becomes_png_and_svg(self) -> None:
        figure = go.Figure(go.Scatter(y=[1, 3, 2]), layout_title_text="Three points")
        png = Image.open(io.BytesIO(browser.figure_image(figure, scale=1)))
        assert png.size == (760, 440)
        assert len(np.unique(np.asarray(png.convert("L")))) > 10
        assert b"Three points" in browser.figure_image(figure, "svg")

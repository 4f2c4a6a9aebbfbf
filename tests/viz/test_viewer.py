"""3Dmol.js on a page: offline, once, and never a blank box."""

from __future__ import annotations

import base64
import gzip
import hashlib
import io
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from playwright.sync_api import Page, sync_playwright

from megafold.data import Structure
from megafold.viz import structures, viewer

STATIC = Path(viewer.__file__).parent / "static"


class Shell:
    """A kernel that runs the cells of JupyterLab."""

    def __init__(self) -> None:
        self.execution_count, self.cell = 0, ""

    def run(self, cell: str) -> None:
        self.execution_count += 1
        self.cell = cell

    def get_parent(self) -> dict:
        return {"metadata": {"cellId": self.cell}}


@pytest.fixture
def shell(monkeypatch: pytest.MonkeyPatch) -> tuple[Shell, list[str]]:
    """A kernel, and what has been displayed in it."""
    kernel, shown = Shell(), []
    monkeypatch.setattr(viewer, "get_ipython", lambda: kernel)
    monkeypatch.setattr(viewer, "display", lambda html: shown.append(html.data))
    monkeypatch.setattr(viewer, "_published", None)
    return kernel, shown


def test_the_bundled_library_is_the_one_its_note_names_and_carries_its_licence() -> None:
    note = (STATIC / "README.md").read_text(encoding="utf-8")
    digest = hashlib.sha256((STATIC / "3Dmol-min.js").read_bytes()).hexdigest()
    assert f"3Dmol.js {viewer.VERSION}" in note
    assert f"sha256 {digest}" in note
    assert "BSD-3-Clause" in (STATIC / "LICENSE.3Dmol").read_text(encoding="utf-8")


def test_what_is_published_is_the_bundled_library() -> None:
    packed = re.search(r"atob\('([^']+)'\)", viewer.library())
    assert packed is not None
    unpacked = gzip.decompress(base64.b64decode(packed[1]))
    assert unpacked == (STATIC / "3Dmol-min.js").read_bytes()
    assert len(viewer.library()) < 250_000


def test_the_library_is_published_once_per_notebook(shell: tuple[Shell, list[str]]) -> None:
    kernel, shown = shell
    for cell in ("first", "second"):
        kernel.run(cell)
        viewer.publish_library()
        viewer.publish_library()
    assert len(shown) == 1


def test_running_the_cell_that_holds_the_library_publishes_it_again(
    shell: tuple[Shell, list[str]],
) -> None:
    kernel, shown = shell
    for cell in ("first", "second", "first"):
        kernel.run(cell)
        viewer.publish_library()
    assert len(shown) == 2


def test_no_address_of_another_machine_is_on_the_page(peptide: Structure) -> None:
    html = viewer.view_html(structures.structure_view(peptide).view)
    assert "http" not in html
    assert "cdn" not in html


def test_a_view_without_its_library_is_a_sentence_and_not_a_box(peptide: Structure) -> None:
    html = viewer.view_html(structures.structure_view(peptide).view)
    container = html[: html.index("</div>")]
    assert "run this notebook from its first cell" in container
    assert "height" not in container


@pytest.fixture
def page(browser_path: str) -> Iterator[Page]:
    """A page of a browser that has no network."""
    with sync_playwright() as playwright:
        flags = ["--no-sandbox", "--use-angle=swiftshader", "--enable-unsafe-swiftshader"]
        chromium = playwright.chromium.launch(executable_path=browser_path, args=flags)
        yield chromium.new_context(offline=True).new_page()
        chromium.close()


@pytest.mark.browser
def test_a_view_is_drawn_offline_and_can_be_given_other_contents(
    page: Page, peptide: Structure, myoglobin: Structure
) -> None:
    errors: list[str] = []
    page.on("pageerror", lambda error: errors.append(str(error)))
    shown = structures.structure_view(peptide)
    html = viewer.view_html(shown.view)
    page.set_content(viewer.library() + viewer.legend_html(shown.view, "before") + html)
    page.locator("canvas").wait_for()
    first = _pixels(page)
    assert len(np.unique(first.reshape(-1, 3), axis=0)) > 100

    other = structures.structure_view(myoglobin)
    update = viewer.update_html(other.view, "<b>after</b>", shown.view)
    page.evaluate("(code) => (0, eval)(code)", re.sub(r"</?script>", "", update))
    page.get_by_text("after").wait_for()
    page.wait_for_timeout(300)
    assert (first != _pixels(page)).any(axis=-1).mean() > 0.05
    assert errors == []


@pytest.mark.browser
def test_a_view_that_comes_before_its_library_is_drawn_once_the_library_is_there(
    page: Page, peptide: Structure
) -> None:
    view = viewer.view_html(structures.structure_view(peptide).view)
    page.set_content(view)
    page.get_by_text("run this notebook from its first cell").wait_for()
    assert page.locator("canvas").count() == 0
    page.set_content(view + viewer.library() + view)
    page.locator("canvas").first.wait_for()


def _pixels(page: Page) -> np.ndarray:
    shot = page.locator("canvas").screenshot()
    return np.asarray(Image.open(io.BytesIO(shot)).convert("RGB")).astype(int)

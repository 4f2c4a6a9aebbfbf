"""Exported notebooks show everything in a browser without a network."""

from __future__ import annotations

from pathlib import Path

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook
from playwright.sync_api import Page

from megafold import runner
from megafold.lab.page import notebook_page
from tests.browser.support import Traffic, colours, keep_picture, wait_until

pytestmark = pytest.mark.browser

MATH = r"""# A page

Inline $B_\theta \in \mathbb{R}^{N \times N}$ and

$$\begin{aligned} z_{ij} &= \sum_k a_{ik} \odot b_{jk} \\ y &= W_o z \end{aligned}$$
"""
FIGURE = """import plotly.graph_objects as go
from megafold import notebook
notebook.setup()
go.Figure(go.Scatter(x=[1, 2, 3], y=[2, 1, 3])).show()
price = "$5 and $6"
price"""
STRUCTURE = """from megafold import data, viz
viz.show(data.read_structure(data.sample_path("1CRN")))"""


@pytest.fixture
def exported(tmp_path: Path) -> Path:
    """The page of a notebook with prose, equations, a figure and a structure."""
    cells = [new_markdown_cell(MATH), new_code_cell(FIGURE), new_code_cell(STRUCTURE)]
    path = tmp_path / "00_page.ipynb"
    nbformat.write(new_notebook(cells=cells), path)
    (done,) = runner.run([path], out=tmp_path / "out")
    assert done.failures == ()
    return tmp_path / "out" / "00_page.html"


def test_an_exported_notebook_needs_no_network(
    exported: Path, page: Page, traffic: Traffic
) -> None:
    page.goto(exported.as_uri())
    figure = page.locator(".plotly-graph-div")
    figure.wait_for()
    page.locator("mjx-container svg").first.wait_for()
    view = page.locator("canvas")
    view.wait_for()
    view.scroll_into_view_if_needed()
    wait_until(page, lambda: colours(figure) > 10, "a figure drawn")
    wait_until(page, lambda: colours(view) > 100, "a structure drawn")
    keep_picture(page, "page")

    assert traffic.outside == []
    assert traffic.failed == []
    assert traffic.errors == []
    assert page.locator("mjx-container").count() == 2
    assert page.locator("mjx-merror").count() == 0


@pytest.mark.parametrize("path", runner.find(), ids=lambda path: path.stem)
def test_the_page_of_each_notebook_needs_no_network(
    path: Path, tmp_path: Path, page: Page, traffic: Traffic
) -> None:
    notebook = nbformat.read(path, as_version=4)
    html = tmp_path / f"{path.stem}.html"
    html.write_text(notebook_page(notebook, path.stem, path.parent, before=None, after=None))
    page.goto(html.as_uri())
    page.wait_for_load_state("networkidle")
    for drawn in page.locator(".plotly-graph-div").all():
        drawn.locator(".main-svg").first.wait_for()
    for view in page.locator("[id^='3dmolviewer']").all():
        view.locator("canvas").first.wait_for()
    assert traffic.outside == []
    assert traffic.failed == []
    assert traffic.errors == []
    assert page.locator("mjx-merror").count() == 0


def test_notebooks_link_each_others_pages(tmp_path: Path, page: Page) -> None:
    first, second = tmp_path / "00_first.ipynb", tmp_path / "01_second.ipynb"
    link = new_markdown_cell("# First\n\nSee [the other](01_second.ipynb).")
    nbformat.write(new_notebook(cells=[link]), first)
    nbformat.write(new_notebook(cells=[new_markdown_cell("# Second")]), second)
    runner.run([first, second], out=tmp_path / "out")
    page.goto((tmp_path / "out" / "00_first.html").as_uri())
    page.get_by_role("link", name="the other").click()
    page.get_by_role("heading", name="Second").wait_for()
    page.get_by_role("link", name="00_first").click()
    page.get_by_role("heading", name="First").wait_for()


def test_the_index_links_every_page(exported: Path, page: Page, traffic: Traffic) -> None:
    page.goto((exported.parent / "index.html").as_uri())
    page.get_by_role("link", name="00_page").click()
    page.get_by_role("heading", name="A page").wait_for()
    page.get_by_role("link", name="all notebooks").click()
    page.get_by_role("heading", name="MegaFold: notebooks").wait_for()
    assert traffic.failed == []

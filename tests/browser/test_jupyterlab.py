"""A reader opens a notebook in JupyterLab and runs all of it, without a network."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from playwright.sync_api import Page

from megafold import runner
from tests.browser.support import TOKEN, Traffic, colours, keep_picture, wait_until

pytestmark = pytest.mark.browser

NOTEBOOK = runner.FOLDER / "08_predict_and_view.ipynb"
READY = "() => window.jupyterapp?.shell.currentWidget?.content?.model?.cells?.length > 0"
PATIENCE = 900  # seconds; the model is trained first where no earlier run has kept it
RUN_ALL = """async (patience) => {
    const app = window.jupyterapp;
    await app.shell.currentWidget.context.sessionContext.ready;
    const limit = new Promise((_, fail) =>
        setTimeout(() => fail(new Error(`still running after ${patience} s`)), patience * 1000));
    await Promise.race([app.commands.execute('notebook:run-all-cells'), limit]);
    return app.shell.currentWidget.content.model.toJSON();
}"""


def test_a_notebook_runs_shows_its_figures_and_structures_and_follows_its_slider(
    jupyterlab: Callable[[Path], str], page: Page, traffic: Traffic
) -> None:
    address = jupyterlab(NOTEBOOK)
    page.goto(f"{address}lab/tree/notebooks/{NOTEBOOK.name}?token={TOKEN}")
    page.wait_for_function(READY, timeout=60_000)
    ran = page.evaluate(RUN_ALL, PATIENCE)

    code = [cell for cell in ran["cells"] if cell["cell_type"] == "code" and cell["source"]]
    assert [cell["execution_count"] for cell in code] == list(range(1, len(code) + 1))
    outputs = [output for cell in code for output in cell["outputs"]]
    assert [o for o in outputs if o["output_type"] == "error"] == []

    figure = page.locator(".jp-RenderedPlotly").first
    figure.hover()  # JupyterLab shows the still until the pointer comes
    page.locator(".js-plotly-plot .main-svg").first.wait_for()
    wait_until(page, lambda: colours(figure) > 10, "a figure drawn")
    view = page.locator("canvas").first
    view.scroll_into_view_if_needed()
    wait_until(page, lambda: colours(view) > 100, "a structure drawn")
    keep_picture(page, "jupyterlab")

    frames = page.locator(".jupyter-widgets canvas").first
    slider = page.locator(".jupyter-widgets .noUi-handle").first
    slider.scroll_into_view_if_needed()
    last_frame = frames.screenshot()
    for _ in range(10):
        slider.press("ArrowLeft")
    wait_until(page, lambda: frames.screenshot() != last_frame, "another frame drawn")
    keep_picture(page, "jupyterlab_slider")
    assert page.locator("[data-mime-type='application/vnd.jupyter.error']").count() == 0

    assert page.locator(".jp-Dialog, .Toastify__toast").count() == 0
    assert page.get_by_text("Error displaying widget").count() == 0
    assert traffic.outside == []
    assert traffic.failed == []

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


TUNER = runner.FOLDER / "05_triangle_multiplication.ipynb"
ROWS = ".jupyter-widgets table tbody tr"
SCROLL_TO = """async (text) => {
    const notebook = window.jupyterapp.shell.currentWidget.content;
    const cells = [...Array(notebook.model.cells.length).keys()];
    const index = cells.find(i => notebook.model.cells.get(i).sharedModel.source.includes(text));
    notebook.activeCellIndex = index;
    await notebook.scrollToItem(index, 'start');
}"""


def test_the_kernel_tuner_of_an_operator_tries_what_its_sliders_say(
    jupyterlab: Callable[[Path], str], page: Page, traffic: Traffic
) -> None:
    address = jupyterlab(TUNER)
    page.goto(f"{address}lab/tree/notebooks/{TUNER.name}?token={TOKEN}")
    page.wait_for_function(READY, timeout=60_000)
    ran = page.evaluate(RUN_ALL, PATIENCE)
    outputs = [o for c in ran["cells"] if c["cell_type"] == "code" for o in c["outputs"]]
    assert [o for o in outputs if o["output_type"] == "error"] == []

    page.evaluate(SCROLL_TO, "KernelTuner(cases")  # JupyterLab draws only the cells near by
    run = page.locator("button.jupyter-button", has_text="Run")
    run.scroll_into_view_if_needed()
    rows = page.locator(ROWS)
    tried = rows.count()
    assert tried > 0
    kernels = page.locator(".jupyter-widgets select").first
    kernels.select_option(index=kernels.locator("option").count() - 1)
    wait_until(page, lambda: rows.count() == 0, "another kernel chosen")
    run.click()
    wait_until(page, lambda: rows.count() == 1, "a trial shown", seconds=120)
    assert "sm_90" in rows.first.inner_text()
    handle = page.locator(".jupyter-widgets .noUi-handle").first
    handle.scroll_into_view_if_needed()
    handle.press("ArrowRight")
    run.click()
    wait_until(page, lambda: rows.count() == 2, "a second trial shown", seconds=120)
    first, second = (rows.nth(i).inner_text() for i in (1, 0))  # the newest comes first
    assert first.split("\t")[0] != second.split("\t")[0]
    figure = page.locator(".jupyter-widgets .jp-RenderedPlotly").first
    figure.hover()
    wait_until(page, lambda: colours(figure) > 5, "the registers drawn")
    run.scroll_into_view_if_needed()
    keep_picture(page, "kernel_tuner")
    assert page.locator("[data-mime-type='application/vnd.jupyter.error']").count() == 0
    assert traffic.outside == []
    assert traffic.failed == []

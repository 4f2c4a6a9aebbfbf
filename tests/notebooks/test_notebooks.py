"""Every notebook runs from top to bottom, and is stored so that it reads well without running.

They run in order and in this checkout: what one trains and keeps under ``outputs/``, a later
one finds.
"""

from __future__ import annotations

import re
from pathlib import Path

import nbformat
import pytest
from nbformat import NotebookNode

from megafold import runner
from megafold.lab.clean import WIDGET_VIEW

NAMES = (
    "00_tour",
    "01_feature_cache",
    "02_evo_attention",
    "03_layer_norm_linear",
    "04_transition",
    "05_triangle_multiplication",
    "06_memory_profile",
    "07_train_long_sequences",
    "08_predict_and_view",
    "09_paper_figures",
)
LONGEST_CELL = 25  # lines
LARGEST_FILE = 1_000_000  # bytes
ABSOLUTE_PATH = re.compile(r"(?<![\w.:/+])/(?:home|root|tmp|work|Users|usr|opt|var|mnt|srv)/\S*")

each = pytest.mark.parametrize("name", NAMES)


def stored(name: str) -> NotebookNode:
    return nbformat.read(runner.FOLDER / f"{name}.ipynb", as_version=4)


def code_cells(notebook: NotebookNode) -> list[NotebookNode]:
    return [cell for cell in notebook.cells if cell.cell_type == "code" and cell.source.strip()]


def shown_text(notebook: NotebookNode) -> str:
    """What the outputs say in words."""
    texts = []
    for cell in code_cells(notebook):
        for output in cell.outputs:
            texts += [output.get("text", ""), *output.get("traceback", [])]
            texts += [v for m, v in output.get("data", {}).items() if m.startswith("text/")]
    return "\n".join(texts)


def test_the_notebooks_are_these_and_in_this_order() -> None:
    assert tuple(path.stem for path in runner.find()) == NAMES


@pytest.mark.notebook
@each
def test_runs_without_an_error(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)  # what a reader has, not what tests have
    done = runner.execute(runner.FOLDER / f"{name}.ipynb", figures=tmp_path / "figures")
    assert done.failures == (), "\n".join(f.error + "\n" + f.traceback for f in done.failures)
    assert [c.execution_count for c in code_cells(done.notebook)] == list(range(1, done.cells + 1))


@each
def test_is_stored_with_its_outputs(name: str) -> None:
    cells = code_cells(stored(name))
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    assert any(cell.outputs for cell in cells)


@each
def test_is_stored_without_errors(name: str) -> None:
    outputs = [output for cell in code_cells(stored(name)) for output in cell.outputs]
    assert [o.evalue for o in outputs if o.output_type == "error"] == []


@each
def test_is_stored_without_warnings(name: str) -> None:
    outputs = [output for cell in code_cells(stored(name)) for output in cell.outputs]
    assert [o.text for o in outputs if o.get("name") == "stderr"] == []


@each
def test_is_stored_without_widget_state(name: str) -> None:
    notebook = stored(name)
    assert "widgets" not in notebook.metadata
    outputs = [output for cell in code_cells(notebook) for output in cell.outputs]
    assert not any(WIDGET_VIEW in output.get("data", {}) for output in outputs)


@each
def test_is_small(name: str) -> None:
    assert (runner.FOLDER / f"{name}.ipynb").stat().st_size <= LARGEST_FILE


@each
def test_has_short_cells(name: str) -> None:
    lengths = [len(cell.source.splitlines()) for cell in code_cells(stored(name))]
    assert max(lengths) <= LONGEST_CELL


@each
def test_names_no_place_on_the_machine_that_ran_it(name: str) -> None:
    assert ABSOLUTE_PATH.findall(shown_text(stored(name))) == []


@each
def test_begins_with_a_heading_and_the_set_up(name: str) -> None:
    notebook = stored(name)
    assert notebook.cells[0].cell_type == "markdown"
    assert notebook.cells[0].source.startswith("# ")
    assert "notebook.setup()" in code_cells(notebook)[0].source


@pytest.mark.parametrize("name", NAMES[2:6])
def test_a_notebook_of_an_operator_shows_its_kernel_tuner(name: str) -> None:
    """The control as the last expression of a cell, and what it found out when stored."""
    cells = [cell for cell in code_cells(stored(name)) if "KernelTuner(" in cell.source]
    assert cells
    for cell in cells:
        assert re.search(r"^(\w+) = KernelTuner\((.*\n)*\1$", cell.source, re.MULTILINE)
        shown = [output.get("data", {}) for output in cell.outputs]
        tables = [data["text/html"] for data in shown if "registers" in data.get("text/html", "")]
        assert len(tables) == 1
        assert any("application/vnd.plotly.v1+json" in data for data in shown)


@each
def test_links_to_what_is_there(name: str) -> None:
    prose = [cell.source for cell in stored(name).cells if cell.cell_type == "markdown"]
    targets = re.findall(r"\]\((?!https?://|#)([^)#]+)", "\n".join(prose))
    assert [target for target in targets if not (runner.FOLDER / target).exists()] == []

"""The runner reports every failure, goes on with the rest, and stores only what is sound."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbclient import NotebookClient
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

from megafold import cli, runner
from megafold.lab.clean import WIDGET_NOTE

Write = Callable[..., Path]

HIDDEN_ERROR = """import ipywidgets
shown = ipywidgets.Output()
button = ipywidgets.Button()

@shown.capture()
def press(_):
    raise ValueError("nobody sees this")

button.on_click(press)
shown"""


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Write a notebook of the given code cells and return its path."""

    def write(name: str, *cells: str) -> Path:
        path = tmp_path / f"{name}.ipynb"
        code = [new_code_cell(source) for source in cells]
        nbformat.write(new_notebook(cells=[new_markdown_cell(f"# About {name}"), *code]), path)
        return path

    return write


def test_a_failing_cell_is_named_with_its_error(write: Write) -> None:
    done = runner.execute(write("00_bad", "1 + 1", "1 / 0", "2 + 2"))
    (failure,) = done.failures
    assert failure.where == "cell 2 of 3"
    assert failure.error == "ZeroDivisionError: division by zero"
    assert "1 / 0" in failure.traceback


def test_an_error_inside_a_widgets_output_is_found(write: Write) -> None:
    done = runner.execute(write("00_hidden", HIDDEN_ERROR, "button.click()"))
    (failure,) = done.failures
    assert failure.where == "a widget's output area"
    assert failure.error == "ValueError: nobody sees this"


def test_the_same_widget_without_the_error_passes(write: Write) -> None:
    sound = HIDDEN_ERROR.replace('raise ValueError("nobody sees this")', 'print("pressed")')
    assert runner.execute(write("00_sound", sound, "button.click()")).failures == ()


def test_a_kernel_that_dies_is_a_failure(write: Write) -> None:
    (failure,) = runner.execute(write("00_dies", "import os\nos._exit(3)")).failures
    assert failure.where == "cell 1 of 1"
    assert failure.error.startswith("DeadKernelError")


def test_a_cell_that_takes_too_long_is_a_failure(write: Write) -> None:
    done = runner.execute(write("00_slow", "import time\ntime.sleep(60)"), timeout=1)
    assert done.failures[0].error.startswith("TimeoutError")


def test_a_notebook_runs_with_this_python_in_its_own_folder(write: Write) -> None:
    path = write("00_where", f"import os, sys\nassert sys.executable == {sys.executable!r}", "")
    assert runner.execute(path).failures == ()
    path = write("00_here", f"import os\nassert os.getcwd() == {str(path.parent)!r}")
    assert runner.execute(path).failures == ()


def test_the_rest_runs_after_a_failure_and_all_get_pages(write: Write, tmp_path: Path) -> None:
    paths = [write("00_bad", "1 / 0"), write("01_good", "print('fine')")]
    bad, good = runner.run(paths, out=tmp_path / "out")
    assert bad.failures
    assert not good.failures
    assert "ZeroDivisionError" in (tmp_path / "out" / "00_bad.html").read_text()
    index = (tmp_path / "out" / "index.html").read_text()
    assert "FAILED in cell 1 of 1: ZeroDivisionError" in index
    assert "About 01_good" in index


def test_figures_go_beside_the_pages(write: Write, tmp_path: Path) -> None:
    path = write("00_figure", "import os\nprint(os.environ['MEGAFOLD_FIGURES'])")
    (done,) = runner.run([path], out=tmp_path / "out")
    assert done.notebook.cells[1].outputs[0].text.strip() == str(tmp_path / "out" / "figures")


def test_in_place_leaves_a_failing_notebook_as_it_was(write: Write) -> None:
    path = write("00_bad", "print(1)", "1 / 0")
    before = path.read_bytes()
    runner.run([path], in_place=True)
    assert path.read_bytes() == before


def test_in_place_twice_stores_the_same(write: Write) -> None:
    path = write("00_good", "import ipywidgets\nipywidgets.IntSlider()", "6 * 7")
    runner.run([path], in_place=True)
    first = path.read_bytes()
    runner.run([path], in_place=True)
    assert path.read_bytes() == first


def test_a_stored_widget_is_a_note_and_what_it_showed(write: Write) -> None:
    source = (
        "import ipywidgets\nshown = ipywidgets.Output()\n"
        "shown.outputs = ({'output_type': 'stream', 'name': 'stdout', 'text': 'inside\\n'},)\n"
        "ipywidgets.VBox([ipywidgets.Button(), shown])"
    )
    path = write("00_widget", source)
    runner.run([path], in_place=True)
    notebook = nbformat.read(path, as_version=4)
    note, inside = notebook.cells[1].outputs
    assert note.data["text/html"] == WIDGET_NOTE
    assert inside.text == "inside\n"
    assert "widgets" not in notebook.metadata


def test_notebooks_are_found_by_number_or_name(write: Write, tmp_path: Path) -> None:
    one, two = write("01_one", ""), write("02_two", "")
    assert runner.find(["02", "01_one"], tmp_path) == [one, two]
    assert runner.find([], tmp_path) == [one, two]


def test_an_unknown_notebook_is_refused_with_those_there_are(write: Write, tmp_path: Path) -> None:
    write("01_one", "")
    with pytest.raises(FileNotFoundError, match="no notebook '07'; there are: 01_one"):
        runner.find(["07"], tmp_path)


def test_the_command_fails_when_a_notebook_does(
    write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(runner, "FOLDER", tmp_path)
    write("00_good", "1")
    write("01_bad", "1 / 0")
    out = str(tmp_path / "out")
    assert cli.main(["notebooks", "run", "00", "--out", out]) == 0
    assert cli.main(["notebooks", "run", "--out", out]) == 1
    assert "1 of 2 notebooks ran without an error" in capsys.readouterr().out
    assert cli.main(["notebooks", "run", "no_such"]) == 2


STARTED = "import os\nopen('started', 'w').write(str(os.getpid()))"


def assert_no_kernel(path: Path) -> None:
    """The kernel of a notebook whose first cell is STARTED is gone."""
    with pytest.raises(ProcessLookupError):
        os.kill(int((path.parent / "started").read_text()), 0)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_stops_all_and_leaves_no_kernel(write: Write, number: signal.Signals) -> None:
    path = write("00_slow", STARTED, "import time\ntime.sleep(60)")
    code = (
        f"from pathlib import Path\nfrom megafold import runner\nrunner.run([Path({str(path)!r})])"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.PIPE, text=True)
    started = path.parent / "started"
    while not (started.exists() and started.read_text()):
        assert process.poll() is None
        time.sleep(0.1)
    process.send_signal(number)
    _, errors = process.communicate(timeout=20)
    assert "KeyboardInterrupt" in errors
    assert_no_kernel(path)


@pytest.fixture
def interrupts(monkeypatch: pytest.MonkeyPatch) -> list[runner._Interrupt]:
    """What listens for signals, of every notebook that is run."""
    made: list[runner._Interrupt] = []

    class Interrupt(runner._Interrupt):
        def __init__(self, client: NotebookClient) -> None:
            super().__init__(client)
            made.append(self)

    monkeypatch.setattr(runner, "_Interrupt", Interrupt)
    return made


@pytest.mark.parametrize("cells", [(STARTED, "open('second', 'w')"), (STARTED,)])
def test_a_signal_is_not_lost_as_a_cell_ends(
    write: Write,
    interrupts: list[runner._Interrupt],
    monkeypatch: pytest.MonkeyPatch,
    cells: tuple[str, ...],
) -> None:
    ends = NotebookClient._async_poll_output_msg

    async def stop_as_it_ends(*arguments: Any) -> None:
        await ends(*arguments)
        asyncio.get_running_loop().call_soon(interrupts[-1].stop)

    monkeypatch.setattr(NotebookClient, "_async_poll_output_msg", stop_as_it_ends)
    path = write("00_short", *cells)
    with pytest.raises(KeyboardInterrupt):
        runner.execute(path)
    assert not (path.parent / "second").exists()
    assert_no_kernel(path)


def test_a_signal_between_cells_is_an_interrupt(
    write: Write, interrupts: list[runner._Interrupt], monkeypatch: pytest.MonkeyPatch
) -> None:
    sends = NotebookClient.async_execute_cell

    async def stop_before_the_second(self: NotebookClient, cell: Any, index: int, **more: Any):
        if index == 2:  # after the title and the first
            asyncio.get_running_loop().call_soon(interrupts[-1].stop)
            await asyncio.sleep(0)
        return await sends(self, cell, index, **more)

    monkeypatch.setattr(NotebookClient, "async_execute_cell", stop_before_the_second)
    path = write("00_short", STARTED, "open('second', 'w')")
    with pytest.raises(KeyboardInterrupt):
        runner.execute(path)
    assert not (path.parent / "second").exists()
    assert_no_kernel(path)

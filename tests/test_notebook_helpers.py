"""What notebooks need beyond the library."""

from __future__ import annotations

import base64
import re
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import plotly.graph_objects as go
import plotly.io as pio
import pytest
import triton
import triton.language as tl

import megafold
from megafold import notebook, ops
from megafold.viz import renderer


@dataclass(frozen=True)
class Shape:
    width: int
    height: int


SHAPES = Shape(3, 4)


@triton.jit
def double(x_ptr, BLOCK: tl.constexpr):
    """A kernel whose source is shown."""
    at = x_ptr + tl.arange(0, BLOCK)
    tl.store(at, 2 * tl.load(at))


def no_browser(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("megafold.viz.browser.find_browser", lambda: None)


@pytest.fixture
def shown(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Markdown that is displayed."""
    texts: list[str] = []
    monkeypatch.setattr(notebook, "display", lambda markdown: texts.append(markdown.data))
    return texts


def test_setup_says_in_one_line_what_the_notebook_runs_on(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    no_browser(monkeypatch)
    notebook.setup()
    printed = capsys.readouterr().out
    assert printed.count("\n") == 1
    said = (f"MegaFold {megafold.__version__}", "torch ", "triton ", "operators auto", "no browser")
    assert all(part in printed for part in said)


def test_setup_makes_figures_interactive_in_the_projects_look(
    capsys: pytest.CaptureFixture[str],
) -> None:
    notebook.setup()
    capsys.readouterr()
    assert pio.templates.default == "megafold"
    assert isinstance(pio.renderers["megafold"], renderer.NotebookRenderer)


def test_a_figure_is_displayed_without_a_button_that_sends_it_away(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    no_browser(monkeypatch)
    bundle = renderer.NotebookRenderer().to_mimebundle(go.Figure(go.Scatter(y=[1])).to_dict())
    assert list(bundle) == ["application/vnd.plotly.v1+json"]
    assert bundle["application/vnd.plotly.v1+json"]["config"]["showSendToCloud"] is False


def test_a_figure_has_a_picture_beside_it_where_a_browser_draws_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(renderer.browser, "find_browser", lambda: "a browser")
    monkeypatch.setattr(renderer.browser, "figure_image", lambda figure, scale: b"a picture")
    bundle = renderer.NotebookRenderer().to_mimebundle(go.Figure().to_dict())
    assert base64.b64decode(bundle["image/png"]) == b"a picture"


@pytest.mark.parametrize(("value", "answer"), [("1", True), ("0", False)])
def test_a_variable_decides_whether_somebody_watches(
    monkeypatch: pytest.MonkeyPatch, value: str, answer: bool
) -> None:
    monkeypatch.setenv("MEGAFOLD_HEADLESS", value)
    assert notebook.headless() is answer


def test_the_variable_takes_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MEGAFOLD_HEADLESS", "yes")
    with pytest.raises(ValueError, match=r"must be 0 or 1, not 'yes'"):
        notebook.headless()


def test_a_kernel_is_watched_when_a_jupyter_server_started_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("MEGAFOLD_HEADLESS", raising=False)
    for name in ("JPY_SESSION_NAME", "VSCODE_PID", "COLAB_RELEASE_TAG"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setitem(__import__("sys").modules, "ipykernel", SimpleNamespace())
    assert notebook.headless() is True
    monkeypatch.setenv("JPY_SESSION_NAME", "00_tour.ipynb")
    assert notebook.headless() is False


def test_progress_passes_everything_on_and_is_silent_when_headless(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MEGAFOLD_HEADLESS", "1")
    assert list(notebook.progress((i * i for i in range(4)), total=4, desc="squares")) == [
        0,
        1,
        4,
        9,
    ]
    captured = capsys.readouterr()
    assert captured.out + captured.err == ""


def test_progress_shows_a_bar_to_whoever_watches(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MEGAFOLD_HEADLESS", "0")
    assert list(notebook.progress(range(3), desc="steps")) == [0, 1, 2]
    captured = capsys.readouterr()
    assert "steps" in captured.out + captured.err


def test_source_is_shown_with_file_and_line_and_no_folder_of_this_machine(
    shown: list[str],
) -> None:
    notebook.show_source(notebook.figures_folder)
    (text,) = shown
    place = re.match(r"`megafold/notebook.py:(\d+)`", text)
    assert place is not None
    written = Path(notebook.__file__).read_text().splitlines()
    assert written[int(place[1]) - 1] == "def figures_folder() -> Path:"
    assert "```python\ndef figures_folder() -> Path:" in text
    assert str(Path.home()) not in text


def test_the_source_of_a_triton_kernel_is_shown(shown: list[str]) -> None:
    assert isinstance(double, triton.runtime.KernelInterface)
    notebook.show_source(double)
    assert "def double(x_ptr" in shown[0]


def test_the_source_of_a_public_operator_is_shown(shown: list[str]) -> None:
    notebook.show_source(ops.evo_attention)
    assert "def evo_attention(" in shown[0]


def test_what_has_no_source_is_refused() -> None:
    with pytest.raises(TypeError, match=r"len.* has no Python source"):
        notebook.show_source(len)


def test_figures_go_where_the_variable_says_else_into_the_checkout(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv("MEGAFOLD_FIGURES", raising=False)
    assert notebook.figures_folder() == Path(megafold.__file__).parents[1] / "figures"
    monkeypatch.setenv("MEGAFOLD_FIGURES", str(tmp_path))
    assert notebook.figures_folder() == tmp_path


def test_saving_writes_the_figure_and_says_what_it_could_not_write(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    no_browser(monkeypatch)
    monkeypatch.setenv("MEGAFOLD_FIGURES", str(tmp_path))
    notebook.save(go.Figure(go.Scatter(y=[1, 2])), "a_line")
    assert capsys.readouterr().out == (
        "saved a_line.json; not a_line.svg and a_line.png: no browser found\n"
    )
    assert (tmp_path / "a_line.json").exists()
    assert "a_line" in (tmp_path / "README.md").read_text()


@pytest.mark.parametrize("name", ["", "A line", "../up", "a.png"])
def test_a_name_that_is_no_plain_file_name_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match=r"lower case letters, digits"):
        notebook.save(go.Figure(), name)


def test_rows_are_shown_as_a_table(shown: list[str]) -> None:
    notebook.table([{"atoms": 12345, "name": "a|b", "share": 0.123456}])
    assert shown == ["| atoms | name | share |\n|---:|---|---:|\n| 12,345 | a\\|b | 0.1235 |"]


def test_a_table_takes_dataclasses_and_chooses_columns(shown: list[str]) -> None:
    notebook.table([SHAPES], ["width"])
    assert shown == ["| width |\n|---:|\n| 3 |"]
    with pytest.raises(ValueError, match="at least one row"):
        notebook.table([])


def test_a_still_is_written_and_shown_where_the_view_is_not(tmp_path, monkeypatch):
    class View:
        def still(self) -> bytes:
            return b"\x89PNG\r\n\x1a\n"

    shown = []
    monkeypatch.setenv("MEGAFOLD_FIGURES", str(tmp_path))
    monkeypatch.setattr(notebook, "display", shown.append)
    monkeypatch.setattr(notebook.browser, "find_browser", lambda: "chromium")
    view = View()
    notebook.save_still(view, "turned")
    notebook.save_still(view, "flat", live=False)
    assert shown[0] is view
    assert shown[1].data == view.still()
    assert len(shown) == 2
    assert {path.name for path in tmp_path.iterdir()} == {"turned.png", "flat.png"}

"""The figures folder and the page that lists it."""

from __future__ import annotations

from pathlib import Path

import plotly.graph_objects as go
import plotly.io as pio
import pytest

from megafold.viz import index, theme


def figure(title: str = "A title") -> go.Figure:
    drawn = go.Figure(go.Scatter(y=[1, 2]), layout={"title": {"text": title}})
    return theme.caption(drawn, "CPU, today")


@pytest.mark.usefixtures("no_browser")
def test_without_a_browser_the_json_is_written_and_what_is_missing_is_said(tmp_path: Path) -> None:
    said = index.write_figure(figure(), "lines", tmp_path)
    assert said == "saved lines.json; not lines.svg and lines.png: no browser found"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["README.md", "lines.json"]


@pytest.mark.usefixtures("no_browser")
def test_the_json_is_the_figure(tmp_path: Path) -> None:
    index.write_figure(figure(), "lines", tmp_path)
    assert pio.read_json(tmp_path / "lines.json") == figure()


@pytest.mark.usefixtures("no_browser")
def test_the_index_lists_every_figure_with_title_and_caption(tmp_path: Path) -> None:
    index.write_figure(figure("One <b>figure</b>"), "one", tmp_path)
    index.write_figure(figure("Another"), "two", tmp_path)
    page = (tmp_path / index.INDEX).read_text()
    assert "## One figure\n" in page
    assert "## Another\n" in page
    assert page.count("CPU, today") == 2
    assert "[two.json](two.json)" in page
    assert "two.png" not in page  # there is none


@pytest.mark.usefixtures("no_browser")
def test_a_changed_figure_leaves_no_picture_of_the_old_one(tmp_path: Path) -> None:
    index.write_figure(figure(), "lines", tmp_path)
    (tmp_path / "lines.png").write_bytes(b"old")
    index.write_figure(figure("Changed"), "lines", tmp_path)
    assert not (tmp_path / "lines.png").exists()


@pytest.mark.browser
@pytest.mark.usefixtures("browser_path")
def test_with_a_browser_all_three_are_written_and_kept_while_the_figure_stays(
    tmp_path: Path,
) -> None:
    said = index.write_figure(figure(), "lines", tmp_path)
    assert said == "saved lines.json, lines.svg, lines.png"
    before = {p.name: p.stat().st_mtime_ns for p in tmp_path.glob("lines.*")}
    assert set(before) == {"lines.json", "lines.svg", "lines.png"}
    index.write_figure(figure(), "lines", tmp_path)
    assert {p.name: p.stat().st_mtime_ns for p in tmp_path.glob("lines.*")} == before
    assert "![A title](lines.png)" in (tmp_path / index.INDEX).read_text()

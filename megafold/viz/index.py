"""The figures folder: files of one figure, and the page that lists them all."""

from __future__ import annotations

import json
import re
from pathlib import Path

import plotly.graph_objects as go

from megafold.atomic import atomic_write
from megafold.viz import browser

INDEX = "README.md"
_HEAD = """# Figures

Drawn by the notebooks from records and from the paper's values; each says where its numbers come
from. `.json` is the interactive figure (`plotly.io.read_json`), `.svg` and `.png` are pictures of
it. This page is written by `megafold.viz.index.write_index`.
"""


def write_figure(figure: go.Figure, name: str, folder: Path) -> str:
    """Write ``name.json``, ``.svg`` and ``.png`` into ``folder`` and bring the index up to date.

    Pictures need a browser. Where the JSON is the same as the one on disk, files that are there
    are kept: a picture carries random ids, and would change without the figure changing.

    Returns:
        A sentence saying what was written and what was not.
    """
    text = figure.to_json(pretty=False) + "\n"
    data = folder / f"{name}.json"
    pictures = [folder / f"{name}.{kind}" for kind in ("svg", "png")]
    if not data.exists() or data.read_text(encoding="utf-8") != text:
        for stale in pictures:
            stale.unlink(missing_ok=True)
        atomic_write(data, text.encode())
    missing = [picture for picture in pictures if not picture.exists()]
    if missing and browser.find_browser() is None:
        said = f"saved {data.name}; not {' and '.join(p.name for p in missing)}: no browser found"
    else:
        for picture in missing:
            atomic_write(picture, browser.figure_image(figure, picture.suffix[1:], scale=2))
        said = f"saved {name}.json, {name}.svg, {name}.png"
    write_index(folder)
    return said


def write_index(folder: Path) -> Path:
    """Write the page that lists every figure of ``folder`` with its title and picture."""
    entries = [_entry(path) for path in sorted(folder.glob("*.json"))]
    page = folder / INDEX
    atomic_write(page, "\n".join([_HEAD, *entries]).encode())
    return page


def _entry(path: Path) -> str:
    layout = json.loads(path.read_text(encoding="utf-8")).get("layout", {})
    title = layout.get("title", {})
    heading = _plain(title.get("text") or path.stem)
    subtitle = _plain(title.get("subtitle", {}).get("text") or "")
    notes = [_plain(a["text"]) for a in layout.get("annotations", []) if a.get("name") == "caption"]
    links = [
        p.name for kind in ("json", "svg", "png") if (p := path.with_suffix(f".{kind}")).exists()
    ]
    lines = [f"## {heading}", ""]
    if subtitle:
        lines += [subtitle, ""]
    if path.with_suffix(".png").exists():
        lines += [f"![{heading}]({path.stem}.png)", ""]
    lines += [f"{note}\n" for note in notes]
    lines += [" · ".join(f"[{name}]({name})" for name in links), ""]
    return "\n".join(lines)


def _plain(text: str) -> str:
    """Plotly's text without its tags."""
    return re.sub(r"<[^>]+>", "", re.sub(r"<br ?/?>", " ", text)).strip()

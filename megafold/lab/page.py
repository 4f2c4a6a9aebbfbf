"""Executed notebooks as web pages that stand alone: one file each, and no network.

Jupyter's own export fetches MathJax, RequireJS and the widget manager from the web and leaves
Plotly figures out. Here MathJax and Plotly are written into the page where it needs them.
"""

from __future__ import annotations

import copy
import html
import json
import re
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from string import Template

from nbconvert import HTMLExporter
from nbformat import NotebookNode
from plotly.io import to_html
from plotly.offline import get_plotlyjs

PLOTLY = "application/vnd.plotly.v1+json"

# RequireJS goes: 3Dmol.js would register with it instead of with the page.
_TEMPLATE = """
{%- extends 'lab/index.html.j2' -%}
{%- block html_head_js_requirejs -%}{%- endblock -%}
{%- block html_head_js_mermaidjs -%}{%- endblock -%}
{%- block html_head_js_mathjax -%}{{ resources.megafold_head }}{%- endblock -%}
{%- block html_head_css -%}<style>{{ resources.megafold_style }}</style>{%- endblock -%}
{%- block body_header -%}{{ super() }}{{ resources.megafold_navigation }}{%- endblock -%}
"""

# To another notebook: its page lies beside this one.
_LINK = re.compile(r'href="(\w+)\.ipynb')

_STYLE = """
main { max-width: 1040px; margin: 0 auto }
nav { display: flex; gap: 2em; font: 14px sans-serif; padding: 8px 0 16px 70px }
nav a { color: var(--jp-content-link-color) }
.jp-RenderedMarkdown .highlight pre {
  font-family: var(--jp-code-font-family), monospace; font-size: 13px; line-height: 1.35
}
"""

# The delimiters JupyterLab knows, in prose and LaTeX outputs only: code has dollar signs too.
_MATHJAX = {
    "tex": {
        "inlineMath": [["$", "$"], ["\\(", "\\)"]],
        "displayMath": [["$$", "$$"], ["\\[", "\\]"]],
        "processEscapes": True,
        "tags": "ams",
    },
    "options": {
        "ignoreHtmlClass": "jp-Notebook",
        "processHtmlClass": "jp-RenderedMarkdown|jp-RenderedLatex",
        "enableMenu": False,
    },
}


def notebook_page(
    notebook: NotebookNode, name: str, folder: Path, *, before: str | None, after: str | None
) -> str:
    """An executed, cleaned notebook as one HTML page.

    Args:
        notebook: left unchanged.
        name: the page's title.
        folder: where the notebook lies; pictures its prose links to are read from there.
        before: name of the page before this one, None for the first.
        after: name of the page after this one, None for the last.
    """
    math = _has_math(notebook)
    notebook, figures = _with_live_figures(notebook)
    head = []
    if math:
        head += [f"window.MathJax = {json.dumps(_MATHJAX)}", _static("mathjax-tex-svg.js")]
    if figures:
        head.append(get_plotlyjs())
    resources = {
        "metadata": {"name": name, "path": str(folder)},
        "megafold_style": _STYLE,
        "megafold_head": "\n".join(_script(code) for code in head),
        "megafold_navigation": _navigation(before, after),
    }
    exporter = HTMLExporter(raw_template=_TEMPLATE, embed_images=True)
    page, _ = exporter.from_notebook_node(notebook, resources)
    return _LINK.sub(r'href="\1.html', page)


def title(notebook: NotebookNode, name: str) -> str:
    """The first heading of the notebook, else ``name``."""
    for cell in notebook.cells:
        if cell.cell_type == "markdown":
            for line in cell.source.splitlines():
                if line.startswith("# "):
                    return line.removeprefix("# ").strip()
    return name


def index_page(rows: Sequence[tuple[str, str, str]], figures: Sequence[str]) -> str:
    """The page that links all others.

    Args:
        rows: name, title and outcome of each notebook; ``NAME.html`` lies beside the index.
        figures: paths of the pictures, relative to the index.
    """
    listed = "\n".join(
        f'<tr><td><a href="{html.escape(name)}.html">{html.escape(name)}</a></td>'
        f"<td>{html.escape(heading)}</td><td>{html.escape(outcome)}</td></tr>"
        for name, heading, outcome in rows
    )
    drawn = "\n".join(
        f'<a href="{html.escape(path)}"><img src="{html.escape(path)}" loading="lazy" '
        f'alt="{html.escape(Path(path).stem)}"></a>'
        for path in figures
    )
    drawn = drawn or "<p>No pictures: no browser was found to draw them with.</p>"
    return Template(_static("index.html")).substitute(notebooks=listed, figures=drawn)


def _with_live_figures(notebook: NotebookNode) -> tuple[NotebookNode, bool]:
    """A copy with each Plotly output as a script that draws it, and whether there was any."""
    notebook = copy.deepcopy(notebook)
    found = False
    for cell in notebook.cells:
        for output in cell.get("outputs", ()):
            figure = output.get("data", {}).get(PLOTLY)
            if figure is None:
                continue
            found = True
            config = figure.get("config", {})
            parts = {key: figure[key] for key in ("data", "layout", "frames") if key in figure}
            drawn = to_html(
                parts, config=config, include_plotlyjs=False, full_html=False, validate=False
            )
            output.data = NotebookNode({"text/html": drawn})
    return notebook, found


def _has_math(notebook: NotebookNode) -> bool:
    prose = [cell.source for cell in notebook.cells if cell.cell_type == "markdown"]
    for cell in notebook.cells:
        for output in cell.get("outputs", ()):
            data = output.get("data", {})
            prose += [data[mime] for mime in ("text/markdown", "text/latex") if mime in data]
    return any(mark in text for text in prose for mark in ("$", "\\(", "\\[", "\\begin{"))


def _static(name: str) -> str:
    return (files("megafold.lab") / "static" / name).read_text(encoding="utf-8")


def _script(code: str) -> str:
    inert = code.replace("</script", "<\\/script")
    return f"<script>{inert}</script>"


def _navigation(before: str | None, after: str | None) -> str:
    links = [f'<a href="{html.escape(before)}.html">← {html.escape(before)}</a>'] if before else []
    links.append('<a href="index.html">all notebooks</a>')
    links += [f'<a href="{html.escape(after)}.html">{html.escape(after)} →</a>'] if after else []
    return f"<nav>{' '.join(links)}</nav>"

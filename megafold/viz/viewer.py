"""3Dmol.js in a notebook, offline.

The library is bundled (``static/``), published inline once per notebook by the first view, and
shared by all later ones. A page without it (its cell was not run, or the notebook is not
trusted) shows a sentence and the PNG still, never a blank box.
"""

from __future__ import annotations

import base64
import gzip
import json
import re
from functools import cache
from importlib.resources import files

import py3Dmol
from IPython import get_ipython
from IPython.display import HTML, display

VERSION = "2.5.5"  # of the bundled 3Dmol.js

_NOTE = (
    "The view that can be turned is not loaded here: run this notebook from its first cell, "
    "or trust it."
)
# Loaded instead of a copy on the network where 3Dmol.js has not been published.
_NOTHING = "data:text/javascript,"

_published: tuple[str, int] | None = None


@cache
def library() -> str:
    """A script element that defines ``$3Dmol`` and the promise py3Dmol's views wait for.

    Compressed, because every notebook with a view stores it: 0.2 MB in place of 0.5.
    """
    source = files("megafold.viz").joinpath("static/3Dmol-min.js").read_bytes()
    packed = base64.b64encode(gzip.compress(source, mtime=0)).decode("ascii")
    return f"<script>{_LOAD % packed}</script>"


# The function hides module loaders, which some exported pages carry and which would swallow
# the library.
_LOAD = """if (typeof $3Dmolpromise === 'undefined') window.$3Dmolpromise = (async () => {
  const packed = Uint8Array.from(atob('%s'), (c) => c.charCodeAt(0));
  const stream = new Blob([packed]).stream().pipeThrough(new DecompressionStream('gzip'));
  const source = await new Response(stream).text();
  new Function('exports', 'module', 'define', source).call(window);
})();"""


def publish_library() -> None:
    """Put 3Dmol.js into this notebook, once; again where the cell that held it runs again."""
    global _published
    shell = get_ipython()
    parent = shell.get_parent() if hasattr(shell, "get_parent") else {}
    cell = parent.get("metadata", {}).get("cellId", "")
    count = shell.execution_count if shell else 0
    again = _published is not None and cell == _published[0] != "" and count != _published[1]
    if _published is None or again:
        display(HTML(library()))
        _published = (cell, count)


def new_view(width: int, height: int) -> py3Dmol.view:
    """An empty view that asks nothing of the network."""
    return py3Dmol.view(width=width, height=height, js=_NOTHING)


def view_html(view: py3Dmol.view, legend: str = "", *, hides_still: bool = False) -> str:
    """The view as HTML, to follow ``library()`` somewhere on the same page.

    Args:
        view: what to draw.
        legend: HTML to stand above it.
        hides_still: a still stands in the output just before; hide it once the view is drawn.
    """
    html = re.sub(r"<p id=.*?</p>", f"<p>{_NOTE}</p>", view.write_html(), count=1, flags=re.S)
    above = f'<div id="legend_{view.uniqueid}">{legend}</div>'
    return f"{above}{html}<script>{_started(view.uniqueid, hides_still)}</script>"


def update_html(view: py3Dmol.view, legend: str, shown: py3Dmol.view) -> str:
    """Script that clears the view ``shown`` on the page and draws what ``view`` holds in it.

    The camera stays where the reader put it.
    """
    name = f"viewer_{shown.uniqueid}"
    commands = view.updatejs.replace("viewer_UNIQUEID", name)
    text = json.dumps(legend).replace("</", "<\\/")
    return (
        "<script>$3Dmolpromise.then(function () {"
        f"if (typeof {name} === 'undefined') return; {name}.removeAllModels();\n"
        f"{commands}\n{name}.render();"
        f"document.getElementById('legend_{shown.uniqueid}').innerHTML = {text}; }});</script>"
    )


def page(view: py3Dmol.view) -> str:
    """A whole web page that shows only this view; works offline."""
    body = f"{library()}{view_html(view)}"
    return f'<!doctype html><meta charset="utf-8"><body style="margin:0">{body}</body>'


def _started(uniqueid: str, hides_still: bool) -> str:
    """Script that takes away what stands in for the view once the view is there."""
    hide = (
        "var here = box.closest('.jp-OutputArea-child');"
        "var still = here && here.previousElementSibling;"
        "if (still && still.querySelector('img')) still.style.display = 'none';"
    )
    return (
        "$3Dmolpromise.then(function () { if (typeof $3Dmol === 'undefined') return;"
        f"var box = document.getElementById('3dmolviewer_{uniqueid}'); if (!box) return;"
        "var note = box.querySelector('p'); if (note) note.remove();"
        f"{hide if hides_still else ''}"
        "});"
    )

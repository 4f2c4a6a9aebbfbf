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
# In place of a copy on the network, where 3Dmol.js has not been published: it never loads, and
# the view goes on waiting for the library.
_NOTHING = "about:invalid"

_published: tuple[str, int] | None = None


@cache
def library() -> str:
    """A script element that defines ``$3Dmol`` and the promise py3Dmol's views wait for.

    Compressed, because every notebook with a view stores it: 0.2 MB in place of 0.5.
    """
    source = files("megafold.viz").joinpath("static/3Dmol-min.js").read_bytes()
    packed = base64.b64encode(gzip.compress(source, mtime=0)).decode("ascii")
    return _script(_LOAD % packed)


# The function hides module loaders, which some exported pages carry and which would swallow
# the library.
_LOAD = """window.$3Dmolloading = window.$3Dmolloading || (async () => {
  const packed = Uint8Array.from(atob('%s'), (c) => c.charCodeAt(0));
  const stream = new Blob([packed]).stream().pipeThrough(new DecompressionStream('gzip'));
  const source = await new Response(stream).text();
  new Function('exports', 'module', 'define', source).call(window);
})();
window.$3Dmolpromise = window.$3Dmolloading;"""


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


def legend_html(view: py3Dmol.view, legend: str) -> str:
    """What stands above the view; ``update_html`` finds it again. After :func:`view_html`."""
    return f'<div id="legend_{view.uniqueid}">{legend}</div>'


def view_html(view: py3Dmol.view, *, hides_still: bool = False) -> str:
    """The view as HTML, to follow ``library()`` somewhere on the same page.

    Until the library is there, the view is a note of one line, not an empty box.

    Args:
        view: what to draw.
        hides_still: a still stands in the output just before; hide it once the view is drawn.
    """
    html = view.write_html()
    match = _CONTAINER.match(html)
    if match is None:
        raise RuntimeError(f"py3Dmol's HTML begins otherwise than expected: {html[:200]}")
    box, height = match["box"], match["height"]
    opening = f'<div id="{box}" style="position: relative; width: {match["width"]}">'
    scripts = _script(_OPEN % (box, height, "true" if hides_still else "false"))
    return f"{opening}<p>{_NOTE}</p></div>{scripts}{html[match.end() :]}"


def update_html(view: py3Dmol.view, legend: str, shown: py3Dmol.view) -> str:
    """Script that clears the view ``shown`` on the page and draws what ``view`` holds in it.

    The camera stays where the reader put it.
    """
    name = f"viewer_{shown.uniqueid}"
    commands = view.updatejs.replace("viewer_UNIQUEID", name)
    text = json.dumps(legend).replace("</", "<\\/")
    return _script(
        "$3Dmolpromise.then(function () {"
        f"if (typeof {name} === 'undefined') return; {name}.removeAllModels();\n"
        f"{commands}\n{name}.render();"
        f"document.getElementById('legend_{shown.uniqueid}').innerHTML = {text}; }});"
    )


def page(view: py3Dmol.view) -> str:
    """A whole web page that shows only this view; works offline."""
    body = f"{library()}{view_html(view)}"
    return f'<!doctype html><meta charset="utf-8"><body style="margin:0">{body}</body>'


def _script(code: str) -> str:
    return f"<script>{code}</script>"


# The container that py3Dmol writes, with its warning in a paragraph.
_CONTAINER = re.compile(
    r'<div id="(?P<box>\w+)"\s+style="position: relative; width: (?P<width>\w+); '
    r'height: (?P<height>\w+);">\s*<p .*?</p>\s*</div>',
    re.DOTALL,
)
# Runs before py3Dmol's script: makes room for the view and takes away what stands in for it.
_OPEN = """if (typeof $3Dmolpromise !== 'undefined') $3Dmolpromise.then(function () {
  var box = document.getElementById('%s');
  if (!box) return;
  box.style.height = '%s';
  box.replaceChildren();
  var here = box.closest('.jp-OutputArea-child'), still = here && here.previousElementSibling;
  if (%s && still && still.querySelector('img')) still.style.display = 'none';
});"""

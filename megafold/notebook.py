"""What a notebook needs beyond the library: start-up, progress, source, saved figures.

A notebook begins with::

    from megafold import notebook

    notebook.setup()
"""

from __future__ import annotations

import inspect
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import fields
from importlib import metadata
from pathlib import Path
from typing import Any, TypeVar

import plotly.graph_objects as go
import plotly.io as pio
from IPython import get_ipython
from IPython.display import Image, Markdown, display
from tqdm.auto import tqdm

import megafold
from megafold.atomic import atomic_write
from megafold.viz import browser, index, theme
from megafold.viz.renderer import NotebookRenderer
from megafold.viz.session import headless
from megafold.viz.structures import StructureView

__all__ = [
    "figures_folder",
    "headless",
    "outputs_folder",
    "progress",
    "save",
    "save_still",
    "setup",
    "show_source",
    "table",
]

T = TypeVar("T")


def setup() -> None:
    """Prepare figures and say in one line what this notebook runs on.

    Sets Plotly's template and renderer: interactive in JupyterLab, with a PNG beside it where
    a browser is found, so that exported pages show it too. Nothing is fetched from the network.
    """
    theme.install()
    pio.renderers["megafold"] = NotebookRenderer()
    pio.renderers.default = "megafold"
    parts = [
        f"MegaFold {megafold.__version__}",
        _device(),
        f"torch {_version('torch')}",
        f"triton {_version('triton')}",
        f"operators {_operators()}",
    ]
    if browser.find_browser() is None:
        parts.append("no browser: figures without PNG and SVG")
    print(" · ".join(parts))


def progress(iterable: Iterable[T], total: int | None = None, desc: str = "") -> Iterator[T]:
    """``iterable`` with a progress bar; silent when headless.

    Args:
        iterable: what to go through.
        total: number of items, where ``iterable`` does not know it.
        desc: a word or two before the bar.
    """
    return iter(tqdm(iterable, total=total, desc=desc, leave=False, disable=headless()))


def show_source(function: Callable[..., Any]) -> None:
    """Show the shipped source of a function, a class or a Triton kernel, with file and line.

    Raises:
        TypeError: ``function`` has no Python source (built in, or written in C).
    """
    # A Triton kernel, a compiled or a decorated function: the one written down is inside.
    plain = inspect.unwrap(function)
    while not (inspect.isroutine(plain) or inspect.isclass(plain)) and hasattr(plain, "fn"):
        plain = plain.fn
    try:
        lines, first = inspect.getsourcelines(plain)
        file = Path(inspect.getsourcefile(plain) or "")
    except (TypeError, OSError) as error:
        raise TypeError(f"{function!r} has no Python source to show") from error
    source = inspect.cleandoc("\n" + "".join(lines)).rstrip()
    display(Markdown(f"`{_short(file)}:{first}`\n\n```python\n{source}\n```"))


def table(rows: Iterable[Any], columns: Sequence[str] | None = None) -> None:
    """Display rows (frozen dataclasses or mappings) as a table.

    Args:
        rows: at least one; all of one kind.
        columns: which fields, in which order; all of them if left out.

    Raises:
        ValueError: there is no row.
    """
    dicts = [dict(row) if isinstance(row, Mapping) else _fields(row) for row in rows]
    if not dicts:
        raise ValueError("a table needs at least one row")
    names = list(dicts[0]) if columns is None else list(columns)
    lines = ["| " + " | ".join(name.replace("_", " ") for name in names) + " |"]
    lines.append("|" + "|".join(_alignment(dicts[0][name]) for name in names) + "|")
    lines += ["| " + " | ".join(_cell(row[name]) for name in names) + " |" for row in dicts]
    display(Markdown("\n".join(lines)))


def save(figure: go.Figure, name: str) -> None:
    """Display a figure and write it as ``name.json``, ``name.svg`` and ``name.png``.

    Into ``$MEGAFOLD_FIGURES``, else into ``figures/`` of the checkout, else into ``figures/``
    here; the folder's index page is kept current. SVG and PNG need a browser: what could not be
    written is said. A figure that has not changed is not written again.

    Raises:
        ValueError: ``name`` is not lower case letters, digits and underscores.
    """
    if not re.fullmatch(r"[a-z0-9_]+", name):
        raise ValueError(f"a figure's name is lower case letters, digits, _; not {name!r}")
    written = index.write_figure(figure, name, figures_folder())
    if get_ipython() is not None:  # a plain script has nowhere to show it
        pio.show(figure)
    print(written)


def save_still(view: StructureView, name: str, *, live: bool = True) -> None:
    """Display a structure view and write its still as ``name.png`` beside the figures.

    Without a browser there is no still, and that is said.

    Args:
        live: show the view, which can be turned; else the still, a third as large.
    """
    if live:
        display(view)
    if browser.find_browser() is None:
        print(f"{name}.png not written: no browser was found")
        return
    path, still = figures_folder() / f"{name}.png", view.still()
    if not live:
        display(Image(still))
    atomic_write(path, still)
    print(f"saved {path.name}")


def figures_folder() -> Path:
    """Where ``save`` writes."""
    chosen = os.environ.get("MEGAFOLD_FIGURES")
    if chosen:
        return Path(chosen)
    return _root() / "figures"


def outputs_folder(name: str) -> Path:
    """Where a notebook leaves what it makes (models, predictions): ``outputs/name``.

    In the checkout, where git ignores it, else here. The folder is made.
    """
    folder = _root() / "outputs" / name
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _root() -> Path:
    checkout = Path(megafold.__file__).resolve().parents[1]
    return checkout if (checkout / "pyproject.toml").exists() else Path.cwd()


def _fields(row: Any) -> dict[str, Any]:
    return {field.name: getattr(row, field.name) for field in fields(row)}


def _alignment(value: object) -> str:
    return "---:" if isinstance(value, int | float) else "---"


def _cell(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    text = f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)
    return text.replace("|", "\\|")


def _short(file: Path) -> str:
    """The path from the package on, so that a stored notebook names no machine."""
    file, package = file.resolve(), Path(megafold.__file__).resolve().parent
    if not file.is_relative_to(package):
        return file.name
    return file.relative_to(package.parent).as_posix()


def _device() -> str:
    import torch

    device = megafold.device()
    if device.type == "cpu":
        return f"CPU, {torch.get_num_threads()} threads"
    return torch.cuda.get_device_name(device)


def _operators() -> str:
    """The operator backend in force, and what it comes to on this device."""
    import torch

    from megafold.ops import backend, dispatch

    probe = torch.empty(0, device=megafold.device())
    return f"{backend()} ({dispatch.choose('evo_attention', probe).implementation})"


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"

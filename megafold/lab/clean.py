"""What an executed notebook keeps when it is stored, and the errors its widgets hide."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from nbformat import NotebookNode
from nbformat.v4 import new_output

WIDGET_STATE = "application/vnd.jupyter.widget-state+json"
WIDGET_VIEW = "application/vnd.jupyter.widget-view+json"
OUTPUT_MODEL = "OutputModel"

# A widget without its kernel is an empty box, so what is stored says how to get it back.
WIDGET_NOTE = "<p><em>Interactive: run this notebook to use the controls.</em></p>"


def widget_errors(notebook: NotebookNode) -> list[NotebookNode]:
    """Errors raised inside ``ipywidgets.Output``, which execution itself lets pass.

    Args:
        notebook: as executed, its widget state still in it.

    Returns:
        Outputs of type ``error`` (``ename``, ``evalue``, ``traceback``), in the state's order.
    """
    return [
        output
        for model in _widget_models(notebook).values()
        if model["model_name"] == OUTPUT_MODEL
        for output in model["state"].get("outputs", ())
        if output["output_type"] == "error"
    ]


def clean(notebook: NotebookNode) -> None:
    """Reduce an executed notebook, in place, to what is worth storing.

    Widget state, timestamps and versions go, so that executing twice gives the same file
    where the outputs are the same. In place of a widget stands a note, followed by what its
    ``Output`` areas showed.
    """
    models = _widget_models(notebook)
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)
        cell.metadata.pop("papermill", None)
        if cell.cell_type == "code":
            cell.outputs = [kept for output in cell.outputs for kept in _freeze(output, models)]
    kernel = {"display_name": "Python 3 (ipykernel)", "language": "python", "name": "python3"}
    language = {"name": "python", "pygments_lexer": "ipython3", "file_extension": ".py"}
    for key in ("widgets", "papermill", "signature"):
        notebook.metadata.pop(key, None)
    notebook.metadata.update(kernelspec=kernel, language_info=language)


def _freeze(output: NotebookNode, models: dict[str, Any]) -> Iterator[NotebookNode]:
    """The outputs that stand for ``output`` once the widgets are gone: itself, for most."""
    view = output.get("data", {}).pop(WIDGET_VIEW, None)
    if view is None:
        yield output
        return
    # text/plain of a widget is its repr, which tells a reader nothing.
    still = {mime: data for mime, data in output.data.items() if mime != "text/plain"}
    data = still or {"text/html": WIDGET_NOTE, "text/plain": "Interactive: run to use."}
    yield new_output("display_data", data)
    for shown in _shown_inside(view["model_id"], models):
        yield from _freeze(shown, models)


def _shown_inside(model_id: str, models: dict[str, Any]) -> Iterator[NotebookNode]:
    """Outputs of every ``Output`` area in the tree of widgets below ``model_id``."""
    model = models.get(model_id)
    if model is None:
        return
    state = model["state"]
    if model["model_name"] == OUTPUT_MODEL:
        yield from (NotebookNode(output) for output in state.get("outputs", ()))
    for child in state.get("children", ()):
        yield from _shown_inside(child.removeprefix("IPY_MODEL_"), models)


def _widget_models(notebook: NotebookNode) -> dict[str, Any]:
    return notebook.metadata.get("widgets", {}).get(WIDGET_STATE, {}).get("state", {})

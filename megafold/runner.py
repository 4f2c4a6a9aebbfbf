"""Execute the notebooks, one fresh kernel each, and keep what they show.

``megafold notebooks run`` is the command, ``run`` the function behind it. A failing notebook is
named with its cell and error; the others still run.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import signal
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from megafold.atomic import atomic_write
from megafold.lab.progress import Line

if TYPE_CHECKING:
    from nbclient import NotebookClient
    from nbformat import NotebookNode

CHECKOUT = Path(__file__).resolve().parents[1]
FOLDER = CHECKOUT / "notebooks"
CELL_TIMEOUT = 900  # seconds for one cell


@dataclass(frozen=True)
class Failure:
    """One error of one notebook."""

    where: str  # "cell 4 of 11" or "a widget's output area"
    error: str  # "ValueError: what it said"
    traceback: str  # without colours


@dataclass(frozen=True)
class Run:
    """What became of one notebook."""

    path: Path
    notebook: NotebookNode  # executed and cleaned; up to the failing cell where one failed
    seconds: float
    cells: int  # code cells it has
    failures: tuple[Failure, ...]

    @property
    def name(self) -> str:
        """File name without its ending."""
        return self.path.stem

    @property
    def outcome(self) -> str:
        """One phrase for a table."""
        if self.failures:
            return f"FAILED in {self.failures[0].where}: {self.failures[0].error}"
        return f"{self.cells} cells in {self.seconds:.0f} s"


def find(names: Sequence[str] = (), folder: Path | None = None) -> list[Path]:
    """The notebooks of a folder in order, or those named: ``03`` or ``03_layer_norm_linear``.

    Raises:
        FileNotFoundError: the folder has no notebooks, or none of a name; says which there are.
    """
    folder = folder or FOLDER
    known = sorted(folder.glob("[0-9][0-9]_*.ipynb"))
    if not known:
        raise FileNotFoundError(f"no notebooks in {folder}: run this from a checkout of MegaFold")
    chosen = []
    for name in names:
        stem = Path(name).name.removesuffix(".ipynb")
        matches = [path for path in known if path.stem == stem or path.stem.split("_")[0] == stem]
        if not matches:
            there_are = ", ".join(path.stem for path in known)
            raise FileNotFoundError(f"no notebook {name!r}; there are: {there_are}")
        chosen += matches
    return sorted(set(chosen)) if names else known


def execute(
    path: Path, *, figures: Path | None = None, timeout: int = CELL_TIMEOUT, label: str = ""
) -> Run:
    """Execute one notebook in a fresh kernel of this Python, in the notebook's own folder.

    Args:
        path: the notebook; the file is not changed.
        figures: where ``notebook.save`` writes; None leaves ``$MEGAFOLD_FIGURES`` as it is.
        timeout: seconds allowed for one cell.
        label: what the progress line begins with; the notebook's name if empty.

    Returns:
        The run, with its failures: an error in a cell, or inside an ``ipywidgets.Output``.
    """
    import nbformat
    from nbclient.exceptions import CellControlSignal

    from megafold.lab.clean import clean, widget_errors
    from megafold.lab.client import notebook_client

    notebook = nbformat.read(path, as_version=4)
    code = [i for i, cell in enumerate(notebook.cells) if _is_run(cell)]
    for i in code:
        notebook.cells[i].outputs = []
        notebook.cells[i].execution_count = None
    at = "before the first cell"

    def on_cell_start(cell: NotebookNode, cell_index: int) -> None:
        nonlocal at
        interrupt.check()
        if _is_run(cell):
            at = f"cell {code.index(cell_index) + 1} of {len(code)}"
            line.update(at)

    client = notebook_client(notebook, path.parent, timeout)
    client.on_cell_start = on_cell_start
    interrupt = _Interrupt(client)
    # Nobody watches, also where the terminal is VS Code's: no progress bars in what is stored.
    environment = {**os.environ, "MEGAFOLD_HEADLESS": "1"}
    # PyTorch's profiler warns of memory older than itself, which is not what we count.
    environment.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    if figures is not None:
        environment["MEGAFOLD_FIGURES"] = str(figures.resolve())
    failures: list[Failure] = []
    with Line(label or path.stem) as line:
        try:
            client.execute(env=environment)
            interrupt.check()
        except (CellControlSignal, RuntimeError, asyncio.CancelledError) as error:
            if interrupt.seen:
                raise KeyboardInterrupt from None
            if isinstance(error, asyncio.CancelledError):  # by whoever runs this in a loop
                raise
            client.set_widgets_metadata()
            failures.append(_failure(error, at))
        failures += [_widget_failure(error) for error in widget_errors(notebook)]
        clean(notebook)
        run = Run(path, notebook, line.seconds, len(code), tuple(failures))
        line.close("FAILED in " + failures[0].where if failures else f"{len(code)} cells")
    return run


def run(
    notebooks: Sequence[Path],
    *,
    out: Path | None = None,
    in_place: bool = False,
    timeout: int = CELL_TIMEOUT,
) -> list[Run]:
    """Execute notebooks in the order given.

    Args:
        notebooks: their paths.
        out: folder for ``NAME.html``, ``index.html`` and ``figures/``; None writes no pages.
        in_place: store the outputs in the notebook itself. A notebook that fails is left as
            it was.
        timeout: seconds allowed for one cell.
    """
    from megafold.lab.page import title

    figures = None if out is None else out / "figures"
    if figures is not None:
        figures.mkdir(parents=True, exist_ok=True)
    runs: list[Run] = []
    for i, path in enumerate(notebooks):
        label = f"[{i + 1:2d}/{len(notebooks)}] {path.stem:28s}"
        done = execute(path, figures=figures, timeout=timeout, label=label)
        runs.append(done)
        for failure in done.failures:
            print(f"\n{path.name}, {failure.where}: {failure.error}\n{failure.traceback}\n")
        if out is not None:
            _write_page(done, notebooks, out)
        if in_place and not done.failures:
            atomic_write(path, _serialised(done.notebook).encode())
    if out is not None:
        from megafold.lab.page import index_page

        rows = [(done.name, title(done.notebook, done.name), done.outcome) for done in runs]
        drawn = [str(picture.relative_to(out)) for picture in sorted(figures.glob("*.png"))]
        atomic_write(out / "index.html", index_page(rows, drawn).encode())
    return runs


class _Interrupt:
    """Ctrl-C, or a request to end, while a notebook runs.

    nbclient would shut the kernel down, and we would take that for a failure and go on.
    """

    def __init__(self, client: NotebookClient) -> None:
        self.seen = False
        self._client = client
        self._task: asyncio.Task | None = None
        client.on_notebook_start = self._listen

    def stop(self) -> None:
        """End the cell that runs and the kernel; a second call changes nothing."""
        if not self.seen and self._task is not None:
            self.seen = True
            self._client.shutdown_kernel = "immediate"
            self._task.cancel()

    def check(self) -> None:
        """Raise what cancelling raises, for it may have been lost on the way.

        ``asyncio.wait_for`` takes no notice of it once what it waits for is done, and nbclient
        waits so for a cell's last output.
        """
        if self.seen:
            raise asyncio.CancelledError

    def _listen(self, notebook: NotebookNode) -> None:
        loop, self._task = asyncio.get_running_loop(), asyncio.current_task()
        with contextlib.suppress(RuntimeError):  # outside the main thread there are no signals
            for number in (signal.SIGINT, signal.SIGTERM):
                loop.add_signal_handler(number, self.stop)


def _is_run(cell: NotebookNode) -> bool:
    return cell.cell_type == "code" and bool(cell.source.strip())


def _failure(error: Exception, where: str) -> Failure:
    from nbclient.exceptions import CellExecutionError, CellTimeoutError
    from nbconvert.filters import strip_ansi

    if isinstance(error, CellExecutionError):
        said = f"{error.ename}: {strip_ansi(error.evalue)}"
        return Failure(where, said, strip_ansi(error.traceback))
    if isinstance(error, CellTimeoutError):
        return Failure(where, "TimeoutError: the cell took too long", str(error).strip())
    return Failure(where, f"{type(error).__name__}: {error}", "")


def _widget_failure(output: NotebookNode) -> Failure:
    from nbconvert.filters import strip_ansi

    said = f"{output['ename']}: {strip_ansi(output['evalue'])}"
    return Failure("a widget's output area", said, strip_ansi("\n".join(output["traceback"])))


def _write_page(done: Run, notebooks: Sequence[Path], out: Path) -> None:
    from megafold.lab.page import notebook_page

    names = [path.stem for path in notebooks]
    at = names.index(done.name)
    before = names[at - 1] if at > 0 else None
    after = names[at + 1] if at + 1 < len(names) else None
    page = notebook_page(done.notebook, done.name, done.path.parent, before=before, after=after)
    atomic_write(out / f"{done.name}.html", page.encode())


def _serialised(notebook: NotebookNode) -> str:
    import nbformat

    return nbformat.writes(notebook) + "\n"


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    """Register ``megafold notebooks``."""
    group = subparsers.add_parser("notebooks", help="execute the notebooks")
    commands = group.add_subparsers(required=True, metavar="COMMAND")
    command = commands.add_parser(
        "run",
        help="execute notebooks in order and write them as web pages",
        description="Execute notebooks in order, each in a fresh kernel. A failure is reported "
        "with its cell; the rest still run, and the exit status is 1.",
    )
    command.add_argument(
        "names", nargs="*", metavar="NAME", help="03 or 03_layer_norm_linear; all when left out"
    )
    target = command.add_mutually_exclusive_group()
    target.add_argument(
        "--out",
        type=Path,
        default=Path("outputs/notebooks"),
        metavar="DIR",
        help="folder for the pages and figures (default: %(default)s)",
    )
    target.add_argument(
        "--in-place", action="store_true", help="store the outputs in the notebooks instead"
    )
    command.set_defaults(func=_command)


def _command(arguments: argparse.Namespace) -> int:
    try:
        paths = find(arguments.names)
    except FileNotFoundError as error:
        print(f"megafold notebooks run: {error}", file=sys.stderr)
        return 2
    out = None if arguments.in_place else arguments.out
    try:
        runs = run(paths, out=out, in_place=arguments.in_place)
    except KeyboardInterrupt:
        print("Stopped.", file=sys.stderr)
        return 130
    failed = [done for done in runs if done.failures]
    print(f"\n{len(runs) - len(failed)} of {len(runs)} notebooks ran without an error.")
    for done in failed:
        print(f"  {done.name}: {done.outcome}")
    if out is not None:
        print(f"Pages:   {out / 'index.html'}\nFigures: {out / 'figures'}")
    else:
        print(
            f"Stored in {FOLDER.name}/." + (" Failed ones were left as they were." * bool(failed))
        )
    return 1 if failed else 0

"""Imports run downwards only, and each part loads no more than it needs."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import megafold

PACKAGE = Path(megafold.__file__).parent

# What each part may import of the others (itself always). Everything else is refused.
MAY_IMPORT = {
    "ops": set(),
    "compat": {"ops"},
    "geometry": set(),
    "atomic": set(),
    "model": {"ops", "geometry", "atomic"},
    "data": {"atomic"},
    "metrics": {"geometry"},
    "predict": {"model", "data", "atomic"},
    "train": {"ops", "model", "data", "metrics", "geometry", "atomic"},
    "bench": {"ops", "model", "data", "metrics", "geometry", "atomic", "train"},
    "viz": {"ops", "model", "data", "metrics", "geometry", "atomic", "bench", "train"},
}

# What `import megafold.X` may not load, directly or through others.
JUPYTER = ("IPython", "ipykernel", "ipywidgets", "jupyterlab", "nbclient", "nbconvert", "notebook")
FIGURES = ("plotly", "py3Dmol", "kaleido")
BIOLOGY = ("Bio", "biotite", "rdkit", "pyhmmer")
MUST_NOT_LOAD = {
    "megafold": (*JUPYTER, *FIGURES, *BIOLOGY, "torch", "triton"),
    "megafold.ops": (
        *JUPYTER, *FIGURES, *BIOLOGY, "megafold.model", "megafold.data", "megafold.bench",
    ),
    "megafold.compat": (
        *JUPYTER, *FIGURES, *BIOLOGY, "megafold.model", "megafold.data", "megafold.bench",
    ),
    "megafold.model": (*JUPYTER, *FIGURES, *BIOLOGY, "megafold.data", "megafold.train"),
    "megafold.metrics": (*JUPYTER, *FIGURES, *BIOLOGY, "megafold.model", "megafold.train"),
    "megafold.data": (*JUPYTER, *FIGURES, "megafold.model", "megafold.train", "megafold.viz"),
    "megafold.predict": (
        *JUPYTER, *FIGURES, "megafold.train", "megafold.viz", "megafold.bench",
    ),
    "megafold.train": (*JUPYTER, *FIGURES, "megafold.viz", "megafold.bench"),
    "megafold.bench": (*JUPYTER, *FIGURES, *BIOLOGY, "megafold.viz"),
    "megafold.cli": (*JUPYTER, *FIGURES, *BIOLOGY, "torch"),
}  # fmt: skip


def modules_of(part: str) -> list[Path]:
    folder = PACKAGE / part
    return sorted(folder.rglob("*.py")) if folder.is_dir() else [PACKAGE / f"{part}.py"]


def imports_at_run_time(path: Path) -> Iterator[tuple[int, str]]:
    """Line and full name of everything a module imports, but for ``if TYPE_CHECKING``."""
    pending: list[ast.AST] = [ast.parse(path.read_text(encoding="utf-8"))]
    while pending:
        node = pending.pop()
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            pending += node.orelse
            continue
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: relative import"
            yield from ((node.lineno, f"{node.module}.{alias.name}") for alias in node.names)
        pending += ast.iter_child_nodes(node)


def part_of(name: str) -> str | None:
    """``"ops"`` for ``"megafold.ops.use"``; None for another package, or a name in ours."""
    package, _, rest = name.partition(".")
    part = rest.split(".")[0]
    is_part = (PACKAGE / part / "__init__.py").exists() or (PACKAGE / f"{part}.py").exists()
    return part if package == "megafold" and part and is_part else None


@pytest.mark.parametrize("part", sorted(MAY_IMPORT))
def test_part_imports_only_what_stands_below_it(part):
    allowed = MAY_IMPORT[part] | {part}
    wrong = [
        f"{path.relative_to(PACKAGE)}:{line} imports {name}"
        for path in modules_of(part)
        for line, name in imports_at_run_time(path)
        if (other := part_of(name)) and other not in allowed
    ]
    assert wrong == []


def test_every_part_has_a_rule():
    parts = {p.name for p in PACKAGE.iterdir() if (p / "__init__.py").exists()}
    free = {"lab"}  # the notebook runner, beside notebook.py, runner.py and cli.py on top
    assert parts - free <= set(MAY_IMPORT)


@pytest.mark.parametrize("module", sorted(MUST_NOT_LOAD))
def test_import_loads_no_more_than_it_needs(module):
    code = f"import sys, {module}; print(*sys.modules, sep='\\n')"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    loaded = set(run.stdout.split())
    assert sorted(loaded.intersection(MUST_NOT_LOAD[module])) == []


def test_operators_work_where_only_torch_and_triton_are_installed():
    """Every other package that is not part of torch's needs is made impossible to import."""
    code = f"""
import sys
for name in {[*JUPYTER, *FIGURES, *BIOLOGY, "safetensors", "joblib", "tqdm"]!r}:
    sys.modules[name] = None
import torch
from megafold import ops
x, w = torch.randn(2, 4), torch.randn(8, 4)
print(ops.transition(x, None, None, w, w, torch.randn(4, 8)).shape)
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert "torch.Size([2, 4])" in run.stdout

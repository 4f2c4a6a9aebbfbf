"""What is shipped: the wheel, the versions, the dependencies, and that they agree."""

from __future__ import annotations

import ast
import re
import shutil
import subprocess
import sys
import tomllib
import venv
import zipfile
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import megafold

CHECKOUT = Path(__file__).resolve().parents[1]

# What conda-forge calls a package that has another name in pyproject.toml.
CONDA_NAMES = {
    "torch": "pytorch",
    "kaleido": "python-kaleido",
    "playwright": "playwright-python",
    "jupyter-client": "jupyter_client",
    "lmdb": "python-lmdb",
}
# Installed from PyPI; in the environment's pip section.
FROM_PIP = {"pyhmmer", "tmtools"}
# What a package is called when imported, where that is not its name.
IMPORT_NAMES = {"Bio": "biopython", "PIL": "pillow", "zmq": "pyzmq"}


def project() -> dict:
    return tomllib.loads((CHECKOUT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def requirements() -> dict[str, Requirement]:
    """Every dependency, core and extra, by canonical name."""
    extras = project()["optional-dependencies"]
    lines = [*project()["dependencies"], *(line for group in extras.values() for line in group)]
    parsed = [Requirement(line) for line in lines if not line.startswith("megafold[")]
    for one in parsed:
        same = [other for other in parsed if other.name == one.name]
        assert {str(other.specifier) for other in same} == {str(one.specifier)}, one.name
    return {canonicalize_name(one.name): one for one in parsed}


def environment() -> tuple[dict[str, str], dict[str, str]]:
    """environment.yml as package to range: those of conda, and those of pip."""
    listed = yaml.safe_load((CHECKOUT / "environment.yml").read_text(encoding="utf-8"))
    lines = listed["dependencies"]
    pip = next(line["pip"] for line in lines if isinstance(line, dict))

    def split(line: str) -> tuple[str, str]:
        name, _, version = line.partition(">=")
        return name, f">={version}" if version else ""

    conda = dict(split(line) for line in lines if isinstance(line, str))
    return conda, dict(split(line) for line in pip if not line.startswith("-e"))


def third_party_imports(package: Path) -> set[str]:
    """Top-level modules that the package imports, without Python's own and itself."""
    found = set()
    for path in package.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                found |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                found.add(node.module.split(".")[0])
    return found - set(sys.stdlib_module_names) - {"megafold"}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built offline from a clean copy of what git would carry."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    shutil.copytree(
        CHECKOUT / "megafold",
        source / "megafold",
        ignore=shutil.ignore_patterns("__pycache__", ".ipynb_checkpoints"),
    )
    shutil.copytree(
        CHECKOUT / "tests", source / "tests", ignore=shutil.ignore_patterns("__pycache__")
    )
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(CHECKOUT / name, source)
    pip = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-q"]
    subprocess.run([*pip, "-w", str(out), str(source)], check=True, stdin=subprocess.DEVNULL)
    (built,) = out.glob("*.whl")
    return built


def test_the_wheel_carries_the_package_and_its_data(wheel: Path) -> None:
    shipped = set(zipfile.ZipFile(wheel).namelist())
    package = CHECKOUT / "megafold"
    wanted = {
        str(path.relative_to(CHECKOUT))
        for ending in ("py", "js", "json", "html")
        for path in package.rglob(f"*.{ending}")
        if ".ipynb_checkpoints" not in path.parts
    }
    assert wanted - shipped == set()
    assert "megafold/viz/static/3Dmol-min.js" in shipped


def test_the_wheel_carries_the_licences_of_what_it_bundles(wheel: Path) -> None:
    shipped = zipfile.ZipFile(wheel).namelist()
    for library in (CHECKOUT / "megafold").glob("**/*.js"):
        folder = f"{library.parent.relative_to(CHECKOUT).as_posix()}/LICENSE"
        assert any(name.startswith(folder) for name in shipped), library


def test_the_wheel_carries_nothing_else(wheel: Path) -> None:
    tops = {name.split("/")[0] for name in zipfile.ZipFile(wheel).namelist()}
    assert tops == {"megafold", f"megafold-{megafold.__version__}.dist-info"}


def test_the_installed_wheel_imports_its_operators(wheel: Path, tmp_path: Path) -> None:
    venv.create(tmp_path / "venv", with_pip=False)
    python = tmp_path / "venv" / "bin" / "python"
    pip = [sys.executable, "-m", "pip", "--python", str(python), "install", "--no-deps", "-q"]
    subprocess.run([*pip, str(wheel)], check=True, stdin=subprocess.DEVNULL)
    # PyTorch comes from this environment: installing it again would take minutes. A path file
    # adds its folder but runs no other path file there, so the checkout stays out of sight.
    (site,) = (tmp_path / "venv").glob("lib/python*/site-packages")
    (site / "torch.pth").write_text(str(Path(yaml.__file__).parents[1]))
    code = "import megafold, megafold.ops; print(megafold.__file__, megafold.ops.transition)"
    run = subprocess.run([python, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert run.returncode == 0, run.stderr
    assert run.stdout.startswith(str(site))


def test_one_version_everywhere() -> None:
    citation = yaml.safe_load((CHECKOUT / "CITATION.cff").read_text(encoding="utf-8"))
    changelog = (CHECKOUT / "CHANGELOG.md").read_text(encoding="utf-8")
    newest = re.search(r"^## \[(\d[^\]]*)\]", changelog, flags=re.M)
    assert newest is not None
    versions = {project()["version"], megafold.__version__, citation["version"], newest[1]}
    assert len(versions) == 1


def test_conda_and_pip_get_the_same_dependencies() -> None:
    conda, pip = environment()
    expected = {
        name: str(one.specifier) for name, one in requirements().items() if name not in FROM_PIP
    }
    expected = {CONDA_NAMES.get(name, name): version for name, version in expected.items()}
    expected |= {"python": project()["requires-python"], "pip": ""}
    assert conda == expected
    assert pip == {name: str(requirements()[name].specifier) for name in FROM_PIP}


def test_every_dependency_is_pinned_to_a_version_in_its_range() -> None:
    lines = (CHECKOUT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = dict(line.split("==") for line in lines if line and not line.startswith("#"))
    pins = {canonicalize_name(name): version for name, version in pins.items()}
    wanted = requirements()
    assert pins.keys() == wanted.keys()
    outside = [name for name, one in wanted.items() if pins[name] not in one.specifier]
    assert outside == []


def test_everything_imported_is_declared() -> None:
    imported = third_party_imports(CHECKOUT / "megafold")
    names = {canonicalize_name(IMPORT_NAMES.get(module, module)) for module in imported}
    assert names - requirements().keys() == set()


def test_operators_and_model_need_the_core_only() -> None:
    core = {canonicalize_name(Requirement(line).name) for line in project()["dependencies"]}
    for part in ("ops", "model"):
        assert third_party_imports(CHECKOUT / "megafold" / part) <= core

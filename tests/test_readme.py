"""What the README tells a reader to type works, and what it points to is there."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

CHECKOUT = Path(__file__).resolve().parents[1]
README = (CHECKOUT / "README.md").read_text(encoding="utf-8")


FENCED = re.findall(r"^```(\w*)\n(.*?)^```$", README, flags=re.M | re.S)


def blocks(language: str) -> list[str]:
    """Code blocks of one language, in order."""
    return [text for name, text in FENCED if name == language]


COMMANDS = [line for block in blocks("bash") for line in block.splitlines() if line.strip()]


def run(command: list[str]) -> subprocess.CompletedProcess:
    """Run as a reader would, with the environment active, in the checkout."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path}
    environment.pop("TRITON_INTERPRET", None)
    return subprocess.run(
        command,
        cwd=CHECKOUT,
        env=environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
    )


def test_every_code_block_is_of_a_kind_that_is_tested() -> None:
    assert {language for language, _ in FENCED} == {"bash", "python", ""}
    assert len(blocks("")) == 1  # the tree


@pytest.mark.parametrize("snippet", blocks("python"), ids=lambda text: text.splitlines()[1])
def test_python_runs(snippet: str) -> None:
    done = run([sys.executable, "-c", snippet])
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("command", COMMANDS)
def test_command_works(command: str) -> None:
    match shlex.split(command):
        case ["make", target]:
            # Running it would run this test again. What the targets call is tested elsewhere:
            # the runner and the pages in notebooks/ and browser/, JupyterLab in browser/.
            done = run(["make", "--dry-run", target])
        case ["megafold", *arguments]:
            done = run(["megafold", *arguments])
        case ["conda", "env", "create", "-f", file]:
            # test_packaging.py holds the file equal to pyproject.toml.
            done = run(["test", "-f", file])
        case _:
            pytest.fail(f"the README has a command that no test knows: {command}")
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"


def test_every_make_target_is_explained() -> None:
    done = run(["make", "help"])
    listed = set(re.findall(r"^  make (\w+)", done.stdout, flags=re.M))
    makefile = (CHECKOUT / "Makefile").read_text(encoding="utf-8")
    assert listed == set(re.search(r"^\.PHONY: (.*)$", makefile, flags=re.M)[1].split())


def test_every_link_into_the_project_leads_somewhere() -> None:
    targets = re.findall(r"\]\((?!https?://)([^)#]+)", README)
    assert targets
    assert [target for target in targets if not (CHECKOUT / target).exists()] == []


def test_every_folder_of_the_tree_is_there() -> None:
    (tree,) = blocks("")
    folders = []
    for line in tree.splitlines():
        name = line.split()[0]
        folders.append(f"megafold/{name}" if line.startswith("  ") else name)
    assert [folder for folder in folders if not (CHECKOUT / folder).is_dir()] == []

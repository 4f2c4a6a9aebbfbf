"""Structures to draw, and a browser to draw them with."""

from __future__ import annotations

import os

import pytest

from megafold import data
from megafold.data import Structure
from megafold.viz import theme
from megafold.viz.browser import find_browser


@pytest.fixture(scope="session")
def peptide() -> Structure:
    """25 residues of protein, nothing else."""
    return data.read_structure(data.sample_path("1AS5"))


@pytest.fixture(scope="session")
def myoglobin() -> Structure:
    """154 residues of protein with a haem."""
    return data.read_structure(data.sample_path("102M"))


@pytest.fixture(scope="session")
def complex_with_dna() -> Structure:
    """Two strands of DNA, a protein and a sodium ion."""
    return data.read_structure(data.sample_path("1LCD"))


@pytest.fixture
def browser_path() -> str:
    """A browser. In continuous integration a missing one is a failure, elsewhere a skip."""
    path = find_browser()
    if path is None:
        message = "no browser found: install one (Debian: apt-get install chromium)"
        if os.environ.get("CI") == "true":
            pytest.fail(message)
        pytest.skip(message)
    return path


@pytest.fixture
def no_browser(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine on which no browser is found."""
    monkeypatch.delenv("BROWSER_PATH", raising=False)
    monkeypatch.setattr("megafold.viz.browser.shutil.which", lambda name: None)


@pytest.fixture(autouse=True)
def _theme() -> None:
    theme.install()

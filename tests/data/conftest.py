"""Samples and their stages, worked out once per test run."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import pytest

from megafold.data import (
    Features,
    Structure,
    example_features,
    read_structure,
    sample_path,
    samples,
)

SAMPLE_IDS = [sample.id for sample in samples()]

_structure = cache(lambda sample_id: read_structure(sample_path(sample_id)))
_features = cache(example_features)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A test with an argument ``any_sample`` runs on every bundled entry."""
    if "any_sample" in metafunc.fixturenames:
        metafunc.parametrize("any_sample", SAMPLE_IDS)


@pytest.fixture(scope="session")
def structure_of():
    """Sample id -> ``Structure``."""

    def get(sample_id: str) -> Structure:
        return _structure(sample_id)

    return get


@pytest.fixture(scope="session")
def features_of():
    """Sample id -> ``Features``."""

    def get(sample_id: str) -> Features:
        return _features(sample_id)

    return get


@pytest.fixture
def cif_text() -> str:
    """A small entry as text, to be broken."""
    import gzip

    return gzip.decompress(sample_path("1CRN").read_bytes()).decode()


@pytest.fixture
def water(cif_text: str) -> str:
    """An entry in good order that has one molecule of water and nothing else."""
    lines = cif_text.splitlines()
    first, *rest = [line for line in lines if line.startswith("ATOM")]
    fields = first.split()
    fields[0], fields[5], fields[8] = "HETATM", "HOH", "."
    kept = [" ".join(fields) if line == first else line for line in lines if line not in rest]
    return "\n".join(kept) + "\n"


@pytest.fixture(scope="session")
def pdb_text():
    """Sample id -> the entry in PDB format, as gemmi writes it."""
    import gemmi

    def get(sample_id: str) -> str:
        return gemmi.read_structure(str(sample_path(sample_id))).make_pdb_string()

    return get


@pytest.fixture
def write_cif(tmp_path: Path):
    """(name, text) -> path of a new file with that text."""

    def write(name: str, text: str) -> Path:
        path = tmp_path / name
        path.write_text(text)
        return path

    return write

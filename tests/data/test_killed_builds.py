"""A build that is killed: what it leaves is valid, and the next one finishes the rest."""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megafold.data import Cache, build_cache, examine_cache, sample_path

KILLS = 6  # moments, 3 seconds each; every sixth, of a build with two workers, 10 seconds
SEED = 20
# The index is written after every entry, so that a kill can come between and within the writes.
BUILD = (
    "import sys; from megafold.data import building; building._SAVE_EVERY = 0.0; "
    "building.build_cache(sys.argv[3], sys.argv[1], jobs=int(sys.argv[2]))"
)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six good structures and one that fails."""
    folder = tmp_path_factory.mktemp("inputs")
    for sample_id in ("1CRN", "1A8O", "1AS5", "102M", "1LCD", "1EMA"):
        shutil.copy(sample_path(sample_id), folder)
    (folder / "CUT.cif.gz").write_bytes(sample_path("1CRN").read_bytes()[:5000])
    return folder


@pytest.fixture(scope="module")
def undisturbed(inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("undisturbed") / "cache"
    build_cache(inputs, out)
    return out


def _files(folder: Path) -> dict[str, bytes]:
    """All that a cache consists of; not what a killed build was writing."""
    paths = [path for path in folder.rglob("*") if path.is_file() and path.suffix != ".tmp"]
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


def _kill_build(inputs: Path, out: Path, jobs: int, entries: int, delay: float) -> None:
    """Kill a build and its workers ``delay`` seconds after so many entries have appeared."""
    command = [sys.executable, "-c", BUILD, str(out), str(jobs), str(inputs)]
    build = subprocess.Popen(command, start_new_session=True)
    deadline = time.monotonic() + 60
    while not out.exists() or len(list(out.glob("entries/*.safetensors"))) < entries:
        assert build.poll() is None, "the build ended before it could be killed"
        assert time.monotonic() < deadline, "the build hangs"
        time.sleep(0.0005)
    time.sleep(delay)
    os.killpg(build.pid, signal.SIGKILL)
    build.wait()


@pytest.mark.parametrize("kill", range(KILLS))
def test_a_build_killed_at_any_moment_leaves_a_valid_cache(
    kill, inputs, undisturbed, tmp_path
) -> None:
    random_of_kill = random.Random(SEED + kill)
    entries, delay = random_of_kill.randrange(6), random_of_kill.uniform(0, 0.1)
    out, whole = tmp_path / "cache", _files(undisturbed)
    _kill_build(inputs, out, jobs=1 if kill % 6 else 2, entries=entries, delay=delay)

    if (out / "cache.json").exists():
        cache = Cache(out)
        written = _files(out / "entries") if entries else {}
        assert {name: whole[f"entries/{name}"] for name in written} == written
        assert len(written) >= entries
        for name in cache.names:
            assert f"{cache.index[name]['key']}.safetensors" in written
            cache.load(name)
        if cache.index:
            assert len(examine_cache(out)) == 7
    report = build_cache(inputs, out)
    assert (report.ok, report.failed, report.inputs) == (6, 1, 7)
    assert report.reused >= entries
    assert _files(out) == whole

"""A build that is killed: what it leaves is valid, and the next one finishes the rest."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from megafold.data import Cache, build_cache, examine_cache, sample_path

KILLS = 20  # moments; the first of a build with two workers
SEED = 20
ENTRIES = ("1CRN", "1A8O", "1AS5", "102M", "1LCD", "1EMA")
# A process that has everything imported and every component read, and forks for each build: so
# a build begins at once. Each line it is told names a cache and a number of jobs, and it answers
# with the number of the build's process, which leads a group of its own.
# The index is written after every entry, so that a kill can come between and within the writes.
SERVER = """
import os, sys
from megafold.data import building
building._SAVE_EVERY = 0.0
inputs, warm = sys.argv[1:]
building.build_cache(inputs, warm)
print("ready", flush=True)
for line in sys.stdin:
    out, jobs = line.rstrip("\\n").split("\\t")
    if (build := os.fork()) == 0:
        os.setsid()
        building.build_cache(inputs, out, jobs=int(jobs))
        os._exit(0)
    print(build, flush=True)
    _, status = os.waitpid(build, 0)
    print("killed" if os.WIFSIGNALED(status) else "ended", flush=True)
"""


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six good structures and one that fails."""
    folder = tmp_path_factory.mktemp("inputs")
    for sample_id in ENTRIES:
        shutil.copy(sample_path(sample_id), folder)
    (folder / "CUT.cif.gz").write_bytes(sample_path("1CRN").read_bytes()[:5000])
    return folder


@pytest.fixture(scope="module")
def undisturbed(inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("undisturbed") / "cache"
    build_cache(inputs, out)
    return out


@pytest.fixture(scope="module")
def server(inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[subprocess.Popen]:
    warm = tmp_path_factory.mktemp("warm") / "cache"
    command = [sys.executable, "-c", SERVER, str(inputs), str(warm)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, **pipes) as process:
        assert process.stdout.readline() == "ready\n"
        yield process
        process.stdin.close()


@pytest.fixture(scope="module")
def fates() -> list[str]:
    """What became of each build."""
    return []


def _content(folder: Path) -> dict[str, object]:
    """All that a cache consists of but for where it stands; not what was being written."""
    content: dict[str, object] = {
        path.name: path.read_bytes() for path in folder.glob("entries/*.safetensors")
    }
    for name in ("cache.json", "index.json"):
        if (folder / name).exists():
            content[name] = json.loads((folder / name).read_text())
    for record in content.get("index.json", {}).values():
        del record["folder"]
    return content


def _kill_build(server: subprocess.Popen, out: Path, jobs: int, entries: int, delay: float) -> None:
    """Kill a build and its workers ``delay`` seconds after so many entries have appeared."""
    server.stdin.write(f"{out}\t{jobs}\n")
    server.stdin.flush()
    build = int(server.stdout.readline())
    deadline = time.monotonic() + 60
    while not out.exists() or len(list(out.glob("entries/*.safetensors"))) < entries:
        assert time.monotonic() < deadline, "the build hangs"
        time.sleep(0.0005)
    time.sleep(delay)
    with suppress(ProcessLookupError):
        os.killpg(build, signal.SIGKILL)
    return server.stdout.readline().strip()


@pytest.mark.parametrize("kill", range(KILLS))
def test_a_build_killed_at_any_moment_leaves_a_valid_cache(
    kill, inputs, undisturbed, server, fates, tmp_path
) -> None:
    random_of_kill = random.Random(SEED + kill)
    entries, delay = random_of_kill.randrange(6), random_of_kill.uniform(0, 0.03)
    out, whole = tmp_path / "cache", _content(undisturbed)
    fate = _kill_build(server, out, jobs=1 if kill else 2, entries=entries, delay=delay)
    fates.append(fate)

    left = _content(out)
    written = {name for name in left if name.endswith(".safetensors")}
    if "cache.json" in left:
        cache = Cache(out)
        assert {name: whole[name] for name in written} == {name: left[name] for name in written}
        assert len(written) >= entries
        for name in cache.names:
            assert f"{cache.index[name]['key']}.safetensors" in written
            cache.verify(cache.index[name]["key"])
        if cache.index:
            assert len(examine_cache(out)) == 7
    report = build_cache(inputs, out)
    assert (report.ok, report.failed, report.inputs) == (6, 1, 7)
    assert report.reused >= entries
    assert _content(out) == whole


def test_nearly_all_of_these_builds_were_killed_before_their_end(fates) -> None:
    assert fates.count("killed") >= 0.8 * len(fates)

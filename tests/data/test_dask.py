"""The same call on a Dask cluster."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
from joblib import parallel_config

from megafold import cli
from megafold.data import Cache, build_cache, building, commands, examine_cache, sample_path


@pytest.fixture(scope="module")
def cluster():
    """A cluster of two worker processes on this machine."""
    import dask
    from distributed import Client, LocalCluster

    threads = os.environ.get("OMP_NUM_THREADS")
    # Dask holds its workers to one thread each by variables of *this* process's environment,
    # and leaves them there: everything that is started later would have one thread, too.
    with (
        dask.config.set({"distributed.nanny.pre-spawn-environ": {}}),
        LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=None) as cluster,
        Client(cluster),
    ):
        yield cluster
    assert os.environ.get("OMP_NUM_THREADS") == threads


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four good structures and one that fails."""
    folder = tmp_path_factory.mktemp("inputs")
    for sample_id in ("1CRN", "1A8O", "1AS5", "102M"):
        shutil.copy(sample_path(sample_id), folder)
    (folder / "CUT.cif.gz").write_bytes(sample_path("1CRN").read_bytes()[:5000])
    return folder


@pytest.fixture(scope="module")
def alone(inputs, tmp_path_factory: pytest.TempPathFactory) -> Cache:
    out = tmp_path_factory.mktemp("alone") / "cache"
    build_cache(inputs, out)
    return Cache(out)


def _entries(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (folder / "entries").iterdir()}


def test_workers_of_a_cluster_give_what_one_process_gives(
    cluster, inputs, alone, tmp_path, monkeypatch
) -> None:
    def here(*arguments) -> None:
        raise AssertionError("not on the cluster")

    monkeypatch.setattr(building, "_featurize", here)  # in this process only
    monkeypatch.chdir(tmp_path)  # where the workers are not
    with parallel_config("dask"):
        report = build_cache(os.path.relpath(inputs), "cache")
    assert (report.inputs, report.ok, report.failed) == (5, 4, 1)
    assert _entries(tmp_path / "cache") == _entries(alone.folder)
    assert [e.status for e in examine_cache("cache")] == ["ok"] * 4 + ["failed"]


def test_the_command_takes_the_address_of_a_cluster(cluster, inputs, alone, tmp_path, capsys):
    command = ["cache", "build", str(inputs), "--out", str(tmp_path / "cache")]
    assert cli.main([*command, "--dask", cluster.scheduler_address]) == 1
    assert "5 inputs = 4 ok (0 already there) + 1 failed" in capsys.readouterr().out
    assert _entries(tmp_path / "cache") == _entries(alone.folder)


def test_a_cluster_that_is_not_there_is_a_sentence(inputs, tmp_path, capsys, monkeypatch) -> None:
    monkeypatch.setattr(commands, "_DASK_TIMEOUT", 0.5)
    command = ["cache", "build", str(inputs), "--out", str(tmp_path / "cache")]
    assert cli.main([*command, "--dask", "tcp://127.0.0.1:9"]) == 2
    assert "no Dask scheduler at tcp://127.0.0.1:9" in capsys.readouterr().err

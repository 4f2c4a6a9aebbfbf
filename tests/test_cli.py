"""The command ``megafold``: what it prints, and its exit status."""

from __future__ import annotations

import shutil
import subprocess
import sys

import pytest

from megafold import cli
from megafold.data import sample_alignments, sample_path, samples


def test_samples_lists_every_bundled_entry(capsys) -> None:
    assert cli.main(["samples"]) == 0
    out = capsys.readouterr().out
    for sample in samples():
        assert f"{sample.id} " in out


def test_a_cache_is_built_and_examined(tmp_path, capsys) -> None:
    cache = str(tmp_path / "cache")
    alignments = str(sample_alignments("102M")["A"].parent)
    build = ["cache", "build", str(sample_path("102M")), "--msa", alignments, "--out", cache]
    assert cli.main(build) == 0
    assert "1 inputs = 1 ok (0 already there) + 0 failed" in capsys.readouterr().out
    assert cli.main(build) == 0
    assert "1 ok (1 already there)" in capsys.readouterr().out
    assert cli.main(["cache", "doctor", cache]) == 0
    out = capsys.readouterr().out
    assert "102M" in out
    assert "1 inputs = 1 ok + 0 failed + 0 excluded + 0 stale" in out


def test_building_goes_on_past_a_failure_and_exits_non_zero(tmp_path, capsys) -> None:
    folder = tmp_path / "structures"
    folder.mkdir()
    shutil.copy(sample_path("1CRN"), folder)
    (folder / "BAD.cif").write_text("nonsense")
    cache = str(tmp_path / "cache")
    assert cli.main(["cache", "build", str(folder), "--out", cache]) == 1
    out = capsys.readouterr().out
    assert "BAD: failed: " in out
    assert "2 inputs = 1 ok (0 already there) + 1 failed" in out
    assert cli.main(["cache", "doctor", cache]) == 1
    assert "2 inputs = 1 ok + 1 failed + 0 excluded + 0 stale" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "cause"),
    [
        (["cache", "build", "EMPTY", "--out", "CACHE"], "no structure file"),
        (["cache", "build", "SAMPLE", "--out", "EMPTY", "--msa", "gone"], "no such folder"),
        (["cache", "doctor", "EMPTY"], "not a feature cache"),
        (["fetch", "not-an-id", "--out", "EMPTY"], "is not a PDB id"),
    ],
)
def test_bad_arguments_are_one_sentence_on_stderr(arguments, cause, tmp_path, capsys) -> None:
    (tmp_path / "empty").mkdir()
    places = {
        "EMPTY": str(tmp_path / "empty"),
        "CACHE": str(tmp_path / "cache"),
        "SAMPLE": str(sample_path("1CRN")),
    }
    assert cli.main([places.get(a, a) for a in arguments]) != 0
    captured = capsys.readouterr()
    assert cause in captured.err
    assert captured.err.startswith("megafold: ")
    assert not captured.out


def test_fetch_without_a_network_stops_at_once(tmp_path, capsys, monkeypatch) -> None:
    from megafold.data import download

    monkeypatch.setattr(download.time, "sleep", lambda seconds: None)
    arguments = [
        "fetch",
        "1ubq",
        "1crn",
        "--out",
        str(tmp_path),
        "--base-url",
        "http://127.0.0.1:9",
    ]
    assert cli.main(arguments) == 2
    error = capsys.readouterr().err
    assert "1UBQ.cif.gz: cannot be reached" in error
    assert "1CRN" not in error


def test_help_loads_no_library() -> None:
    code = (
        "import sys\nfrom megafold import cli\n"
        "try:\n    cli.main(['--help'])\nexcept SystemExit:\n    pass\n"
        "print(sorted({'torch', 'biotite', 'rdkit', 'numpy'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"

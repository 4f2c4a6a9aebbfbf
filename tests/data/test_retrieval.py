"""Searches for whole structures: kept by content, interrupted and taken up again."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from megafold import cli
from megafold.data import Cache, DataError, build_cache, read_alignment, sample_path
from megafold.data import retrieval as retrieval_module
from megafold.data.retrieval import Databases, retrieve
from megafold.data.template_search import read_templates

CRAMBIN = "TTCCPSIVARSNFNVCRLPGTPEAICATYTGCIIIPGATCPGDYAN"
RELATIVE = CRAMBIN.replace("SNFNV", "SNYNV").replace("GTPEA", "GTSEA")


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path, Databases]:
    """Crambin, a conotoxin and a tRNA-like RNA; a database of each kind; 1CRN as a template."""
    structures, pdb, out = (tmp_path / name for name in ("structures", "pdb", "out"))
    structures.mkdir()
    pdb.mkdir()
    for name in ("1CRN", "1AS5", "4P5J"):
        (structures / f"{name}.cif.gz").write_bytes(sample_path(name).read_bytes())
    (pdb / "1crn.cif.gz").write_bytes(sample_path("1CRN").read_bytes())
    generator = np.random.default_rng(0)
    random = ["".join(generator.choice(list("ACDEFGHIKLMNPQRSTVWY"), 60)) for _ in range(30)]
    fasta = {
        "proteins": [("near OX=9", RELATIVE), *((f"r{i}", s) for i, s in enumerate(random))],
        "rna": [(f"n{i}", "".join(generator.choice(list("ACGU"), 200))) for i in range(20)],
        "templates": [("1crn_A mol:protein", f"AAA{CRAMBIN}AAA"[3:-3])],
    }
    for name, rows in fasta.items():
        text = "".join(f">{label}\n{sequence}\n" for label, sequence in rows)
        (tmp_path / f"{name}.fasta").write_text(text)
    databases = Databases(
        proteins=tmp_path / "proteins.fasta", rna=tmp_path / "rna.fasta",
        templates=tmp_path / "templates.fasta", structures=pdb,
    )  # fmt: skip
    return structures, out, databases


def test_every_protein_and_rna_is_searched_for(folders) -> None:
    structures, out, databases = folders
    report = retrieve(structures, out, databases)
    names = sorted(path.name for path in report.written)
    assert names == [
        "1AS5_A.a3m.gz", "1AS5_A.templates.npz", "1CRN_A.a3m.gz", "1CRN_A.templates.npz",
        "4P5J_A.a3m.gz",
    ]  # fmt: skip
    assert not report.failed
    found = read_alignment(out / "1CRN_A.a3m.gz")
    assert len(found) == 2
    assert read_templates(out / "1CRN_A.templates.npz") == []
    assert "1CRN_A: 1CRN_A: the query itself: identical over 100% of it" in report.notes


def test_what_was_found_goes_into_a_cache(folders, tmp_path) -> None:
    structures, out, databases = folders
    retrieve(structures, out, databases)
    report = build_cache(structures, tmp_path / "cache", alignments=out)
    assert (report.ok, report.failed) == (3, 0)
    assert len(Cache(tmp_path / "cache").load("1CRN").msa) == 2


def test_a_second_run_searches_nothing_and_writes_the_same(folders) -> None:
    structures, out, databases = folders
    first = retrieve(structures, out, databases)
    content = {path: path.read_bytes() for path in first.written}
    again = retrieve(structures, out, databases)
    assert (first.searched, again.searched) == (5, 0)
    assert {path: path.read_bytes() for path in again.written} == content


def test_a_changed_database_is_searched_again(folders) -> None:
    structures, out, databases = folders
    retrieve(structures, out, databases)
    text = databases.proteins.read_text()
    databases.proteins.write_text(f">new\n{RELATIVE.replace('VCRL', 'VCKL')}\n{text}")
    report = retrieve(structures, out, databases)
    # Two proteins, and the templates of the alignment that has changed.
    assert report.searched == 3
    assert len(read_alignment(out / "1CRN_A.a3m.gz")) == 3


def test_equal_chains_are_searched_for_once(folders) -> None:
    structures, out, databases = folders
    (structures / "COPY.cif.gz").write_bytes(sample_path("1CRN").read_bytes())
    report = retrieve(structures, out, Databases(proteins=databases.proteins))
    assert (report.searched, report.reused) == (2, 1)
    assert read_alignment(out / "COPY_A.a3m.gz").msa.shape == (2, 46)


def test_an_interrupted_run_goes_on_where_it_was(folders, monkeypatch) -> None:
    structures, out, databases = folders

    def stop(done: float, total: int) -> None:
        if done > 2:  # while the third search is at work
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        retrieve(structures, out, databases, progress=stop)
    assert not list(out.rglob("*.tmp"))
    searched, true = [], retrieval_module.search_a3m
    monkeypatch.setattr(
        retrieval_module,
        "search_a3m",
        lambda sequence, *a, **k: searched.append(sequence) or true(sequence, *a, **k),
    )
    report = retrieve(structures, out, databases)
    assert len(report.written) == 5
    assert searched[0] == CRAMBIN  # the conotoxin's was kept
    assert len(searched) == 2


def test_progress_grows_to_the_number_of_searches(folders) -> None:
    structures, out, databases = folders
    seen: list[tuple[float, int]] = []
    retrieve(structures, out, databases, progress=lambda *told: seen.append(told))
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)
    assert seen[-1] == (5, 5)


def test_a_structure_that_cannot_be_read_stops_no_other(folders) -> None:
    structures, out, databases = folders
    (structures / "BAD.cif").write_text("nonsense")
    report = retrieve(structures, out, databases)
    assert len(report.written) == 5
    (path, why), *_ = report.failed.items()
    assert path.endswith("BAD.cif")
    assert "not mmCIF" in why


def test_a_missing_database_is_an_error(folders, tmp_path) -> None:
    structures, out, _ = folders
    with pytest.raises(DataError, match=r"gone\.fasta: no such database"):
        retrieve(structures, out, Databases(proteins=tmp_path / "gone.fasta"))
    with pytest.raises(DataError, match="templates need structures"):
        retrieve(structures, out, Databases(templates=tmp_path / "x.fasta"))


def test_the_command_says_what_it_did(folders, capsys) -> None:
    structures, out, databases = folders
    arguments = ["search", str(structures), "--out", str(out), "--proteins"]
    assert cli.main([*arguments, str(databases.proteins)]) == 0
    assert "2 files written; 2 searches made, 0 already there" in capsys.readouterr().out
    (structures / "BAD.cif").write_text("nonsense")
    assert cli.main([*arguments, str(databases.proteins)]) == 1
    assert "0 searches made, 2 already there; 1 structures failed" in capsys.readouterr().out
    assert cli.main(["search", str(structures), "--out", str(out)]) == 2
    assert "no database" in capsys.readouterr().err


def test_ctrl_c_leaves_what_is_finished(folders, request) -> None:
    """A real interrupt of the command, while it searches a database that never ends."""
    structures, out, databases = folders
    endless = out.parent / "endless.fasta"
    endless.write_text(databases.proteins.read_text() + f">more\n{CRAMBIN}\n")
    script = (
        "import sys\n"
        "from megafold import cli\n"
        "from megafold.data import search\n"
        "pieces = search.pieces\n"
        "def endless(database, *others):\n"
        "    yield from pieces(database, *others)\n"
        "    while 'endless' in str(database):\n"
        "        yield from pieces(database, *others)\n"
        "search.pieces = endless\n"
        "sys.exit(cli.main(sys.argv[1:]))"
    )
    arguments = [sys.executable, "-c", script, "search", str(structures), "--out", str(out),
                 "--proteins", str(databases.proteins),
                 "--to-pair", str(endless)]  # fmt: skip
    # Ctrl-C as at a prompt: what a shell starts in the background ignores it, and so would this.
    process = subprocess.Popen(
        arguments,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    request.addfinalizer(process.kill)
    for _ in range(600):
        if list((out / "searches").glob("*.a3m.gz")) if out.exists() else False:
            break
        try:
            process.wait(0.1)
            break
        except subprocess.TimeoutExpired:
            continue
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 130, error
    assert "interrupted after 1 of 4 searches; they are kept" in error
    assert len(list((out / "searches").glob("*.a3m.gz"))) == 1

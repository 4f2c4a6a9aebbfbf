"""``megafold bench-step``: its lines, its rows, its refusals."""

from __future__ import annotations

import csv

from megafold import cli
from megafold.model import memory

STEP = ["bench-step", "1A8O", "--model", "tiny", "--device", "cpu", "--seconds", "0"]


def rows(path) -> list[dict[str, str]]:
    with path.open() as file:
        return list(csv.DictReader(file))


def test_the_cost_of_a_step_is_printed_and_kept_beside_its_peers(tmp_path, capsys):
    arguments = [*STEP, "--tokens", "8", "12", "--impl", "megafold", "eager"]
    assert cli.main([*arguments, "--out", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert "tiny checkpointed N12 eager: " in out
    kept = rows(tmp_path / "cpu" / "train_step.csv")
    assert [(row["shape"], row["impl"]) for row in kept] == [
        (f"tiny checkpointed N{n}", impl) for n in (8, 12) for impl in ("megafold", "eager")
    ]
    assert len({row["date"] for row in kept}) == 1


def test_an_alignment_is_drawn_and_named(tmp_path):
    arguments = [*STEP, "--tokens", "8", "--impl", "megafold", "--alignment", "5"]
    assert cli.main([*arguments, "--out", str(tmp_path)]) == 0
    (row,) = rows(tmp_path / "cpu" / "train_step.csv")
    assert row["shape"] == "tiny checkpointed M5 N8"


def test_a_step_too_large_for_memory_is_said_and_others_are_measured(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(memory, "available_memory", lambda device: 20_000_000)
    arguments = [*STEP, "--tokens", "64", "4", "--impl", "megafold"]
    assert cli.main([*arguments, "--out", str(tmp_path)]) == 1
    out = capsys.readouterr().out
    assert "tiny N64 megafold: too large: training on 64 tokens" in out
    assert [row["shape"] for row in rows(tmp_path / "cpu" / "train_step.csv")] == [
        "tiny checkpointed N4"
    ]


def test_bad_arguments_of_the_cost_are_one_sentence_on_stderr(capsys):
    for arguments, message in (
        (["--tokens", "8", "--impl", "jit"], "unknown implementation ['jit']"),
        (["--tokens", "8", "--model", "huge"], "unknown model configuration 'huge'"),
        (["--tokens", "0"], "crop"),
        (["--tokens", "8", "--alignment", "0"], "an alignment has at least 1 row"),
        (["--tokens", "8", "--captured"], "captured steps need a GPU"),
    ):
        assert cli.main([*STEP, *arguments]) == 2
        assert message in capsys.readouterr().err

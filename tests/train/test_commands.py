"""``megafold train memorise``: the files, the limits, the exit status."""

from __future__ import annotations

import csv

import gemmi

from megafold import cli
from megafold.train import read_runs

SHORT = ["train", "memorise", "1as5", "--model", "tiny", "--device", "cpu", "--sampler-steps", "2"]


def rows(path) -> list[dict[str, str]]:
    with path.open() as file:
        return list(csv.DictReader(file))


def test_a_run_leaves_its_curve_its_scores_and_a_structure(tmp_path, capsys):
    assert cli.main([*SHORT, "--steps", "3", "--every", "2", "--out", str(tmp_path)]) == 0
    names = {"1AS5_tiny_curve.csv", "1AS5_tiny_lddt.csv", "1AS5_tiny.cif"}
    assert {path.name for path in tmp_path.iterdir()} == names
    curve = rows(tmp_path / "1AS5_tiny_curve.csv")
    assert [row["step"] for row in curve] == ["1", "2", "3"]
    assert float(curve[0]["total"]) > 0
    # One fiftieth of 1e-3 a step while it warms up, halved after each quarter, here of one step.
    assert [float(row["learning_rate"]) for row in curve] == [2e-5, 4e-5 / 2, 6e-5 / 4]
    assert {"mse", "smooth_lddt", "distogram", "gradient_norm", "seconds"} <= set(curve[0])
    assert [row["step"] for row in rows(tmp_path / "1AS5_tiny_lddt.csv")] == ["2", "3"]
    structure = gemmi.read_structure(str(tmp_path / "1AS5_tiny.cif"))
    assert structure[0].count_atom_sites() == 185
    (run,) = read_runs(tmp_path)
    assert (run.entry, run.model, len(run.history)) == ("1AS5", "tiny", 3)
    assert run.history[2].step == 2
    assert run.history[0].losses["total"] == float(curve[0]["total"])
    assert run.seconds == sum(float(row["seconds"]) for row in curve)
    assert [one.step for one in run.evaluations] == [2, 3]
    assert run.structure == tmp_path / "1AS5_tiny.cif"
    out = capsys.readouterr().out
    assert "3 steps in" in out
    assert "memorised, not predicted" in out


def test_a_target_that_is_not_reached_is_a_failure_and_time_is_a_limit(tmp_path, capsys):
    arguments = [*SHORT, "--steps", "50", "--minutes", "0", "--target", "0.99"]
    assert cli.main([*arguments, "--out", str(tmp_path)]) == 1
    assert len(rows(tmp_path / "1AS5_tiny_curve.csv")) == 1
    assert len(rows(tmp_path / "1AS5_tiny_lddt.csv")) == 1


def test_a_stopped_run_goes_on_from_its_state(tmp_path, capsys):
    arguments = [*SHORT, "--steps", "3", "--out", str(tmp_path), "--state", str(tmp_path / "state")]
    assert cli.main([*arguments, "--minutes", "0"]) == 0
    assert len(rows(tmp_path / "1AS5_tiny_curve.csv")) == 1
    assert cli.main(arguments) == 0
    assert [row["step"] for row in rows(tmp_path / "1AS5_tiny_curve.csv")] == ["1", "2", "3"]
    assert [row["step"] for row in rows(tmp_path / "1AS5_tiny_lddt.csv")] == ["1", "3"]
    capsys.readouterr()
    assert cli.main([*arguments, "--learning-rate", "1"]) == 2
    assert "learning_rate was 0.001 and is 1.0" in capsys.readouterr().err


def test_bad_arguments_are_one_sentence_on_stderr(tmp_path, capsys):
    for arguments, message in (
        (["1as5", "--model", "huge"], "unknown model configuration 'huge'"),
        (["9zzz", "--model", "tiny"], "no bundled sample '9ZZZ'"),
        (["1as5", "--model", "tiny", "--device", "tpu"], "no device 'tpu'; there are"),
    ):
        command = ["train", "memorise", "--device", "cpu", *arguments]
        assert cli.main([*command, "--out", str(tmp_path / "new")]) == 2
        assert message in capsys.readouterr().err
    assert not (tmp_path / "new").exists()

"""Ours beside its peers: rows of one run alone, and what the command prints of them."""

from __future__ import annotations

from dataclasses import replace

import pytest

from megafold import cli
from megafold.bench import records
from megafold.bench.compare import compare

FIRST, SECOND, THIRD = (f"2026-01-0{day}T00:00:00+00:00" for day in (1, 2, 3))


def row(impl, ms, peak_mb=100.0, date=FIRST, **changes):
    record = records.Record(
        op="evo_attention",
        shape="B1 S384 N384 H4 D32",
        dtype="bfloat16",
        impl=impl,
        direction="full",
        ms=ms,
        ms_q1=ms,
        ms_q3=ms,
        peak_mb=peak_mb,
        error=1e-3,
        device="a GPU",
        driver="",
        torch="2",
        triton="3",
        revision="abc",
        date=date,
    )
    return replace(record, **changes)


def test_ratios_are_to_the_best_peer_and_to_the_memory_of_flex():
    (found,) = compare([row("megafold", 2, 150), row("flex", 5, 100), row("compile", 3, 900)])
    assert found.best_peer == "compile"
    assert found.speedup == 1.5
    assert found.memory_ratio == 1.5
    assert found.ms == {"megafold": 2, "flex": 5, "compile": 3}


def test_ours_is_slower_where_the_ratio_is_below_one():
    (found,) = compare([row("megafold", 4), row("sdpa", 1)])
    assert (found.best_peer, found.speedup) == ("sdpa", 0.25)


def test_memory_has_no_ratio_where_flex_was_not_measured():
    (found,) = compare([row("megafold", 1), row("eager", 2)])
    assert found.memory_ratio is None


def test_memory_of_every_operator_but_attention_is_held_against_what_pytorch_fuses():
    changes = {"op": "layer_norm_linear", "shape": "M60000 C128 O16"}
    rows = [row("megafold", 1, 50), row("eager", 2, 400), row("compile", 3, 200)]
    (found,) = compare([replace(one, **changes) for one in rows])
    assert (found.memory_peer, found.memory_ratio) == ("compile", 0.25)
    assert compare([replace(one, **changes) for one in rows[:2]])[0].memory_ratio is None


def test_work_is_memory_beyond_output_and_gradients():
    changes = {"op": "layer_norm_linear", "shape": "M1000 C128 O16"}
    output, gradients = 1000 * 16 * 2, 2 * (1000 * 128 + 2 * 128 + 16 * 128)
    held = (output + gradients) / 1e6
    rows = [row("megafold", 1, held + 1, **changes), row("compile", 3, held + 4, **changes)]
    assert compare(rows)[0].work_ratio == pytest.approx(0.25)
    held = output / 1e6
    forward = {"direction": "forward", **changes}
    rows = [row("megafold", 1, held + 1, **forward), row("compile", 3, held + 2, **forward)]
    assert compare(rows)[0].work_ratio == pytest.approx(0.5)
    nothing = row("compile", 3, held, **forward)
    assert compare([rows[0], nothing])[0].work_ratio is None
    step = {"op": "train_step", "shape": "af3 N384"}
    rows = [row("megafold", 1, **step), row("eager", 1, **step)]
    assert compare(rows)[0].work_ratio is None


def test_work_of_masks_and_of_tf32_is_that_of_their_dtypes():
    changes = {"dtype": "tf32", "shape": "B1 S2 N8 H1 D8"}
    held = 4 * (4 * 2 * 8 * 8 + 8 * 8) / 1e6  # output, gradients of q, k, v and the bias
    rows = [row("megafold", 1, held + 1, **changes), row("flex", 1, held + 2, **changes)]
    assert compare(rows)[0].work_ratio == pytest.approx(0.5)


def test_rows_of_two_runs_are_never_set_side_by_side():
    rows = [
        row("megafold", 10, date=FIRST),
        row("flex", 20, date=FIRST),
        row("megafold", 5, date=SECOND),
        row("compile", 6, date=SECOND),
    ]
    (found,) = compare(rows)
    assert found.date == SECOND
    assert found.ms == {"megafold": 5, "compile": 6}
    assert compare(reversed(rows)) == [found]


def test_run_of_one_implementation_is_passed_over():
    rows = [row("megafold", 10), row("flex", 20), row("megafold", 1, date=SECOND)]
    rows.append(row("flex", 2, date=THIRD))
    (found,) = compare(rows)
    assert (found.date, found.speedup) == (FIRST, 2)


def test_nothing_is_compared_across_cases():
    for change in (
        {"shape": "B1 S1 N1 H1 D8"},
        {"dtype": "float32"},
        {"direction": "forward"},
        {"device": "another"},
        {"op": "transition"},
    ):
        assert compare([row("megafold", 1), row("flex", 1, **change)]) == []


def test_the_last_of_rows_measured_twice_in_a_run_counts():
    (found,) = compare([row("megafold", 1), row("flex", 3), row("megafold", 2)])
    assert found.speedup == 1.5


@pytest.fixture
def stored(tmp_path, monkeypatch):
    """Records of a device, in a folder in place of the checkout's."""
    monkeypatch.setattr(records, "folder", lambda: tmp_path)
    records.append(
        [
            row("megafold", 0.5, 350),
            row("flex", 1.25, 250),
            row("eager", 7.5, 3564),
            row("megafold", 0.25, 150, direction="forward"),
            row("eager", 3.5, 3564, direction="forward"),
            row("megafold", 1.0, dtype="float32"),
        ],
        tmp_path,
        "a-gpu",
    )
    return tmp_path


@pytest.mark.usefixtures("stored")
def test_command_prints_times_and_ratios(capsys):
    assert cli.main(["compare", "--device", "a-gpu", "evo_attention"]) == 0
    printed = capsys.readouterr().out
    assert "evo_attention, bfloat16, a GPU" in printed
    (full,) = [line for line in printed.splitlines() if " full " in line]
    assert full.split()[:5] == ["B1", "S384", "N384", "H4", "D32"]
    assert full.split()[5:] == [
        "full", "0.500", "7.500", "1.250", "flex", "2.50x", "350.0", "1.40x", "2.03x", FIRST,
        "abc",
    ]  # fmt: skip
    (forward,) = [line for line in printed.splitlines() if " forward " in line]
    assert forward.split()[5:11] == ["forward", "0.250", "3.500", "-", "eager", "14.00x"]
    assert "float32" not in printed  # ours alone: no comparison


@pytest.mark.usefixtures("stored")
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--device", "b-gpu"], "no records on b-gpu; there are some of a-gpu"),
        (["--device", "a-gpu", "transition"], "no records of transition on a-gpu"),
        (["--device", "a-gpu", "--dtype", "float16"], "no records in float16 on a-gpu"),
        (["--device", "a-gpu", "--dtype", "float32"], "no run measured megafold beside another"),
    ],
)
def test_command_says_what_is_missing(arguments, message, capsys):
    assert cli.main(["compare", *arguments]) == 1
    captured = capsys.readouterr()
    assert message in captured.err
    assert captured.err.count("\n") == 1
    assert not captured.out


def test_command_without_a_checkout_says_so(monkeypatch, capsys):
    def gone():
        raise FileNotFoundError("no records here: it is part of a checkout only")

    monkeypatch.setattr(records, "folder", gone)
    assert cli.main(["compare"]) == 1
    assert capsys.readouterr().err.startswith("megafold compare: no records here")


def test_command_refuses_a_file_that_holds_no_records(stored, capsys):
    (stored / "a-gpu" / "evo_attention.csv").write_text("op,ms\n")
    assert cli.main(["compare", "--device", "a-gpu"]) == 2
    assert "columns are ['op', 'ms']" in capsys.readouterr().err

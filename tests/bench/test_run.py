"""Measuring a case from end to end: implementations, records, the command."""

from __future__ import annotations

import argparse

import pytest
import torch

from megafold.bench import cases, commands, peers, records, roofline
from megafold.bench import run as run_module
from megafold.bench.run import measure_case, run

ATTENTION = cases.case("evo_attention", "B2 S2 N16 H2 D8")
TRANSITION = cases.case("transition", "M16 C8 H16")
CPU = torch.device("cpu")


def bench(*arguments: str) -> int:
    parser = argparse.ArgumentParser()
    commands.add_parser(parser.add_subparsers())
    args = parser.parse_args(["bench", *arguments])
    return args.func(args)


@pytest.mark.filterwarnings("ignore:.*torch.jit.script_method")  # inside torch
@pytest.mark.parametrize("impl", ["megafold", "eager", "sdpa", "flex"])
def test_every_implementation_of_attention_computes_the_same(impl):
    inputs = ATTENTION.make_inputs("cpu", torch.float32, torch.Generator().manual_seed(0))
    with torch.no_grad():
        out = peers.implementation(impl, ATTENTION)(inputs)
    torch.testing.assert_close(out, ATTENTION.run_reference(inputs))


def test_record_says_what_was_measured():
    record = measure_case(TRANSITION, "eager", "full", CPU, torch.float32, seconds=0.01)
    assert (record.op, record.shape) == ("transition", "M16 C8 H16")
    assert (record.impl, record.direction, record.dtype) == ("eager", "full", "float32")
    assert 0 < record.ms_q1 <= record.ms <= record.ms_q3
    assert 0 < record.error < 1e-6
    assert 0 < record.peak_mb < 1


def test_wrong_result_shows_in_the_error(monkeypatch):
    monkeypatch.setitem(peers.PEERS, "eager", lambda case: lambda i: case.run_reference(i) * 1.5)
    record = measure_case(TRANSITION, "eager", "forward", CPU, torch.float32, seconds=0.01)
    assert record.error == pytest.approx(0.5)


def test_error_is_unknown_where_the_truth_does_not_fit_into_memory(monkeypatch, capsys):
    def too_large(*_):
        raise torch.OutOfMemoryError("no room for fp64")

    monkeypatch.setattr(run_module.accuracy, "exact_results", too_large)
    record = measure_case(TRANSITION, "eager", "forward", CPU, torch.float32, seconds=0.01)
    assert record.error is None
    assert record.ms > 0
    bench("transition", "--shape", "M16 C8 H16", "--impl", "eager", "--device", "cpu")
    assert "unknown" in capsys.readouterr().out


def test_what_an_implementation_cannot_do_is_reported_with_its_reason():
    (outcome,) = run([TRANSITION], ["sdpa"], ["forward"], CPU, torch.float32)
    assert outcome.record is None
    assert not outcome.failed
    assert outcome.reason == "scaled_dot_product_attention does not compute transition"


def test_what_an_implementation_refuses_on_this_device_is_reported(monkeypatch):
    def refuses(inputs):
        raise NotImplementedError("no backward on this device\nlong story")

    monkeypatch.setitem(peers.PEERS, "flex", lambda case: refuses)
    (outcome,) = run([ATTENTION], ["flex"], ["full"], CPU, torch.float32)
    assert (outcome.failed, outcome.reason) == (False, "no backward on this device")


def test_failure_is_an_outcome_and_the_rest_goes_on(monkeypatch):
    def fails(inputs):
        raise MemoryError("out of it")

    monkeypatch.setitem(peers.PEERS, "compile", lambda case: fails)
    outcomes = list(
        run([TRANSITION], ["compile", "eager"], ["forward"], CPU, torch.float32, seconds=0.01)
    )
    assert [o.failed for o in outcomes] == [True, False]
    assert outcomes[0].reason == "MemoryError: out of it"
    assert outcomes[1].record is not None


def test_rows_of_one_run_share_one_date():
    outcomes = run([TRANSITION], ["eager"], cases.DIRECTIONS, CPU, torch.float32, seconds=0.01)
    assert len({o.record.date for o in outcomes}) == 1


def test_implementations_of_an_operator():
    assert peers.peers_of("transition") == ("megafold", "eager", "compile")
    assert set(peers.peers_of("evo_attention")) == set(peers.PEERS)
    with pytest.raises(ValueError, match="unknown implementation 'magic'"):
        peers.implementation("magic", TRANSITION)


def test_bound_is_the_longer_of_arithmetic_and_traffic():
    slow_maths = roofline.Device("x", {"float32": 1e-6}, 1e9, "made up")
    slow_memory = roofline.Device("x", {"float32": 1e9}, 1e-6, "made up")
    flops, size = TRANSITION.flops("full"), TRANSITION.bytes("full", torch.float32)
    bound = roofline.bound_ms(TRANSITION, "full", torch.float32, slow_maths)
    assert bound == pytest.approx(flops / 1e6 * 1e3)
    bound = roofline.bound_ms(TRANSITION, "full", torch.float32, slow_memory)
    assert bound == pytest.approx(size / 1e3 * 1e3)


def test_peaks_of_a_data_sheet_are_found_by_the_name_of_the_device():
    assert roofline.known_peaks("NVIDIA H100 80GB HBM3").name == "H100 SXM"
    assert roofline.known_peaks("NVIDIA H200").gb_per_s == 4800.0
    assert roofline.known_peaks("AMD EPYC, 1 thread") is None


def test_peaks_of_a_cpu_are_measured_and_say_so():
    peaks = roofline.measured_peaks("cpu", torch.float32, size=128)
    assert peaks.tflops["float32"] > 0
    assert peaks.gb_per_s > 0
    assert peaks.source.startswith("measured")
    with pytest.raises(KeyError, match="no peak rate for bfloat16"):
        roofline.bound_ms(TRANSITION, "full", torch.bfloat16, peaks)


def test_command_measures_prints_and_appends(tmp_path, capsys):
    shape = ["transition", "--shape", "M16 C8 H16", "--impl", "eager", "sdpa", "--seconds", "0.01"]
    assert bench(*shape, "--device", "cpu", "--out", str(tmp_path)) == 0
    printed = capsys.readouterr().out
    assert "transition, M16 C8 H16" in printed
    assert "not run: scaled_dot_product_attention does not compute transition" in printed
    assert "2 measured, 0 failed" in printed
    assert [r.direction for r in records.read(tmp_path, "cpu", "transition")] == ["forward", "full"]


def test_command_exits_with_an_error_where_something_failed(monkeypatch, capsys):
    def fails(inputs):
        raise RuntimeError("broken")

    monkeypatch.setitem(peers.PEERS, "eager", lambda case: fails)
    shape = ["transition", "--shape", "M16 C8 H16", "--impl", "eager", "--device", "cpu"]
    assert bench(*shape) == 1
    assert "FAILED: RuntimeError: broken" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["softmax"], "unknown operator 'softmax'"),
        (["--shape", "M1"], "--shape needs exactly one operator"),
        (["transition", "--shape", "M1"], "missing ['C', 'H']"),
        (["transition", "--impl", "magic"], "unknown implementation ['magic']"),
    ],
)
def test_command_refuses_what_it_does_not_know(arguments, message, capsys):
    assert bench(*arguments, "--device", "cpu") == 2
    assert message in capsys.readouterr().err

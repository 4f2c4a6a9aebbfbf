"""The paper's values."""

from __future__ import annotations

from pathlib import Path

import pytest

from megafold.viz import reference
from megafold.viz.reference import OOM


def value(points: list[reference.Point], device: str, name: str, tokens: int) -> reference.Value:
    (point,) = [
        p for p in points if (p.device, p.implementation, p.tokens) == (device, name, tokens)
    ]
    return point.value


def test_running_out_of_memory_is_a_value() -> None:
    assert value(reference.step_time(), "NVIDIA H200", "eager", 640) is OOM
    assert value(reference.step_time(), "NVIDIA H200", "deepspeed", 640) == 19.54
    assert repr(OOM) == "OOM"


def test_no_point_is_given_twice() -> None:
    for points in (reference.step_time(), reference.peak_memory()):
        keys = [(p.device, p.implementation, p.tokens) for p in points]
        assert len(set(keys)) == len(keys)


@pytest.mark.parametrize(
    ("points", "device", "tokens", "claim"),
    [
        (reference.step_time, "NVIDIA H200", 512, 1.73),
        (reference.step_time, "AMD MI250", 384, 1.62),
        (reference.peak_memory, "NVIDIA H200", 512, 1.23),
    ],
)
def test_the_values_agree_with_the_claims_of_the_abstract(
    points, device: str, tokens: int, claim: float
) -> None:
    ratio = value(points(), device, "eager", tokens) / value(points(), device, "megafold", tokens)
    assert ratio == pytest.approx(claim, rel=0.01)


def test_the_longest_sequence_agrees_with_the_claim_of_the_second_version() -> None:
    longest = {(row.implementation, row.gpus): row.tokens for row in reference.longest_sequence()}
    ratio = longest["megafold", 32] / longest["eager", 32]
    assert ratio == pytest.approx(3.36, rel=0.01)


def test_an_upper_bound_is_told_from_a_count() -> None:
    relations = {(row.model, row.operator): row.relation for row in reference.operator_calls()}
    assert relations["AlphaFold 3", "linear"] == "about"
    assert relations["560M language model", "linear"] == "below"


def test_a_bad_value_is_named_with_its_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reference, "folder", lambda: tmp_path)
    (tmp_path / "step_time.csv").write_text(
        "device,implementation,tokens,seconds\nH200,eager,128,6.65\nH200,eager,256,fast\n"
    )
    with pytest.raises(ValueError, match=r"step_time.csv, line 3: .*fast"):
        reference.step_time()

"""Records: rows that are appended whole or not at all."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import megafold
from megafold.bench import cases, records, roofline

RECORD = records.Record(
    op="transition",
    shape="M4 C8 H16",
    dtype="float32",
    impl="eager",
    direction="full",
    ms=1.25,
    ms_q1=1.0,
    ms_q3=1.5,
    peak_mb=0.75,
    error=2.5e-7,
    device="a device, with a comma",
    driver="",
    torch="2",
    triton="3",
    revision="abc",
    date="2026-01-01T00:00:00+00:00",
)


def test_what_was_appended_is_read_back(tmp_path):
    other = replace(RECORD, op="evo_attention", error=None)
    paths = records.append([RECORD, other, RECORD], tmp_path, "cpu")
    assert [p.relative_to(tmp_path).as_posix() for p in paths] == [
        "cpu/transition.csv",
        "cpu/evo_attention.csv",
    ]
    assert records.read(tmp_path, op="transition") == [RECORD, RECORD]
    assert records.read(tmp_path, "cpu") == [other, RECORD, RECORD]
    assert records.read(tmp_path, "nvidia-h200") == []


def test_appending_keeps_the_rows_before(tmp_path):
    second = replace(RECORD, ms=2.0, date="2026-01-02T00:00:00+00:00")
    records.append([RECORD], tmp_path, "cpu")
    records.append([second], tmp_path, "cpu")
    assert records.read(tmp_path) == [RECORD, second]
    assert records.newest(records.read(tmp_path)) == [second]


def test_header_is_that_of_the_contract(tmp_path):
    records.append([RECORD], tmp_path, "cpu")
    header = (tmp_path / "cpu" / "transition.csv").read_text().splitlines()[0]
    assert header == (
        "op,shape,dtype,impl,direction,ms,ms_q1,ms_q3,peak_mb,error,"
        "device,driver,torch,triton,revision,date"
    )


def test_file_with_other_columns_is_refused_and_left_alone(tmp_path):
    path = tmp_path / "cpu" / "transition.csv"
    path.parent.mkdir()
    path.write_text("op,ms\ntransition,1\n")
    with pytest.raises(ValueError, match=r"transition\.csv: columns are \['op', 'ms'\], expected"):
        records.append([RECORD], tmp_path, "cpu")
    assert path.read_text() == "op,ms\ntransition,1\n"


def test_value_that_is_no_number_is_named_with_its_line(tmp_path):
    (path,) = records.append([RECORD], tmp_path, "cpu")
    path.write_text(path.read_text().replace("1.25", "fast"))
    with pytest.raises(ValueError, match=r"transition\.csv, line 2: .*'fast'"):
        records.read(tmp_path)


def test_short_row_is_refused(tmp_path):
    (path,) = records.append([RECORD], tmp_path, "cpu")
    path.write_text(path.read_text() + "transition,M4 C8 H16,float32\n")
    with pytest.raises(ValueError, match=r"transition\.csv, line 3"):
        records.read(tmp_path)


def test_interrupted_write_leaves_the_old_rows_and_nothing_else(tmp_path, monkeypatch):
    records.append([RECORD], tmp_path, "cpu")

    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("megafold.atomic.os.replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        records.append([RECORD], tmp_path, "cpu")
    monkeypatch.undo()
    assert records.read(tmp_path) == [RECORD]
    assert [p.name for p in (tmp_path / "cpu").iterdir()] == ["transition.csv"]


def test_unknown_implementation_and_direction_are_refused():
    with pytest.raises(ValueError, match=r"impl must be one of .* not 'magic'"):
        replace(RECORD, impl="magic")
    with pytest.raises(ValueError, match=r"direction must be one of .* not 'backward'"):
        replace(RECORD, direction="backward")


def test_missing_folder_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError, match="no folder of records"):
        records.read(tmp_path / "nowhere")


def test_environment_describes_this_machine():
    around = records.environment("cpu")
    assert around.torch == torch.__version__
    assert "thread" in around.device
    assert around.driver == ""
    assert records.device_name("cpu") == "cpu"


def test_stored_records_can_be_read_and_their_cases_exist():
    stored = records.read(records.folder())
    assert stored
    for record in stored:
        if record.op in cases.SHAPES:
            assert cases.case(record.op, record.shape).shape == record.shape
        assert 0 < record.ms_q1 <= record.ms <= record.ms_q3


def test_a_gpus_records_are_this_ones_or_those_of_most_shapes(tmp_path, monkeypatch):
    monkeypatch.setattr(records, "folder", lambda: tmp_path)
    assert records.of_a_gpu("transition") == []
    for device in ("cpu", "amd-mi300x", "nvidia-h100-80gb-hbm3", "nvidia-h200"):
        records.append([replace(RECORD, device=device)], tmp_path, device)
    assert records.of_a_gpu("transition") == [replace(RECORD, device="nvidia-h200")]
    assert records.of_a_gpu("evo_attention") == []
    more = replace(RECORD, device="nvidia-h100-80gb-hbm3", shape="M2 C8 H8")
    records.append([more], tmp_path, more.device)
    assert {r.device for r in records.of_a_gpu("transition")} == {more.device}
    assert len(records.of_a_gpu("transition")) == 2
    monkeypatch.setattr(records, "device_name", lambda: "amd-mi300x")
    assert records.of_a_gpu("transition") == [replace(RECORD, device="amd-mi300x")]


def test_figures_draw_a_gpus_records_or_say_that_they_are_a_cpus(tmp_path, monkeypatch):
    monkeypatch.setattr(records, "folder", lambda: tmp_path)
    of_cpu = replace(RECORD, device="cpu", dtype="float32")
    records.append([of_cpu, replace(of_cpu, dtype="bfloat16")], tmp_path, "cpu")
    with pytest.warns(UserWarning, match=r"no records of transition on a GPU"):
        assert records.to_draw("transition") == [of_cpu]
    of_gpu = replace(RECORD, device="nvidia-h200", dtype="bfloat16")
    records.append([of_gpu, replace(of_gpu, dtype="float32")], tmp_path, "nvidia-h200")
    assert records.to_draw("transition") == [of_gpu]


def test_revision_is_never_empty():
    assert records.revision() or megafold.__version__


def test_no_stored_time_is_below_the_roofline():
    looked_at = 0
    for record in records.read(records.folder()):
        peaks = roofline.known_peaks(record.device)
        if peaks is None or record.op not in cases.SHAPES:
            continue
        case, dtype = cases.case(record.op, record.shape), getattr(torch, record.dtype)
        bound = roofline.bound_ms(case, record.direction, dtype, peaks)
        assert record.ms > bound, (record, bound)
        looked_at += 1
    assert looked_at > 1000

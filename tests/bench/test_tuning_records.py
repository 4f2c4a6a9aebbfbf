"""Rows of configurations that were tried."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from megafold.bench import records, tuning_records
from megafold.bench.cases import case
from megafold.bench.tune import Trial
from megafold.ops.precision import products_in
from megafold.ops.tuning import Config

CASE = case("evo_attention", "B1 S4 N16 H2 D16")
GOOD = Trial("evo_attention.forward", Config({"ROWS": 2, "BLOCK_Q": 64}, 4, 2), 0.123456)
SPILT = Trial(
    "evo_attention.forward", Config({"ROWS": 4, "BLOCK_Q": 128}, 4, 1, 128), None, "8 bytes, spilt"
)


@pytest.fixture
def made() -> list[tuning_records.TuningRecord]:
    return tuning_records.rows(CASE, torch.bfloat16, [GOOD, SPILT], "cpu")


def test_rows_say_what_was_tried_where_and_when(made):
    good, spilt = made
    assert (good.kernel, good.shape, good.dtype) == (GOOD.kernel, CASE.shape, "bfloat16")
    assert (good.blocks, good.num_warps, good.num_stages) == ("ROWS 2 BLOCK_Q 64", 4, 2)
    assert (good.config, spilt.config) == (GOOD.config, SPILT.config)
    assert (spilt.ms, spilt.note) == (None, "8 bytes, spilt")
    assert good.device == records.device_description("cpu")
    assert good.date == spilt.date
    assert good.revision == records.revision()


def test_fp32_is_recorded_as_its_products_are():
    assert [r.dtype for r in tuning_records.rows(CASE, torch.float32, [GOOD], "cpu")] == ["float32"]
    with products_in("tf32"):
        assert [r.dtype for r in tuning_records.rows(CASE, torch.float32, [GOOD], "cpu")] == [
            "tf32"
        ]


def test_what_was_appended_is_read_back(made, tmp_path):
    (path,) = tuning_records.append(made, tmp_path, "nvidia-h200")
    assert path == tmp_path / "nvidia-h200" / "evo_attention_tuning.csv"
    tuning_records.append(made[:1], tmp_path, "nvidia-h200")
    assert tuning_records.read(tmp_path) == [*made, made[0]]
    assert tuning_records.read(tmp_path, "nvidia-h200", "evo_attention") == [*made, made[0]]
    assert tuning_records.read(tmp_path, "cpu") == []


def test_header_is_as_documented(made, tmp_path):
    (path,) = tuning_records.append(made, tmp_path, "cpu")
    assert path.read_text().splitlines()[0] == (
        "op,kernel,shape,dtype,blocks,num_warps,num_stages,max_registers,ms,note,device,revision,date"
    )


def test_records_of_operators_and_of_tuning_lie_side_by_side(made, tmp_path):
    """Whoever reads all records of a folder does not meet the rows of the other kind."""
    tuning_records.append(made, tmp_path, "cpu")
    assert records.read(tmp_path) == []
    assert records.read(tmp_path, "cpu") == []


def test_the_last_row_of_each_configuration_of_a_case_is_taken(made, tmp_path, monkeypatch):
    good, spilt = made
    later = replace(good, ms=0.1, date="2999-01-01T00:00:00+00:00")
    others = [
        replace(good, shape="B1 S8 N8 H2 D16"),
        replace(good, dtype="float16"),
    ]
    elsewhere = replace(good, device="NVIDIA H100")
    tuning_records.append([later, good, spilt, *others, elsewhere], tmp_path, "a-device")
    monkeypatch.setattr(tuning_records, "folder", lambda: tmp_path)
    found = tuning_records.stored(CASE, torch.bfloat16)
    assert sorted(found, key=str) == sorted([later, spilt, elsewhere], key=str)


def test_a_row_without_a_time_says_why(made):
    with pytest.raises(ValueError, match=r"without a time needs a note"):
        replace(made[0], ms=None)


def test_a_row_belongs_to_the_operator_of_its_case_whatever_its_kernel(tmp_path, monkeypatch):
    of = case("conditioned_transition", "S2 N8 A16 C16 H32")
    trial = Trial("transition.forward", Config({"BLOCK_M": 64, "BLOCK_H": 32}, 4, 2), 0.5)
    rows = tuning_records.rows(of, torch.bfloat16, [trial], "cpu")
    (path,) = tuning_records.append(rows, tmp_path, "cpu")
    assert path.name == "conditioned_transition_tuning.csv"
    monkeypatch.setattr(tuning_records, "folder", lambda: tmp_path)
    assert tuning_records.stored(of, torch.bfloat16) == rows
    assert tuning_records.stored(case("transition", "M8 C16 H32"), torch.bfloat16) == []


@pytest.mark.parametrize("text", ["", "BLOCK_Q", "BLOCK_Q 64 BLOCK_K", "64 BLOCK_Q"])
def test_blocks_that_are_none_are_refused(made, text):
    with pytest.raises(ValueError, match=r"BLOCK_Q|blocks must be"):
        replace(made[0], blocks=text)


def test_a_value_that_is_no_number_is_named_with_its_line(made, tmp_path):
    (path,) = tuning_records.append(made, tmp_path, "cpu")
    path.write_text(path.read_text().replace("0.123456", "fast"))
    with pytest.raises(ValueError, match=r"evo_attention_tuning\.csv, line 2: .*'fast'"):
        tuning_records.read(tmp_path)


def test_a_short_row_is_refused(made, tmp_path):
    (path,) = tuning_records.append(made, tmp_path, "cpu")
    path.write_text(path.read_text() + "evo_attention,evo_attention.forward,B1\n")
    with pytest.raises(ValueError, match=r"evo_attention_tuning\.csv, line 4"):
        tuning_records.read(tmp_path)


def test_a_file_with_other_columns_is_refused_and_left_alone(made, tmp_path):
    path = tmp_path / "cpu" / "evo_attention_tuning.csv"
    path.parent.mkdir()
    path.write_text("kernel,ms\nx,1\n")
    with pytest.raises(ValueError, match=r"columns are \['kernel', 'ms'\], expected"):
        tuning_records.append(made, tmp_path, "cpu")
    assert path.read_text() == "kernel,ms\nx,1\n"


def test_a_missing_folder_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError, match="no folder of records"):
        tuning_records.read(tmp_path / "nowhere")


def test_stored_rows_can_be_read_and_are_of_cases_and_kernels_there_are():
    from megafold.ops.tuning.candidates import block_names

    for record in tuning_records.read(records.folder()):
        assert case(record.op, record.shape).shape == record.shape
        assert set(record.config.blocks) == set(block_names(record.kernel))
        assert record.ms is None or record.ms > 0

"""What the paper claims, and what we have measured, as tables."""

from __future__ import annotations

from megafold.viz import paper_tables
from tests.viz.test_paper_figures import record


def test_every_claim_stands_beside_the_factors_of_the_figures() -> None:
    table = paper_tables.claims()
    assert "| step time | NVIDIA H200 | up to 1.73 |" in table
    assert "1.80 (256 tokens)" in table  # more than is claimed: shown as it is
    assert "| longest sequence | AMD MI250 | up to 3.36 |" in table


def test_without_measurements_the_table_says_so() -> None:
    assert "no measurements yet" in paper_tables.measurements([])


def test_every_measurement_is_listed_with_why_it_is_used_or_not() -> None:
    table = paper_tables.measurements(
        [
            record(),
            record(shape="af3 N512", date="2030-03-01T00:00:00"),
            record(device="Some CPU, 1 thread"),
            record(op="transition"),
        ]
    )
    assert "| NVIDIA H200 | train_step | 2 | 2030-03-01 | yes |" in table
    assert "| Some CPU, 1 thread | train_step | 1 | 2030-02-01 | no: the paper measured on" in table
    assert "| NVIDIA H200 | transition | 1 | 2030-02-01 | no: a single operator" in table


def test_only_training_steps_on_the_same_device_stand_beside_the_papers_values() -> None:
    ours = [record(), record(op="transition"), record(device="AMD MI250X")]
    assert paper_tables.training_steps(ours, "NVIDIA H200") == ours[:1]
    assert paper_tables.training_steps(ours, "AMD MI250") == ours[2:]


def test_a_step_of_a_smaller_model_is_not_put_beside_the_papers_values() -> None:
    small = [record(shape="small N256")]
    assert paper_tables.training_steps(small, "NVIDIA H200") == []
    assert "no: not the full model" in paper_tables.measurements(small)

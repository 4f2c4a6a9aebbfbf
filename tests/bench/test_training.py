"""What a training step costs, measured."""

from __future__ import annotations

from megafold import data
from megafold.bench.training import step_costs


def test_each_batch_is_a_record_of_a_whole_step():
    batches = [data.example_batch("1A8O", crop=n) for n in (8, 16)]
    records = list(step_costs(batches, "tiny", "cpu", checkpointing=True, seconds=0.0))
    assert [record.shape for record in records] == ["tiny checkpointed N8", "tiny checkpointed N16"]
    assert {record.op for record in records} == {"train_step"}
    assert len({record.date for record in records}) == 1
    assert all(record.ms_q1 <= record.ms <= record.ms_q3 for record in records)
    # A step holds at least the gradients, one float32 for each of a million parameters.
    assert all(record.peak_mb > 4.0 for record in records)


def test_checkpointing_lowers_the_peak():
    batches = [data.example_batch("1A8O", crop=32)]
    plain, kept = (
        next(step_costs(batches, "tiny", "cpu", checkpointing=flag, seconds=0.0)).peak_mb
        for flag in (False, True)
    )
    assert kept < 0.7 * plain

"""What one training step of the whole model costs."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import asdict, replace

import torch

from megafold.bench import measure, memory
from megafold.bench.records import Environment, Record, environment
from megafold.data.batch import Batch
from megafold.model import CONFIGS, AlphaFold3
from megafold.train import TrainConfig, Trainer


def step_costs(
    batches: Iterable[Batch],
    name: str,
    device: torch.device | str,
    *,
    checkpointing: bool,
    seconds: float = 1.0,
) -> Iterator[Record]:
    """Time and peak memory of a training step on each batch, with one fresh model.

    A step is forward, backward and update. All rows carry one date; the shape of a row says
    the configuration, whether blocks are recomputed, and the number of tokens.

    Args:
        batches: on any device.
        name: a configuration of ``megafold.model``.
        checkpointing: recompute blocks in the backward pass.
        seconds: how long to repeat each step.
    """
    device = torch.device(device)
    config = replace(CONFIGS[name], checkpointing=checkpointing)
    torch.manual_seed(0)
    trainer = Trainer(AlphaFold3(config).to(device), TrainConfig())
    around = environment(device)
    for batch in batches:
        yield _step_cost(trainer, batch.to(device), device, seconds, around)


def _step_cost(
    trainer: Trainer, batch: Batch, device: torch.device, seconds: float, around: Environment
) -> Record:
    config = trainer.model.config

    def step() -> float:
        return trainer.step(batch).seconds

    timing = measure.time_call(step, device, seconds=seconds, min_repeats=2)
    # The last step's gradients would be released inside the next one and blur its peak.
    trainer.model.zero_grad(set_to_none=True)
    return Record(
        op="train_step",
        shape=f"{config.name}{' checkpointed' * config.checkpointing} N{batch.num_tokens}",
        dtype="float32",
        impl="megafold",
        direction="full",
        ms=timing.ms,
        ms_q1=timing.ms_q1,
        ms_q3=timing.ms_q3,
        peak_mb=memory.peak_bytes(step, device) / memory.MB,
        error=None,
        **asdict(around),
    )

"""What one training step of the whole model costs, with the fused operators and without."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, replace
from typing import Any

import torch

from megafold import ops
from megafold.bench import measure, memory
from megafold.bench.records import Environment, Record, environment
from megafold.data.batch import Batch
from megafold.data.constants import NUM_RESTYPES
from megafold.model import CONFIGS, AlphaFold3
from megafold.model.blocks import Blocks
from megafold.model.capture import PLAIN_CALLS
from megafold.train import TrainConfig, Trainer

IMPLEMENTATIONS = ("megafold", "eager", "compile")
SEED = 2  # of every step's draws: two cycles of the trunk of ``af3``, and of ``small``


def step_costs(
    batches: Iterable[Batch],
    name: str,
    device: torch.device | str,
    *,
    checkpointing: bool,
    captured: bool = False,
    implementation: str = "megafold",
    bfloat16: bool = False,
    seconds: float = 1.0,
    around: Environment | None = None,
) -> Iterator[Record]:
    """Time and peak memory of a training step on each batch, with one fresh model.

    A step is forward, backward and update, and every step draws the same numbers. All rows
    carry one date; the shape of a row says the configuration, whether blocks are recomputed,
    the number of tokens N and, where there are more than the query's, of alignment rows M.

    Args:
        batches: on any device.
        name: a configuration of ``megafold.model``.
        checkpointing: recompute blocks in the backward pass.
        captured: replay the step as CUDA graphs, see ``megafold.model.capture``; on a GPU, and
            not of what torch.compile compiles. What recordings hold counts with the peak.
        implementation: ``"megafold"`` (the operators that ``ops.use`` says), ``"eager"`` (all
            of them PyTorch's) or ``"compile"`` (the same, each block under ``torch.compile``, but
            where the sampler records a step of its own: that is of PyTorch's kernels).
        bfloat16: compute in it where it suffices (autocast).
        seconds: how long to repeat each step.
        around: device, versions and date of the rows; default: as they are now.

    Raises:
        ValueError: unknown implementation, or one that cannot be captured here.
        MemoryError, torch.OutOfMemoryError: a step does not fit into memory.
    """
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(
            f"unknown implementation {implementation!r}; choose one of {IMPLEMENTATIONS}"
        )
    device = torch.device(device)
    if captured and (implementation == "compile" or device.type != "cuda"):
        raise ValueError(
            "captured steps need a GPU and another implementation than 'compile'; "
            f"got {device}, {implementation!r}"
        )
    config = replace(CONFIGS[name], checkpointing=checkpointing)
    torch.manual_seed(0)
    model = AlphaFold3(config).to(device)
    if implementation == "compile":
        compile_blocks(model)
    trainer = Trainer(model, TrainConfig(bfloat16=bfloat16, captured=captured))
    around = around or environment(device)
    for batch in batches:
        with _operators(implementation):
            cost = _step_cost(trainer, batch.to(device), device, seconds, implementation, around)
        yield cost


def with_alignment(batch: Batch, rows: int) -> Batch:
    """The batch with so many rows of alignment, below the query's drawn at random.

    What they say changes nothing about what a step costs.

    Raises:
        ValueError: fewer than one row.
    """
    if rows < 1:
        raise ValueError(f"an alignment has at least 1 row, the query; got {rows}")
    generator = torch.Generator().manual_seed(SEED)
    query = batch.msa[:1].cpu()
    drawn = torch.randint(NUM_RESTYPES, (rows - 1, query.shape[1]), generator=generator)
    device = batch.msa.device
    none = torch.zeros(rows, query.shape[1], device=device)
    return replace(
        batch,
        msa=torch.cat([query, drawn]).to(device),
        msa_mask=batch.token_mask.expand(rows, -1).contiguous(),
        has_deletion=none,
        deletion_value=none.clone(),
    )


def compile_blocks(model: AlphaFold3) -> None:
    """Put every block of the model's stacks under ``torch.compile``, in place.

    Blocks of one kind share what is compiled. While a CUDA graph is recorded nothing can be
    compiled, and blocks run as they are.
    """
    for stack in model.modules():
        if isinstance(stack, Blocks):
            for block in stack:
                block.forward = _unless_recording(block.forward)


def _unless_recording(forward: Callable[..., Any]) -> Callable[..., Any]:
    compiled = torch.compile(forward, dynamic=False)

    def call(*args: Any) -> Any:
        recording = torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()
        return (forward if recording else compiled)(*args)

    return call


def _operators(implementation: str) -> AbstractContextManager[None]:
    return nullcontext() if implementation == "megafold" else ops.use("torch")


def _step_cost(
    trainer: Trainer,
    batch: Batch,
    device: torch.device,
    seconds: float,
    implementation: str,
    around: Environment,
) -> Record:
    config = trainer.model.config

    def step() -> float:
        trainer.generator.manual_seed(SEED)
        return trainer.step(batch).seconds

    if trainer.config.captured:
        for _ in range(PLAIN_CALLS + 1):  # the last of which is recorded
            step()
    rows = min(len(batch.msa), config.msa_rows)
    how = " checkpointed" * config.checkpointing + " captured" * trainer.config.captured
    how += f" M{rows}" if rows > 1 else ""
    timing = measure.time_call(step, device, seconds=seconds, min_repeats=2)
    # The last step's gradients would be released inside the next one and blur its peak.
    trainer.model.zero_grad(set_to_none=True)
    return Record(
        op="train_step",
        shape=f"{config.name}{how} N{batch.num_tokens}",
        dtype="bfloat16" if trainer.config.bfloat16 else "float32",
        impl=implementation,
        direction="full",
        ms=timing.ms,
        ms_q1=timing.ms_q1,
        ms_q3=timing.ms_q3,
        peak_mb=(memory.peak_bytes(step, device) + memory.recorded_bytes(device)) / memory.MB,
        error=None,
        **asdict(around),
    )

"""The training step: optimiser, schedule, clipping and the running average of the weights.

As in AlphaFold 3 (supplement, section 5.4).
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from typing import Any

import torch

from megafold.data.batch import Batch
from megafold.model import AlphaFold3, Losses, training_loss
from megafold.model.capture import CapturedSteps
from megafold.model.losses import NoiseWeighting
from megafold.model.stages import stage_from_name


@dataclass(frozen=True)
class TrainConfig:
    """Settings of a run. The defaults are AlphaFold 3's."""

    learning_rate: float = 1.8e-3
    warmup_steps: int = 1000
    decay: float = 0.95  # of the learning rate, every decay_steps
    decay_steps: int = 50_000
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    clip_norm: float = 10.0
    ema_decay: float = 0.999
    noise_weighting: NoiseWeighting = "karras"
    stage: str = "initial"  # of megafold.model.STAGES: which losses count
    seed: int = 0
    # Compute in bfloat16 (autocast) where it suffices; weights and optimiser stay float32.
    bfloat16: bool = False
    # On a GPU: replay steps of one shape as CUDA graphs, see megafold.model.capture.
    captured: bool = False

    def learning_rate_at(self, step: int) -> float:
        """Learning rate of step 0, 1, ...: linear warm-up, then staircase decay."""
        warmup = min(1.0, (step + 1) / max(self.warmup_steps, 1))
        return self.learning_rate * warmup * self.decay ** (step // self.decay_steps)


@dataclass(frozen=True)
class StepRecord:
    """What one step did. Losses are plain numbers by name."""

    step: int
    losses: dict[str, float]
    gradient_norm: float  # before clipping
    learning_rate: float
    seconds: float


class Trainer:
    """Owns the model's optimiser, its random generator and its averaged copy.

    >>> trainer = Trainer(AlphaFold3.from_name("tiny"), TrainConfig())
    >>> record = trainer.step(batch)
    >>> coordinates = sample(trainer.averaged, batch, generator=generator)
    """

    def __init__(self, model: AlphaFold3, config: TrainConfig) -> None:
        self.model = model
        self.config = config
        self._stage = stage_from_name(config.stage)
        self.generator = torch.Generator().manual_seed(config.seed)
        self.history: list[StepRecord] = []
        self._captured = CapturedSteps() if config.captured else nullcontext()
        self._parameters = list(model.parameters())  # to walk a large model takes milliseconds
        self.averaged = AlphaFold3(model.config).to(next(model.parameters()).device)
        self.averaged.load_state_dict(model.state_dict())
        self.averaged.requires_grad_(False).eval()
        self._averages = list(self.averaged.parameters())
        self._optimizer = torch.optim.Adam(
            self._parameters,
            lr=config.learning_rate,
            betas=config.betas,
            eps=config.eps,
            fused=True,
        )

    def step(self, batch: Batch) -> StepRecord:
        """One forward, backward and update on one example.

        Raises ``FloatingPointError`` if a loss (named) or the gradient is not finite; the
        weights are then those of before the step.
        """
        start = time.perf_counter()
        step = len(self.history)
        rate = self.config.learning_rate_at(step)
        for group in self._optimizer.param_groups:
            group["lr"] = rate
        if not self.model.training:
            self.model.train()
        device = batch.positions.device.type
        with self._captured, torch.autocast(device, torch.bfloat16, self.config.bfloat16):
            losses = self._losses(batch, step)
        self._optimizer.zero_grad(set_to_none=True)  # thousands, while the GPU has work
        losses.total.backward()
        clipped = torch.nn.utils.clip_grad_norm_(self._parameters, self.config.clip_norm)
        # The update is queued before anybody looks at what the GPU has found, which waits for it;
        # it is left out where this is not finite.
        found = torch.cat([losses.as_tensor(), clipped[None]])
        self._optimizer.found_inf = (~found.isfinite().all()).float()
        arrives = _on_its_way(found)
        self._optimizer.step()
        *values, norm = arrives()  # while the GPU is at the update
        losses_by_name = dict(zip(vars(losses), values, strict=True))
        looked_at = {f"{name} loss": value for name, value in losses_by_name.items()}
        for what, value in {**looked_at, "gradient norm": norm}.items():
            if not math.isfinite(value):
                raise FloatingPointError(f"the {what} is {value} at step {step}")
        self._update_average(step)
        record = StepRecord(step, losses_by_name, norm, rate, time.perf_counter() - start)
        self.history.append(record)
        return record

    def state(self) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        """All that the next steps depend on: tensors by name, and what JSON holds.

        See :meth:`restore`.
        """
        device = next(self.model.parameters()).device
        moments = self._optimizer.state_dict()["state"]
        tensors = {
            **{f"model.{name}": t for name, t in self.model.state_dict().items()},
            **{f"averaged.{name}": t for name, t in self.averaged.state_dict().items()},
            **{f"optimizer.{i}.{n}": t for i, of in moments.items() for n, t in of.items()},
            "generator": self.generator.get_state(),
            "random": torch.get_rng_state(),  # dropout draws from torch's own
        }
        if device.type == "cuda":
            tensors["random_of_gpu"] = torch.cuda.get_rng_state(device)
        history = [asdict(record) for record in self.history]
        return tensors, {**self._settings(), "history": history}

    def restore(self, tensors: dict[str, torch.Tensor], rest: dict[str, Any]) -> None:
        """Go on from where a trainer of the same model and settings was (:meth:`state`).

        torch's own random numbers go on from there, too.

        Raises:
            ValueError: model or settings were others; names them. Nothing has changed then.
        """
        differ = [
            f"{name} was {rest[part].get(name)!r} and is {value!r}"
            for part, settings in self._settings().items()
            for name, value in settings.items()
            if rest[part].get(name) != value
        ]
        if differ:
            raise ValueError(f"the state is of another training: {'; '.join(differ)}")

        def part_of(prefix: str) -> dict[str, torch.Tensor]:
            whole = f"{prefix}."
            return {n.removeprefix(whole): t for n, t in tensors.items() if n.startswith(whole)}

        self.model.load_state_dict(part_of("model"))
        self.averaged.load_state_dict(part_of("averaged"))
        moments: dict[int, dict[str, torch.Tensor]] = {}
        for name, tensor in part_of("optimizer").items():
            parameter, what = name.split(".")
            moments.setdefault(int(parameter), {})[what] = tensor
        self._optimizer.load_state_dict({**self._optimizer.state_dict(), "state": moments})
        self.generator.set_state(tensors["generator"])
        torch.set_rng_state(tensors["random"])
        device = next(self.model.parameters()).device
        if device.type == "cuda" and "random_of_gpu" in tensors:
            torch.cuda.set_rng_state(tensors["random_of_gpu"], device)
        self.history = [StepRecord(**record) for record in rest["history"]]

    def _settings(self) -> dict[str, dict[str, Any]]:
        config = asdict(self.config)
        return {
            "model_config": asdict(self.model.config),
            "config": {**config, "betas": list(config["betas"])},  # as JSON gives them back
        }

    def _losses(self, batch: Batch, step: int) -> Losses:
        try:
            return training_loss(
                self.model,
                batch,
                generator=self.generator,
                noise_weighting=self.config.noise_weighting,
                stage=self._stage,
            )
        except FloatingPointError as error:
            raise FloatingPointError(f"{error} (at step {step})") from error

    @torch.no_grad()
    def _update_average(self, step: int) -> None:
        # Early on the average follows closely, so that it does not remember the start.
        decay = min(self.config.ema_decay, (1 + step) / (10 + step))
        torch._foreach_lerp_(self._averages, self._parameters, 1.0 - decay)


def _on_its_way(numbers: torch.Tensor) -> Callable[[], list[float]]:
    """Numbers as a list, once they are there; until then a GPU may be given more to do."""
    if not numbers.is_cuda:
        return numbers.tolist
    here = torch.empty(numbers.shape, dtype=numbers.dtype, pin_memory=True)
    here.copy_(numbers, non_blocking=True)
    there = torch.cuda.Event()
    there.record()

    def arrived() -> list[float]:
        there.synchronize()
        return here.tolist()

    return arrived

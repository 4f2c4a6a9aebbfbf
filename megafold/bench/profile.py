"""One training step of the model, taken apart: what it calls and what its memory holds."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from megafold.bench import memory
from megafold.model import AlphaFold3, ModelConfig, training_loss

if TYPE_CHECKING:
    from megafold.data.batch import Batch


class TrainingStep:
    """A model, Adam and one example, on the example's device.

    Every method runs the step anew with the same random numbers, and with the operator backend
    in force. Parameters change where the optimizer runs (``memory`` and ``peak``).

    Args:
        config: sizes of the model; its weights are drawn anew.
        batch: one example.
        seed: of the weights and of the step's own randomness.
    """

    def __init__(self, config: ModelConfig, batch: Batch, seed: int = 0) -> None:
        self.batch = batch
        self.device = batch.positions.device
        self.seed = seed
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.model = AlphaFold3(config).to(self.device)
        self.optimizer = torch.optim.Adam(self.model.parameters())
        self.num_parameters = sum(p.numel() for p in self.model.parameters())

    def loss(self) -> torch.Tensor:
        """The forward pass."""
        generator = torch.Generator().manual_seed(self.seed)
        return training_loss(self.model, self.batch, generator=generator).total

    def run(self) -> None:
        """Forward, backward and update."""
        self.optimizer.zero_grad(set_to_none=True)
        self.loss().backward()
        self.optimizer.step()

    def calls(self) -> dict[str, int]:
        """Operator calls of the forward and the backward pass, by kind."""
        self.optimizer.zero_grad(set_to_none=True)
        with memory.OperatorCounter() as counter:
            self.loss().backward()
        return counter.by_kind()

    def saved(self) -> list[memory.SavedTensor]:
        """What autograd keeps between the forward and the backward pass."""
        existing = [*self.model.parameters(), *self.model.buffers(), *self._tensors()]
        return memory.saved_tensors(self.loss, existing)

    def memory(self) -> memory.TrainingMemory:
        """Memory by what it holds."""
        return memory.training_memory(self.model, self.optimizer, self.loss, self._tensors())

    def peak(self) -> int:
        """The most memory in use during a step beyond parameters and example, in bytes.

        Gradients count; so does the optimizer's state where this is the first step.
        """
        self.optimizer.zero_grad(set_to_none=True)
        return memory.peak_bytes(self.run, self.device)

    def _tensors(self) -> list[torch.Tensor]:
        return [t for t in vars(self.batch).values() if isinstance(t, torch.Tensor)]

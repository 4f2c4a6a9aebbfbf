"""AlphaFold 3: the trunk with recycling (Algorithm 1) and what hangs on it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn

from megafold.model.capture import captured
from megafold.model.config import ModelConfig, config_from_name
from megafold.model.diffusion import DiffusionModule, Trunk
from megafold.model.embedders import InputEmbedder, RelativePosition
from megafold.model.heads import ConfidenceHead, DistogramHead
from megafold.model.msa import MSAModule
from megafold.model.pairformer import Pairformer
from megafold.model.primitives import LayerNormLinear
from megafold.model.template import TemplateEmbedder
from megafold.model.windows import AtomWindows

if TYPE_CHECKING:
    from megafold.data.batch import Batch


class Cycle(nn.Module):
    """One cycle of the trunk (Algorithm 1, lines 7 to 14), of layers that belong to the model.

    By itself, so that what is recorded of it has the trunk's weights alone.
    """

    def __init__(self, model: AlphaFold3) -> None:
        super().__init__()
        self.recycle_z = model.recycle_z
        self.template_embedder = model.template_embedder
        self.msa_module = model.msa_module
        self.recycle_s = model.recycle_s
        self.pairformer = model.pairformer

    def forward(
        self,
        batch: Batch,
        rows: torch.Tensor,
        initial: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
        s: torch.Tensor,
        z: torch.Tensor,
        pair_mask: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """s ``[N, c_s]`` and z ``[N, N, c_z]`` from those before.

        ``initial`` is what the input embedder gave, ``rows`` are the alignment rows to read.
        """
        s_inputs, s_init, z_init = initial
        z = z_init + self.recycle_z(z)
        z = z + self.template_embedder(batch, z, pair_mask)
        z = self.msa_module(batch, rows, s_inputs, z, pair_mask)
        s = s_init + self.recycle_s(s)
        return self.pairformer(s, z, batch.token_mask, pair_mask)


class AlphaFold3(nn.Module):
    """The whole model. Its forward is the trunk; ``training_loss`` and ``sample`` use it."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.input_embedder = InputEmbedder(config)
        self.recycle_z = LayerNormLinear(config.c_z, config.c_z, init="final")
        self.recycle_s = LayerNormLinear(config.c_s, config.c_s, init="final")
        self.template_embedder = TemplateEmbedder(config)
        self.msa_module = MSAModule(config)
        self.pairformer = Pairformer(config, config.pairformer_blocks)
        self.diffusion = DiffusionModule(config)
        self.distogram_head = DistogramHead(config)
        self.confidence_head = ConfidenceHead(config)
        # No submodule: its parameters have their names already.
        object.__setattr__(self, "cycle", Cycle(self))

    @classmethod
    def from_name(cls, name: str) -> AlphaFold3:
        """The model of a named configuration: ``tiny``, ``small`` or ``af3``."""
        return cls(config_from_name(name))

    def forward(self, batch: Batch, *, generator: torch.Generator, cycles: int) -> Trunk:
        """Run the trunk ``cycles`` times; only the last carries a gradient (Algorithm 1).

        ``generator``, on the CPU, draws the alignment rows that each cycle reads.
        """
        windows = AtomWindows.of(batch.atom_mask)
        relative = RelativePosition.of(batch)
        pair_mask = batch.token_mask[:, None] & batch.token_mask[None, :]
        initial = captured(self.input_embedder, batch, windows, relative)
        s_inputs, s_init, z_init = initial
        s, z = torch.zeros_like(s_init), torch.zeros_like(z_init)
        for cycle in range(cycles):
            last = cycle == cycles - 1
            rows = self.msa_module.draw_rows(batch, generator)
            with torch.set_grad_enabled(torch.is_grad_enabled() and last):
                s, z = captured(self.cycle, batch, rows, initial, s, z, pair_mask)
        return Trunk(s_inputs, s, z, relative, windows)

    def num_parameters(self) -> int:
        """How many trainable numbers the model has."""
        return sum(p.numel() for p in self.parameters())

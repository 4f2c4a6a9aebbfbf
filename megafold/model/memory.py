"""How much memory a batch will take, and an error before it is taken if there is not enough.

The estimate adds up the tensors that dominate: the pair representation and what one block makes
of it, alignment rows, and the noised copies of tokens and atoms. Its factors are measured, and a
test holds them; it is meant to be a little low, as a batch that fits must not be refused.

Shape letters: N tokens, A atoms, M alignment rows, S noised copies.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from megafold import ops
from megafold.model.config import ModelConfig

if TYPE_CHECKING:
    from megafold.data.batch import Batch
    from megafold.model.alphafold3 import AlphaFold3

# Tensors of the size of its input that one block holds at its peak. (Fused: training steps of
# `small` on an H100, of 256 tokens in fp32 and of 384 and 768 in bf16, took 62 to 66; those in
# bf16 had a pair stream in fp32 then.)
PAIR_TRAINING, PAIR_FUSED, PAIR_SAMPLING = 85, 55, 12
ROWS_TRAINING, ROWS_SAMPLING = 25, 8  # alignment rows, tokens and atoms alike
LOGITS_TRAINING, LOGITS_SAMPLING = 3, 2  # attention, where no kernel is fused
QUERIES, KEYS = 32, 128


class BatchTooLargeError(MemoryError):
    """The batch will not fit into the memory of its device."""


def estimate_memory(
    config: ModelConfig,
    tokens: int,
    atoms: int,
    rows: int,
    samples: int,
    *,
    training: bool,
    fused: bool,
    element_size: int = 4,
) -> int:
    """Bytes at the peak, beside weights and optimiser; the weights' gradients count.

    Args:
        config: Of the model.
        tokens: N.
        atoms: A.
        rows: M, alignment rows that a cycle draws.
        samples: S.
        training: With gradients and what they need, or without.
        fused: Whether attention runs in kernels that keep no logits.
        element_size: Bytes of an activation: 4, or 2 under autocast.
    """
    act = ROWS_TRAINING if training else ROWS_SAMPLING
    logits = 0 if fused else LOGITS_TRAINING if training else LOGITS_SAMPLING
    pair_factor = PAIR_SAMPLING if not training else PAIR_FUSED if fused else PAIR_TRAINING
    pair = tokens**2 * config.c_z
    cubic = min(logits, 2) * config.triangle_heads * tokens**3
    pair_block = pair_factor * pair + cubic
    msa = act * min(rows, config.msa_rows) * tokens * config.c_m
    token_stream = samples * tokens * config.c_token
    token_block = act * token_stream + logits * samples * config.diffusion_heads * tokens**2
    windows = -(-atoms // QUERIES)
    atom_stream = samples * atoms * config.c_atom
    atom_logits = logits * samples * windows * config.atom_heads * QUERIES * KEYS
    atom_block = act * atom_stream + atom_logits
    if not training:
        # What the denoiser computes once: the biases of its blocks, and weights side by side.
        weights = config.c_token * (6 * config.c_s + 8 * config.c_token)
        of_block = config.diffusion_heads * tokens**2 + weights
        given = 2 * pair + config.diffusion_blocks * of_block
        return element_size * max(pair_block + msa, given + token_block, given + atom_block)
    stacks = {  # number of blocks, what one holds, what one keeps with checkpointing
        "msa": (config.msa_blocks, pair_block + msa, pair),
        "pairformer": (config.pairformer_blocks, pair_block, pair),
        "confidence": (config.confidence_blocks, pair_block, pair),
        "tokens": (config.diffusion_blocks, token_block, token_stream),
        "atoms": (2 * config.atom_blocks, atom_block, atom_stream),
    }
    if config.checkpointing:
        kept = sum(number * keeps for number, _, keeps in stacks.values())
        return element_size * (kept + max(holds for _, holds, _ in stacks.values()))
    return element_size * sum(number * holds for number, holds, _ in stacks.values())


def check_memory(model: AlphaFold3, batch: Batch, *, samples: int, training: bool) -> None:
    """Raise ``BatchTooLargeError`` if the batch will not fit what the device has left.

    Where the device does not say how much that is, nothing is checked.
    """
    device = batch.positions.device
    available = available_memory(device)
    if available is None:
        return
    config, rows = model.config, batch.msa.shape[0]

    def needed(tokens: int) -> int:
        return estimate_memory(
            config,
            tokens,
            atoms=-(-tokens * batch.num_atoms // batch.num_tokens),
            rows=rows,
            samples=samples,
            training=training,
            fused=device.type == "cuda" and ops.backend() != "torch",
            element_size=2 if torch.is_autocast_enabled(device.type) else 4,
        )

    need = needed(batch.num_tokens)
    if need <= available:
        return
    low, high = 0, batch.num_tokens
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if needed(middle) <= available else (low, middle)
    fewer = "crop it to" if training else "leave out chains, to have"
    advice = [f"{fewer} {low} tokens or fewer" if low else "take a smaller configuration"]
    if samples > 1:
        advice.append(f"take fewer than {samples} samples at once")
    if training and not config.checkpointing:
        advice.append("set checkpointing in the configuration")
    raise BatchTooLargeError(
        f"{'training on' if training else 'sampling'} {batch.num_tokens} tokens and "
        f"{batch.num_atoms} atoms with the configuration {config.name!r} takes about "
        f"{_gigabytes(need)}, and {device} has {_gigabytes(available)} left: {', or '.join(advice)}"
    )


def available_memory(device: torch.device) -> int | None:
    """Bytes that are free on the device; None where it does not say."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        # What PyTorch holds but does not use is free, too.
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    if device.type != "cpu":
        return None
    try:
        with open("/proc/meminfo", encoding="ascii") as file:
            rows = dict(line.split(":", 1) for line in file)
        return int(rows["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):  # not Linux
        return None


def _gigabytes(size: int) -> str:
    return f"{size / 1e9:,.1f} GB"

"""The kernels that a case launches: found without a GPU, or run on one with other block sizes.

There is one way for every operator: its public function, forward and backward, under
``megafold.ops.use("triton")``. What it launches and looks up on the way is kept.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from megafold import ops
from megafold.bench import accuracy
from megafold.bench.cases import PAIR_BLOCK, SHAPES, Case
from megafold.ops.precision import META, name_of
from megafold.ops.recording import Launch, launches
from megafold.ops.tuning import Asked, Config, Found, lookup, lookups, use_config
from megafold.ops.tuning.candidates import block_names, candidates, kernels
from megafold.ops.variants import KernelVariant

SEED = 20
OPERATORS = tuple(op for op in SHAPES if op != PAIR_BLOCK)


@dataclass(frozen=True)
class Tunable:
    """A kernel with block sizes in tables, as a case launches it."""

    kernel: str
    bits: int  # of an operand, as it is multiplied
    sizes: tuple[Mapping[str, int], ...]  # that its block sizes are looked up by; mostly one

    def in_force(self, device: torch.device) -> Found:
        """The configuration it runs with on a device now, and where it is from."""
        return lookup(self.kernel, device, self.bits, tuple(self.sizes[0].items()))


class Pass:
    """Forward and backward of a case by the kernels, on inputs of its own; every gradient asked.

    On the device ``meta`` nothing is computed: launches are recorded only.

    Args:
        zeros: instead of random inputs, which take long to draw.
    """

    def __init__(
        self, of: Case, device: torch.device, dtype: torch.dtype, *, zeros: bool = False
    ) -> None:
        self.case, self.device = of, device
        if zeros or device == META:
            self.inputs = {
                name: torch.zeros(one.shape, dtype=one.stored_as(dtype), device=device)
                for name, one in of.arguments.items()
            }
            self.grad = torch.zeros(of.output_shape, dtype=dtype, device=device)
        else:
            generator = torch.Generator().manual_seed(SEED)
            self.inputs = of.make_inputs(device, dtype, generator)
            self.grad = torch.randn(of.output_shape, generator=generator).to(device, dtype)

    def __call__(self) -> accuracy.Results:
        """The output and the gradients by name."""
        with ops.use("triton"):
            return accuracy.results(self.case.run, self.inputs, self.grad)

    def launched(self) -> tuple[accuracy.Results, list[Launch]]:
        """The same, and every launch in order."""
        with launches(run=self.device != META) as found:
            results = self()
        return results, found


def tunables(of: Case, dtype: torch.dtype) -> dict[str, Tunable]:
    """The kernels with block sizes in tables that a case launches, in order, by name.

    Raises:
        ValueError: it launches none.
    """
    with lookups() as asked:
        _, launched = Pass(of, META, dtype).launched()
    known = set(kernels())
    names = [one.kernel for one in launched if one.kernel in known]
    found = {name: _tunable(name, asked) for name in dict.fromkeys(names)}
    if not found:
        raise ValueError(
            f"{of.op} launches no kernel with tables of block sizes for {of.shape} "
            f"in {name_of(dtype)}"
        )
    return found


def _tunable(kernel: str, asked: list[Asked]) -> Tunable:
    own = [one for one in asked if one.kernel == kernel]
    sizes = tuple(dict(one) for one in dict.fromkeys(one.sizes for one in own))
    return Tunable(kernel, own[0].bits, sizes)


def tunable(of: Case, kernel: str, dtype: torch.dtype) -> Tunable:
    """One of :func:`tunables`.

    Raises:
        ValueError: the case does not launch this kernel.
    """
    found = tunables(of, dtype)
    if kernel not in found:
        raise ValueError(f"{of.shape} does not launch {kernel!r}; it launches {', '.join(found)}")
    return found[kernel]


def variant(of: Case, kernel: str, config: Config, dtype: torch.dtype) -> KernelVariant:
    """One kernel as a case has it compiled, at its first launch, with a configuration.

    Raises:
        ValueError: the case does not launch this kernel, or it has other block arguments.
    """
    names = tuple(block_names(kernel))
    if set(config.blocks) != set(names):
        raise ValueError(f"{kernel} has the blocks {names}, not {tuple(config.blocks)}")
    with use_config(kernel, config):
        _, launched = Pass(of, META, dtype).launched()
    first = next((one for one in launched if one.kernel == kernel), None)
    if first is None:
        raise ValueError(f"{of.shape} does not launch {kernel!r}")
    return first.variant(f"{kernel} {name_of(dtype)}")


def distinct_candidates(of: Case, kernel: str, dtype: torch.dtype) -> list[Config]:
    """The configurations worth trying for a kernel of a case, without those that run alike.

    Blocks are cut to the size of the problem, so that on a small one many do.
    """
    found, meta = tunable(of, kernel, dtype), Pass(of, META, dtype)
    first: dict[object, Config] = {}
    for config in candidates(kernel, found.bits).configs(found.sizes[0]):
        with use_config(kernel, config):
            _, launched = meta.launched()
        own = [one.launcher for one in launched if one.kernel == kernel]
        key = tuple(
            (one.grid, one.numbers, *one.constants.items(), *one.options.items()) for one in own
        )
        first.setdefault(key, config)
    return list(first.values())

"""What is measured: one registry of operator cases for tests, benchmarks, notebooks and widgets.

A case is an operator and its sizes, written as a short key::

    case = cases.case("evo_attention", "B1 S384 N384 H4 D32")
    inputs = case.make_inputs("cuda", torch.bfloat16, torch.Generator().manual_seed(0))
    out = case.run(inputs)
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from megafold import ops
from megafold.ops.registration import CONSTANT

Inputs = dict[str, torch.Tensor | None]
Sizes = Mapping[str, int]

DIRECTIONS = ("forward", "full")
PAIR_BLOCK = "pair_block"
MASKED = 0.1  # share of keys, or of pairs, that the mask leaves out
DROPPED = 0.25  # share of channels that dropout leaves out


@dataclass(frozen=True)
class Argument:
    """Shape of one tensor argument and how its values are drawn."""

    shape: tuple[int, ...]
    # "data", "weight", "scale", "offset", "mask", "dropout", "bias" (fp32 beside half inputs), or
    # "residual": added to the output, whose gradient is its own
    kind: str

    def draw(
        self, device: torch.device | str, dtype: torch.dtype, generator: torch.Generator
    ) -> torch.Tensor:
        """Random values on ``device``; the same on every device for the same generator."""
        if self.kind == "mask":
            keep = torch.rand(self.shape, generator=generator) >= MASKED
            return keep.to(device)
        if self.kind == "dropout":
            keep = torch.rand(self.shape, generator=generator) >= DROPPED
            return (keep / (1 - DROPPED)).to(device, dtype)
        values = torch.randn(self.shape, generator=generator)
        if self.kind == "weight":  # outputs of about unit variance
            values *= self.shape[-1] ** -0.5
        elif self.kind == "scale":
            values = 1 + 0.1 * values
        elif self.kind == "offset":
            values *= 0.1
        return values.to(device, self.stored_as(dtype))

    def stored_as(self, dtype: torch.dtype) -> torch.dtype:
        """The dtype of this argument when the case runs in ``dtype``."""
        if self.kind == "mask":
            return torch.bool
        return torch.promote_types(dtype, torch.float32) if self.kind == "bias" else dtype


@dataclass(frozen=True)
class Case:
    """One operator at one size."""

    op: str
    shape: str  # the key: "B1 S384 N384 H4 D32"
    arguments: Mapping[str, Argument]
    options: Mapping[str, Any]  # keyword arguments that are no tensors
    output_shape: tuple[int, ...]
    forward_flops: int

    @property
    def function(self) -> Callable[..., torch.Tensor]:
        """The public operator, or the block of the model."""
        return _pair_block().pair_block if self.op == PAIR_BLOCK else getattr(ops, self.op)

    @property
    def reference(self) -> Callable[..., torch.Tensor]:
        """The equation in plain PyTorch."""
        if self.op == PAIR_BLOCK:
            return _pair_block().reference
        return getattr(ops.reference, self.op)

    def make_inputs(
        self, device: torch.device | str, dtype: torch.dtype, generator: torch.Generator
    ) -> Inputs:
        """Draw every tensor argument, by name.

        Args:
            generator: a CPU generator; the values do not depend on the device.
        """
        return {
            name: argument.draw(device, dtype, generator)
            for name, argument in self.arguments.items()
        }

    def run(self, inputs: Inputs) -> torch.Tensor:
        """Call the operator, whatever implementation ``megafold.ops.use`` says."""
        return self.function(**inputs, **self.options)

    def run_reference(self, inputs: Inputs) -> torch.Tensor:
        """Call the reference."""
        return self.reference(**inputs, **self.options)

    def flops(self, direction: str) -> int:
        """Floating point operations of the matrix products, nothing recomputed.

        A product of ``[m, k]`` and ``[k, n]`` counts 2 m k n; its backward pass is two such
        products. Elementwise work and softmax are left out, as is usual.
        """
        check_direction(direction)
        return self.forward_flops * (1 if direction == "forward" else 3)

    def bytes(self, direction: str, dtype: torch.dtype) -> int:
        """The least memory traffic: every input read and every result written once.

        The full direction reads inputs again for the backward pass, reads the gradient of the
        output and writes that of every input; a residual is not read again, and has no gradient
        to be written.
        """
        check_direction(direction)
        size = {
            name: math.prod(a.shape) * a.stored_as(dtype).itemsize
            for name, a in self.arguments.items()
        }
        forward = sum(size.values()) + self.result_bytes("forward", dtype)
        if direction == "forward":
            return forward
        again = sum(n for name, n in size.items() if self.arguments[name].kind != "residual")
        return forward + again + self.result_bytes("full", dtype)

    def result_bytes(self, direction: str, dtype: torch.dtype) -> int:
        """What a call leaves: the output and, in the full direction, the gradients of inputs.

        Every implementation holds it; the rest of its peak memory is its own.
        """
        check_direction(direction)
        output = math.prod(self.output_shape) * dtype.itemsize
        if direction == "forward":
            return output
        own = (a for a in self.arguments.values() if a.kind not in (*CONSTANT, "residual"))
        return output + sum(math.prod(a.shape) * a.stored_as(dtype).itemsize for a in own)


def differentiable(inputs: Inputs) -> dict[str, torch.Tensor]:
    """The inputs that have a gradient, by name."""
    given = {name: t for name, t in inputs.items() if t is not None and name not in CONSTANT}
    return {name: t for name, t in given.items() if t.is_floating_point()}


def check_direction(direction: str) -> None:
    """Raise ValueError for anything but ``"forward"`` and ``"full"``."""
    if direction not in DIRECTIONS:
        raise ValueError(f"unknown direction {direction!r}; choose one of {DIRECTIONS}")


def case(op: str, shape: str) -> Case:
    """The case of an operator at the sizes its key says.

    Args:
        op: the operator's name.
        shape: letters with numbers, in any order: ``"B1 S384 N384 H4 D32"``; see ``SHAPES``
            for the letters of each operator. Words are flags (``incoming``).

    Raises:
        ValueError: unknown operator, or a key that lacks a size or has one too many.
    """
    if op not in _BUILDERS:
        raise ValueError(f"unknown operator {op!r}; choose one of {tuple(_BUILDERS)}")
    letters, optional, build = _BUILDERS[op]
    sizes: dict[str, int] = {}
    for word in shape.split():
        match = re.fullmatch(r"([A-Z])(\d+)|([a-z]+)", word)
        if match is None:
            raise ValueError(f"{op}: cannot read {word!r} in shape {shape!r}")
        sizes[match[1] or match[3]] = int(match[2] or 1)
    missing = [letter for letter in letters.split() if letter not in sizes]
    unknown = [letter for letter in sizes if letter not in f"{letters} {optional}".split()]
    if missing or unknown:
        raise ValueError(
            f"{op}: shape {shape!r} needs {letters}, and may have {optional or 'nothing else'}; "
            f"missing {missing}, unknown {unknown}"
        )
    arguments, options, output_shape, flops = build(sizes)
    return Case(op, shape, arguments, options, output_shape, flops)


def registered(op: str | None = None, scale: str = "small") -> list[Case]:
    """The cases of one operator, or of all of them.

    Args:
        scale: ``"small"`` (seconds on a CPU) or ``"full"`` (the sizes of training, for a GPU).
    """
    names = tuple(SHAPES) if op is None else (op,)
    for name in names:
        if name not in SHAPES:
            raise ValueError(f"unknown operator {name!r}; choose one of {tuple(SHAPES)}")
    if scale not in ("small", "full"):
        raise ValueError(f'unknown scale {scale!r}; choose "small" or "full"')
    return [case(name, shape) for name in names for shape in SHAPES[name][scale]]


_Built = tuple[dict[str, Argument], dict[str, Any], tuple[int, ...], int]


def _evo_attention(n: Sizes) -> _Built:
    batch, rows, queries, heads, width = n["B"], n["S"], n["N"], n["H"], n["D"]
    keys = n.get("K", queries)
    arguments = {
        "q": Argument((batch, rows, queries, heads, width), "data"),
        "k": Argument((batch, rows, keys, heads, width), "data"),
        "v": Argument((batch, rows, keys, heads, width), "data"),
        "mask": Argument((batch, rows, keys), "mask"),
        "pair_bias": Argument((1 if "shared" in n else batch, heads, queries, keys), "bias"),
    }
    flops = 4 * batch * rows * heads * queries * keys * width
    return arguments, {}, arguments["q"].shape, flops


def _layer_norm_linear(n: Sizes) -> _Built:
    rows, channels, out = n["M"], n["C"], n["O"]
    arguments = {
        "x": Argument((rows, channels), "data"),
        "norm_weight": Argument((channels,), "scale"),
        "norm_bias": Argument((channels,), "offset"),
        "weight": Argument((out, channels), "weight"),
    }
    return arguments, {}, (rows, out), 2 * rows * channels * out


def _gated_linear(n: Sizes) -> _Built:
    tokens, channels = n["N"], n["C"]
    outs, pairs = n.get("O", channels), tokens * tokens
    arguments = {
        "x": Argument((tokens, tokens, channels), "data"),
        "gate": Argument((tokens, tokens, channels), "data"),
        "weight": Argument((outs, channels), "weight"),
        "residual": Argument((tokens, tokens, outs), "residual"),
        "dropout": Argument((1, tokens, outs), "dropout"),
    }
    return arguments, {}, arguments["residual"].shape, 2 * pairs * channels * outs


def _gated(n: Sizes) -> _Built:
    samples, tokens, channels = n["S"], n["N"], n["A"]
    gates = 1 if "shared" in n else samples
    arguments = {
        "x": Argument((samples, tokens, channels), "data"),
        "gate": Argument((gates, tokens, channels), "data"),
        "residual": Argument((samples, tokens, channels), "residual"),
    }
    return arguments, {}, arguments["x"].shape, 0


def _transition(n: Sizes) -> _Built:
    rows, channels, hidden = n["M"], n["C"], n["H"]
    arguments = {
        "x": Argument((rows, channels), "data"),
        "norm_weight": Argument((channels,), "scale"),
        "norm_bias": Argument((channels,), "offset"),
        "weight_gate": Argument((hidden, channels), "weight"),
        "weight_value": Argument((hidden, channels), "weight"),
        "weight_out": Argument((channels, hidden), "weight"),
    }
    return arguments, {}, (rows, channels), 6 * rows * channels * hidden


def _triangle_multiplication(n: Sizes) -> _Built:
    batch, tokens, channels = n["B"], n["N"], n["C"]
    pairs = batch * tokens * tokens
    arguments = {
        "z": Argument((batch, tokens, tokens, channels), "data"),
        "mask": Argument((batch, tokens, tokens), "mask"),
        "norm_in_weight": Argument((channels,), "scale"),
        "norm_in_bias": Argument((channels,), "offset"),
        "p_in_weight": Argument((2 * channels, channels), "weight"),
        "g_in_weight": Argument((2 * channels, channels), "weight"),
        "norm_out_weight": Argument((channels,), "scale"),
        "norm_out_bias": Argument((channels,), "offset"),
        "p_out_weight": Argument((channels, channels), "weight"),
        "g_out_weight": Argument((channels, channels), "weight"),
    }
    projections = 2 * pairs * channels * 6 * channels
    flops = projections + 2 * pairs * tokens * channels
    return arguments, {"outgoing": "incoming" not in n}, arguments["z"].shape, flops


def _triangle_attention(n: Sizes) -> _Built:
    batch, tokens, channels, heads = n["B"], n["N"], n["C"], n["H"]
    hidden = heads * n.get("D", channels // heads)
    pairs = batch * tokens * tokens
    arguments = {
        "z": Argument((batch, tokens, tokens, channels), "data"),
        "mask": Argument((batch, tokens, tokens), "mask"),
        "norm_weight": Argument((channels,), "scale"),
        "norm_bias": Argument((channels,), "offset"),
        **{f"{x}_weight": Argument((hidden, channels), "weight") for x in "qkv"},
        "b_weight": Argument((heads, channels), "weight"),
        "g_weight": Argument((hidden, channels), "weight"),
        "out_weight": Argument((channels, hidden), "weight"),
        "dropout": Argument((batch, 1, tokens, channels), "dropout"),
    }
    projected = 4 * hidden + heads + -(4 * hidden + heads) % 16  # with what fills rows up
    flops = 2 * pairs * (channels * (projected + hidden) + 2 * tokens * hidden)
    options = {"starting": "ending" not in n, "residual": True}
    return arguments, options, arguments["z"].shape, flops


def _adaptive_layer_norm(n: Sizes) -> _Built:
    samples, tokens, channels, condition = n["S"], n["N"], n["A"], n["C"]
    conditions = 1 if "shared" in n else samples
    arguments = {
        "a": Argument((samples, tokens, channels), "data"),
        "s": Argument((conditions, tokens, condition), "data"),
        "norm_weight_s": Argument((condition,), "scale"),
        "weight_gate": Argument((channels, condition), "weight"),
        "bias_gate": Argument((channels,), "offset"),
        "weight_shift": Argument((channels, condition), "weight"),
    }
    return arguments, {}, arguments["a"].shape, 4 * conditions * tokens * channels * condition


def _conditioned_transition(n: Sizes) -> _Built:
    samples, tokens, channels, condition, hidden = n["S"], n["N"], n["A"], n["C"], n["H"]
    conditions = 1 if "shared" in n else samples
    arguments = {
        "a": Argument((samples, tokens, channels), "data"),
        "s": Argument((conditions, tokens, condition), "data"),
        "norm_weight_s": Argument((condition,), "scale"),
        "norm_weight_gate": Argument((channels, condition), "weight"),
        "norm_bias_gate": Argument((channels,), "offset"),
        "norm_weight_shift": Argument((channels, condition), "weight"),
        "weight_gate": Argument((hidden, channels), "weight"),
        "weight_value": Argument((hidden, channels), "weight"),
        "weight_out": Argument((channels, hidden), "weight"),
        "weight_scale": Argument((channels, condition), "weight"),
        "bias_scale": Argument((channels,), "offset"),
    }
    flops = 6 * tokens * channels * (conditions * condition + samples * hidden)
    return arguments, {}, arguments["a"].shape, flops


def _pair_block_case(n: Sizes) -> _Built:
    tokens, channels, heads = n["N"], n["C"], n["H"]
    pairs = tokens * tokens
    arguments = {
        "z": Argument((tokens, tokens, channels), "data"),
        "mask": Argument((tokens, tokens), "mask"),
    }
    for name, parameter in _pair_block().parameters(channels, heads).items():
        kind = "weight"
        if parameter.dim() == 1:
            kind = "scale" if name.endswith("weight") else "offset"
        arguments[name] = Argument(tuple(parameter.shape), kind)
    projected = 2 * 6 * channels + 2 * (5 * channels + heads) + 12 * channels
    triangles = 2 * tokens * channels + 2 * 2 * tokens * channels
    flops = 2 * pairs * (channels * projected + triangles)
    return arguments, {"heads": heads}, arguments["z"].shape, flops


def _pair_block():  # its module loads the model, which most who read cases do not need
    from megafold.bench import pair_block

    return pair_block


# Letters of the key, optional ones, and what builds the case.
_BUILDERS: dict[str, tuple[str, str, Callable[[Sizes], _Built]]] = {
    "evo_attention": ("B S N H D", "K shared", _evo_attention),
    "layer_norm_linear": ("M C O", "", _layer_norm_linear),
    "gated_linear": ("N C", "O", _gated_linear),
    "gated": ("S N A", "shared", _gated),
    "transition": ("M C H", "", _transition),
    "triangle_multiplication": ("B N C", "incoming", _triangle_multiplication),
    "triangle_attention": ("B N C H", "D ending", _triangle_attention),
    PAIR_BLOCK: ("N C H", "", _pair_block_case),
    "adaptive_layer_norm": ("S N A C", "shared", _adaptive_layer_norm),
    "conditioned_transition": ("S N A C H", "shared", _conditioned_transition),
}

# The keys measured by default. "full" has the sizes of AlphaFold 3's training and those of the
# paper's kernel plots.
SHAPES: dict[str, dict[str, tuple[str, ...]]] = {
    "evo_attention": {
        "small": (
            "B1 S32 N32 H4 D32",  # triangle attention
            "B1 S64 N64 H4 D32",
            "B1 S1 N128 H16 D24",  # attention with pair bias
            "B16 S1 N32 K128 H4 D32",  # windows of atoms
        ),
        "full": (
            "B1 S384 N384 H4 D32",  # triangle attention
            "B1 S768 N768 H4 D32",
            "B1 S1024 N1024 H4 D32",
            "B1 S1 N768 H16 D24",  # attention with pair bias
            "B1 S1 N2048 H16 D24",
            "B1 S48 N384 H16 D48",  # diffusion samples that share one bias
            "B4 S1 N128 H16 D64",  # the paper's plot
            "B4 S1 N256 H16 D64",
            "B4 S1 N512 H16 D64",
            "B4 S1 N1024 H16 D64",
        ),
    },
    "layer_norm_linear": {
        "small": ("M4096 C128 O16", "M4096 C128 O128"),
        "full": (
            "M147456 C128 O128",  # the pair representation of 384 tokens, and of 768
            "M147456 C128 O512",
            "M589824 C128 O512",
            "M147456 C128 O16",  # into a bias of 16 heads
            "M36864 C768 O384",  # tokens of the diffusion transformer
            "M384 C384 O1536",  # the single representation
            "M60000 C128 O16",  # the paper's plot
            "M80000 C128 O16",
            "M100000 C128 O16",
            "M150000 C128 O16",
            "M200000 C128 O16",
        ),
    },
    "gated_linear": {
        "small": ("N32 C128", "N64 C128"),
        "full": ("N384 C128", "N768 C128"),  # the end of triangle attention
    },
    "gated": {
        "small": ("S4 N64 A128", "S4 N256 A64 shared"),
        "full": (
            "S48 N384 A768",  # tokens: the end of attention with pair bias
            "S48 N9216 A128 shared",  # atoms, whose condition all samples share
        ),
    },
    "transition": {
        "small": ("M1024 C128 H512", "M4096 C128 H512"),
        "full": (
            "M147456 C128 H512",  # the pair representation of 384 tokens, and of 768
            "M589824 C128 H512",
            "M768 C384 H1536",  # the single representation
            "M36864 C768 H1536",  # tokens of the diffusion transformer
            "M60000 C128 H512",  # the paper's plot
            "M80000 C128 H512",
            "M100000 C128 H512",
            "M150000 C128 H512",
            "M200000 C128 H512",
        ),
    },
    "triangle_multiplication": {
        "small": ("B1 N32 C128", "B1 N64 C128", "B1 N64 C128 incoming"),
        "full": ("B1 N384 C128", "B1 N768 C128", "B1 N768 C128 incoming"),
    },
    "triangle_attention": {
        "small": ("B1 N32 C128 H4", "B1 N64 C128 H4", "B1 N64 C128 H4 ending"),
        "full": ("B1 N384 C128 H4", "B1 N384 C128 H4 ending", "B1 N768 C128 H4"),
    },
    "adaptive_layer_norm": {
        "small": ("S4 N128 A768 C384", "S4 N256 A64 C64 shared"),
        "full": (
            "S48 N384 A768 C384",  # tokens, each sample with a condition of its own
            "S48 N9216 A128 C128 shared",  # atoms
        ),
    },
    "conditioned_transition": {
        "small": ("S4 N64 A128 C64 H256", "S4 N256 A64 C64 H128 shared"),
        "full": (
            "S48 N384 A768 C384 H1536",  # tokens
            "S48 N9216 A128 C128 H256 shared",  # atoms
        ),
    },
    PAIR_BLOCK: {
        "small": ("N16 C32 H4",),
        "full": ("N384 C128 H4", "N768 C128 H4"),
    },
}

"""The paper's values, as read off its figures (``data/reference``, arXiv 2506.20686).

They are good to about 1 %. Running out of memory is a value of its own: :data:`OOM`.
"""

from __future__ import annotations

import csv
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Literal, TypeVar

import megafold

SOURCE = "values read off the figures of arXiv 2506.20686, about 1 %"


class _OutOfMemory(Enum):
    OOM = "OOM"

    def __repr__(self) -> str:
        return "OOM"


OOM = _OutOfMemory.OOM
Value = float | Literal[_OutOfMemory.OOM]


@dataclass(frozen=True)
class Point:
    """One published value of one implementation."""

    device: str
    implementation: str  # eager, compile, deepspeed or megafold (the authors')
    tokens: int
    value: Value  # seconds or gigabytes, or OOM


@dataclass(frozen=True)
class Longest:
    """The longest sequence that trains on a number of GPUs."""

    device: str
    implementation: str
    gpus: int
    tokens: int


@dataclass(frozen=True)
class Calls:
    """How often one training step calls an operator."""

    model: str
    operator: str
    relation: Literal["about", "below"]
    calls: int


@dataclass(frozen=True)
class Claim:
    """A factor over PyTorch that an abstract of the paper claims, "up to"."""

    quantity: str  # step time, peak memory or longest sequence
    device: str
    factor: float


Row = TypeVar("Row")


def folder() -> Path:
    """``data/reference`` of the checkout that this package runs from.

    Raises:
        FileNotFoundError: the package was installed without a checkout around it.
    """
    path = Path(megafold.__file__).resolve().parents[1] / "data" / "reference"
    if not path.is_dir():
        raise FileNotFoundError(f"no {path}: the paper's values come with a checkout only")
    return path


def step_time() -> list[Point]:
    """Seconds of one training step against length."""
    return _read("step_time.csv", lambda row: _point(row, "seconds"))


def peak_memory() -> list[Point]:
    """Peak memory of one training step against length, in gigabytes."""
    return _read("peak_memory.csv", lambda row: _point(row, "gigabytes"))


def longest_sequence() -> list[Longest]:
    """Longest trainable sequence, in tokens, against the number of GPUs."""
    return _read(
        "longest_sequence.csv",
        lambda row: Longest(
            row["device"], row["implementation"], int(row["gpus"]), int(row["tokens"])
        ),
    )


def evo_attention_memory() -> list[tuple[int, float]]:
    """Tokens and gigabytes of activations that unfused EvoAttention keeps."""
    return _read(
        "evo_attention_memory.csv", lambda row: (int(row["tokens"]), float(row["gigabytes"]))
    )


def operator_calls() -> list[Calls]:
    """Operator calls in one training step, by model and operator."""
    return _read(
        "operator_calls.csv",
        lambda row: Calls(
            row["model"], row["operator"], _relation(row["relation"]), int(row["calls"])
        ),
    )


def claims() -> list[Claim]:
    """What the abstracts claim over PyTorch."""
    return _read(
        "claims.csv", lambda row: Claim(row["quantity"], row["device"], float(row["claim"]))
    )


def same_device(ours: str, paper: str) -> bool:
    """Whether a record's device is the kind the paper names: both say H200, or both MI250."""
    return paper.split()[-1] in ours


def _point(row: dict[str, str], unit: str) -> Point:
    value: Value = OOM if row[unit] == OOM.value else float(row[unit])
    return Point(row["device"], row["implementation"], int(row["tokens"]), value)


def _relation(text: str) -> Literal["about", "below"]:
    if text == "about" or text == "below":
        return text
    raise ValueError(f"relation is about or below, not {text!r}")


def _read(name: str, parse: Callable[[dict[str, str]], Row]) -> list[Row]:
    path = folder() / name
    with path.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    parsed = []
    for line, row in enumerate(rows, start=2):
        try:
            parsed.append(parse(row))
        except (KeyError, ValueError, TypeError) as error:
            raise ValueError(f"{path.name}, line {line}: {error!r}") from error
    return parsed

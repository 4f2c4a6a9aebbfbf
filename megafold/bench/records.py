"""Measurements as rows of CSV: the only source of the figures.

One file per device and operator, ``data/records/<device>/<op>.csv``; rows are only ever
appended. Rows of one run share one date.
"""

from __future__ import annotations

import datetime
import platform
import re
import subprocess
import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import ClassVar

import torch

import megafold
from megafold.bench import rows
from megafold.bench.cases import DIRECTIONS

IMPLEMENTATIONS = (
    "megafold", "eager", "compile", "sdpa", "flex", "cuequivariance", "trifast",
)  # fmt: skip


@dataclass(frozen=True)
class Record:
    """One measurement."""

    op: str  # the operator's name, or "pair_block", "train_step"
    shape: str  # the case's key: "B1 S384 N384 H4 D32"
    dtype: str  # "float32", "bfloat16", "float16"
    impl: str  # one of IMPLEMENTATIONS
    direction: str  # "forward" (no gradients) or "full" (forward + backward, every gradient)
    ms: float  # median milliseconds
    ms_q1: float  # first quartile
    ms_q3: float  # third quartile
    peak_mb: float  # most memory in use beyond the inputs, in 10^6 bytes
    error: float | None  # of the output (and of gradients), relative to fp64; None: not measured
    device: str  # in words: "NVIDIA H200", "AMD EPYC 9R14, 1 thread"
    driver: str  # of the GPU; empty on a CPU
    torch: str  # version
    triton: str  # version
    revision: str  # of this project: commit, with "+" where files were changed
    date: str  # when the run began, UTC, ISO 8601

    SUFFIX: ClassVar[str] = ""

    def __post_init__(self) -> None:
        if self.impl not in IMPLEMENTATIONS:
            raise ValueError(f"impl must be one of {IMPLEMENTATIONS}, not {self.impl!r}")
        if self.direction not in DIRECTIONS:
            raise ValueError(f"direction must be one of {DIRECTIONS}, not {self.direction!r}")


COLUMNS = rows.columns(Record)
SHIPPED = ("nvidia-h200", "nvidia-h100-80gb-hbm3")  # whose records stand for a GPU, best first


@dataclass(frozen=True)
class Environment:
    """What the rows of one run have in common."""

    device: str
    driver: str
    torch: str
    triton: str
    revision: str
    date: str


def environment(device: torch.device | str) -> Environment:
    """Describe this machine and this moment, for the rows of one run."""
    return Environment(
        device=device_description(device),
        driver=_driver(torch.device(device)),
        torch=torch.__version__,
        triton=_triton_version(),
        revision=revision(),
        date=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    )


def device_name(device: torch.device | str | None = None) -> str:
    """The name of the records' folder for a device: ``"cpu"``, ``"nvidia-h200"``.

    Args:
        device: None for the one ``megafold.device()`` gives.
    """
    device = megafold.device() if device is None else torch.device(device)
    if device.type == "cpu":
        return "cpu"
    return re.sub(r"[^a-z0-9]+", "-", torch.cuda.get_device_name(device).lower()).strip("-")


def device_description(device: torch.device | str) -> str:
    """The device in words; for a CPU its model and the number of threads PyTorch uses."""
    device = torch.device(device)
    if device.type != "cpu":
        return torch.cuda.get_device_name(device)
    threads = torch.get_num_threads()
    return f"{_processor()}, {threads} thread{'s' if threads > 1 else ''}"


def folder() -> Path:
    """Where records are kept in a checkout: ``data/records``.

    Raises:
        FileNotFoundError: this is an installation without the checkout's data.
    """
    records = Path(megafold.__file__).parents[1] / "data" / "records"
    if not records.parent.is_dir():
        raise FileNotFoundError(f"no records here: {records} is part of a checkout only")
    return records


def append(records: Iterable[Record], root: Path | str, device: str) -> list[Path]:
    """Append rows to ``root/<device>/<op>.csv``, one file per operator; see ``rows.append``."""
    return rows.append(Record, records, root, device)


def read(root: Path | str, device: str | None = None, op: str | None = None) -> list[Record]:
    """All rows below ``root``, of one device and one operator where given; see ``rows.read``."""
    return rows.read(Record, root, device, op)


def stored(op: str, device: str | None = None) -> list[Record]:
    """The checkout's records of an operator on this device; where there are none, on a CPU.

    Args:
        device: a folder of records; None for the one of this device.

    Raises:
        FileNotFoundError: not a checkout.
    """
    return read(folder(), device or device_name(), op) or read(folder(), "cpu", op)


def of_a_gpu(op: str) -> list[Record]:
    """The checkout's records of an operator on one GPU; empty where there are none.

    Of this GPU where it was measured; else of that with the most shapes, of as many the first in
    ``SHIPPED``.

    Raises:
        FileNotFoundError: not a checkout.
    """
    others = sorted(path.name for path in folder().iterdir() if path.is_dir())
    found = {d: read(folder(), d, op) for d in dict.fromkeys((*SHIPPED, *others)) if d != "cpu"}
    here = device_name()
    if found.get(here):
        return found[here]
    return max(found.values(), key=lambda of: len({r.shape for r in of}), default=[])


def to_draw(op: str) -> list[Record]:
    """What a figure of an operator's times shows: a GPU's records in bfloat16 (``of_a_gpu``).

    Where a checkout has none, a CPU's in float32, with a warning: no kernel runs there.

    Raises:
        FileNotFoundError: not a checkout.
    """
    found, dtype = of_a_gpu(op), "bfloat16"
    if not found:
        warnings.warn(
            f"no records of {op} on a GPU here; these are a CPU's, where no kernel runs",
            stacklevel=2,
        )
        found, dtype = read(folder(), "cpu", op), "float32"
    return [record for record in found if record.dtype == dtype]


def newest(records: Iterable[Record]) -> list[Record]:
    """The latest row of each (operator, shape, dtype, implementation, direction, device)."""
    latest: dict[tuple[str, ...], Record] = {}
    for r in sorted(records, key=lambda r: r.date):
        latest[(r.op, r.shape, r.dtype, r.impl, r.direction, r.device)] = r
    return list(latest.values())


def revision() -> str:
    """The commit this code is at, with ``+`` where tracked files differ; else the version."""
    checkout = Path(megafold.__file__).parents[1]
    describe = ["git", "-C", str(checkout), "describe", "--always", "--dirty=+", "--exclude=*"]
    try:
        return subprocess.run(describe, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):  # no git, or no checkout
        return megafold.__version__


def _processor() -> str:
    """The model of this machine's CPU, as the kernel names it."""
    info = Path("/proc/cpuinfo")
    if info.exists():
        found = re.search(r"^model name\s*:\s*(.+)$", info.read_text(), re.MULTILINE)
        if found:
            return found[1].strip()
    return platform.processor() or platform.machine()


def _driver(device: torch.device) -> str:
    if device.type != "cuda":
        return ""
    if torch.version.hip:
        return f"ROCm {torch.version.hip}"
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        out = subprocess.run(query, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return out.split()[0]


def _triton_version() -> str:
    try:
        return metadata.version("triton")
    except metadata.PackageNotFoundError:
        return "not installed"

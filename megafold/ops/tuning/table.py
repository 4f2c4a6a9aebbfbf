"""Tables of tuned block sizes: one JSON file for each device, read once.

A table is ``{"devices": [names], "entries": [...]}``; the first name is that of the device it
was measured on, the others are of devices that take it over. ``default.json`` is the table of
every other device: block sizes that fit every GPU the kernels compile for, without spilt
registers but for 8 bytes in two kernels of fp32 at D 128.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

FOLDER = Path(__file__).parent / "tables"
DEFAULT = "default"


@dataclass(frozen=True)
class Entry:
    """The block sizes of one kernel for operands of so many bits, around one size."""

    kernel: str  # "evo_attention.forward"
    bits: int  # of an operand, as it is multiplied: 16, 32, or 19 for fp32 in TF32
    sizes: Mapping[str, int]  # what the entry was measured at; a default has the width alone
    blocks: Mapping[str, int]  # the kernel's block arguments by name
    num_warps: int
    num_stages: int
    max_registers: int | None = None  # per thread; None: as the compiler likes


@cache
def measured_on() -> dict[str, str]:
    """The device that each table was measured on, by every device it is used for."""
    devices = (read_table(path)[0] for path in sorted(FOLDER.glob("*.json")))
    return {device: names[0] for names in devices for device in names}


@cache
def tables() -> dict[str, list[Entry]]:
    """Every shipped table by the name of a device, and the default."""
    found: dict[str, list[Entry]] = {}
    for path in sorted(FOLDER.glob("*.json")):
        devices, entries = read_table(path)
        for device in devices:
            found[device] = entries
    return found


def read_table(path: Path | str) -> tuple[list[str], list[Entry]]:
    """Devices and entries of a table.

    Raises:
        ValueError: the file is no table; says what is wrong with which entry.
    """
    path = Path(path)
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        return list(content["devices"]), [_entry(e) for e in content["entries"]]
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is no table of block sizes: {error!r}") from error


def _entry(fields: Mapping[str, object]) -> Entry:
    entry = Entry(**fields)
    for name in ("num_warps", "num_stages"):
        if not isinstance(getattr(entry, name), int):
            raise ValueError(f"{name} of {entry.kernel} must be a whole number")
    return entry

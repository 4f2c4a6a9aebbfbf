"""One entry of the cache as a file: safetensors, memory-mapped, with a checksum.

Every array of ``Features`` is one tensor. Those of alignment rows or templates by tokens are
stored tokens first, so that the columns of a crop are runs of bytes. Text is kept as rows of
character codes, since safetensors holds numbers only.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from megafold.data.errors import DataError
from megafold.data.features import ARRAY_FIELDS, COLUMN_FIELDS, FEATURE_VERSION, Features
from megafold.data.layout import AtomLayout

_TEXT_FIELDS = ("chain_id", "residue_name", "atom_name", "element", "chain_type")
_LAYOUT = "layout."
_CHECKSUM = "sha256"  # [32] uint8
_ARRAY_NAMES = {
    _CHECKSUM,
    *ARRAY_FIELDS,
    *(_LAYOUT + name for name in AtomLayout.__dataclass_fields__),
}
_DTYPES = {
    "BOOL": np.bool_, "U8": np.uint8, "I32": np.int32, "I64": np.int64, "F32": np.float32,
}  # fmt: skip


def write_entry(path: Path, features: Features) -> None:
    """Write features to ``path``; the same features give the same bytes."""
    from safetensors.numpy import save_file

    arrays = to_arrays(features)
    # An array and not metadata, of which safetensors writes more than one in random order.
    arrays[_CHECKSUM] = _checksum(arrays)
    save_file(arrays, path, {"feature_version": str(FEATURE_VERSION)})


def read_entry(path: Path, *, verify: bool = False) -> Features:
    """Features as views of one memory map: what is not looked at is not read.

    Args:
        path: A file of ``write_entry``.
        verify: Read all of it and hold it against the checksum it was written with.

    Raises:
        DataError: The file is cut, malformed or of another version, or ``verify`` finds that
            a byte has changed.
    """
    arrays = entry_arrays(path)
    checksum = arrays.pop(_CHECKSUM)
    if verify and not np.array_equal(checksum, _checksum(arrays)):
        raise _damaged(path, "its content has changed since it was written")
    return from_arrays(arrays)


def entry_arrays(path: Path) -> dict[str, np.ndarray]:
    """The arrays of an entry as they lie in its file, by name.

    Raises:
        DataError: As ``read_entry``.
    """
    arrays, feature_version = _map_file(path)
    if feature_version != str(FEATURE_VERSION):
        raise DataError(
            f"{path}: features of version {feature_version}, this is MegaFold for version "
            f"{FEATURE_VERSION}. Build the cache again; it makes only what has changed"
        )
    if missing := _ARRAY_NAMES - arrays.keys():
        raise _damaged(path, f"no {min(missing)}")
    return arrays


def to_arrays(features: Features) -> dict[str, np.ndarray]:
    """Features as contiguous arrays of numbers, by name."""
    arrays = {}
    for name in ARRAY_FIELDS:
        value = getattr(features, name)
        arrays[name] = value.swapaxes(0, 1) if name in COLUMN_FIELDS else value
    for name in AtomLayout.__dataclass_fields__:
        value = getattr(features.layout, name)
        if name in _TEXT_FIELDS:
            value = _to_codes(value)
        arrays[_LAYOUT + name] = value
    return {name: np.ascontiguousarray(value) for name, value in arrays.items()}


def from_arrays(arrays: Mapping[str, np.ndarray]) -> Features:
    """What ``to_arrays`` was given, without copying any numbers."""
    values: dict[str, Any] = {}
    for name in ARRAY_FIELDS:
        value = arrays[name]
        values[name] = value.swapaxes(0, 1) if name in COLUMN_FIELDS else value
    layout = {}
    for name in AtomLayout.__dataclass_fields__:
        value = np.asarray(arrays[_LAYOUT + name])
        if name in _TEXT_FIELDS:
            value = _to_text(value)
        layout[name] = value
    return Features(**values, layout=AtomLayout(**layout))


def _checksum(arrays: Mapping[str, np.ndarray]) -> np.ndarray:
    """Hash of what the arrays mean, however they lie in a file. [32] uint8."""
    digest = hashlib.sha256()
    for name, array in sorted(arrays.items()):
        digest.update(f"{name} {array.dtype} {array.shape}\n".encode())
        digest.update(np.ascontiguousarray(array).data)
    return np.frombuffer(digest.digest(), dtype=np.uint8)


def _to_codes(text: np.ndarray) -> np.ndarray:
    """Character codes, zero after the end. [A, width] uint8.

    Raises:
        DataError: A character is not ASCII, as all names in the PDB are.
    """
    codes = np.ascontiguousarray(text).view(np.uint32).reshape(len(text), -1)
    if codes.max(initial=0) > 127:
        raise DataError(f"{text[(codes > 127).any(axis=-1)][0]!r} is not ASCII")
    return codes.astype(np.uint8)


def _to_text(codes: np.ndarray) -> np.ndarray:
    wide = np.ascontiguousarray(codes, dtype=np.uint32)
    return wide.view(f"U{codes.shape[1]}")[:, 0]


def _map_file(path: Path) -> tuple[dict[str, np.ndarray], str]:
    """The tensors of a safetensors file as views of one memory map, and their version.

    The safetensors package maps files too, but copies each tensor whole when asked for it.
    The format: 8 bytes of header length, a JSON header with dtype, shape and offsets, bytes.
    """
    try:
        return view_arrays(np.memmap(path, dtype=np.uint8, mode="r"))
    except (ValueError, LookupError, TypeError, AttributeError, OverflowError) as error:
        raise _damaged(path, str(error)) from error


def view_arrays(raw: np.ndarray) -> tuple[dict[str, np.ndarray], str]:
    """The tensors in the bytes of a safetensors file ([n] uint8), as views, and their version."""
    start = 8 + int.from_bytes(raw[:8].tobytes(), "little")
    header = json.loads(raw[8:start].tobytes()) if start <= len(raw) else {}
    feature_version = header.pop("__metadata__")["feature_version"]
    end = start + max(entry["data_offsets"][1] for entry in header.values())
    if end != len(raw):
        raise ValueError(f"{len(raw)} bytes, its header says {end}")
    arrays = {}
    for name, entry in header.items():
        first, last = (start + offset for offset in entry["data_offsets"])
        flat = raw[first:last].view(_DTYPES[entry["dtype"]])
        arrays[name] = np.asarray(flat).reshape(entry["shape"])
    return arrays, feature_version


def _damaged(path: Path, why: str) -> DataError:
    return DataError(f"{path}: damaged cache entry ({why}); build the cache again")

"""Rows of one dataclass as CSV files, one for each device and operator; only ever appended.

A row's class says everything: the columns are its fields, their types how a cell is read
(``str``, ``int``, ``float``, or one of them ``| None``, for which a cell is empty), and its
``SUFFIX`` what follows the operator in the name of a file, ``<root>/<device>/<op><SUFFIX>.csv``.
"""

from __future__ import annotations

import csv
import io
import types
import typing
from collections.abc import Iterable
from dataclasses import astuple, fields
from pathlib import Path
from typing import ClassVar, Protocol, TypeVar

from megafold.atomic import atomic_write


class Row(Protocol):
    """What a class of rows has besides its fields."""

    SUFFIX: ClassVar[str]

    @property
    def op(self) -> str:
        """The operator whose file the row belongs to."""


SUFFIXES = ("_tuning", "_stores", "_steps")  # of all classes that have one
AnyRow = TypeVar("AnyRow", bound=Row)


def columns(kind: type[Row]) -> tuple[str, ...]:
    """The columns of a file of such rows."""
    return tuple(f.name for f in fields(kind))


def append(kind: type[AnyRow], rows: Iterable[AnyRow], root: Path | str, device: str) -> list[Path]:
    """Append rows, one file per operator; returns the files.

    Each file is replaced in one step: whoever reads sees all of the old rows or all of the new.

    Args:
        device: the folder's name, as ``records.device_name`` gives it.

    Raises:
        ValueError: a file that is there already has other columns; it is left as it is.
    """
    by_op: dict[str, list[AnyRow]] = {}
    for row in rows:
        by_op.setdefault(row.op, []).append(row)
    texts = {}
    for op, new in by_op.items():
        path = Path(root) / device / f"{op}{kind.SUFFIX}.csv"
        texts[path] = _to_csv(kind, [*(_read_file(kind, path) if path.exists() else []), *new])
    for path, text in texts.items():
        atomic_write(path, text.encode())
    return list(texts)


def read(
    kind: type[AnyRow], root: Path | str, device: str | None = None, op: str | None = None
) -> list[AnyRow]:
    """All rows below ``root``, of one device and one operator where given, in file order.

    Raises:
        FileNotFoundError: ``root`` is no folder.
        ValueError: a file's columns or a value are not those of the class.
    """
    root = Path(root)
    if not root.is_dir():
        raise FileNotFoundError(f"no folder of records at {root}")
    found = sorted(root.glob(f"{device or '*'}/{op or '*'}{kind.SUFFIX}.csv"))
    paths = [path for path in found if kind.SUFFIX or not path.stem.endswith(SUFFIXES)]
    return [row for path in paths for row in _read_file(kind, path)]


def _read_file(kind: type[AnyRow], path: Path) -> list[AnyRow]:
    expected = columns(kind)
    with path.open(newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        if tuple(reader.fieldnames or ()) != expected:
            raise ValueError(
                f"{path}: columns are {reader.fieldnames}, expected {','.join(expected)}"
            )
        hints = typing.get_type_hints(kind)
        return [_parse(kind, hints, path, number, row) for number, row in enumerate(reader, 2)]


def _parse(kind: type[AnyRow], hints, path: Path, number: int, row: dict[str, str]) -> AnyRow:
    try:
        return kind(**{name: _value(hints[name], cell) for name, cell in row.items()})
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path}, line {number}: {error}") from error


def _value(hint, cell: str) -> object:
    if isinstance(hint, types.UnionType):  # "float | None"
        if cell == "":
            return None
        hint = next(one for one in typing.get_args(hint) if one is not type(None))
    return hint(cell)


def _to_csv(kind: type[AnyRow], rows: list[AnyRow]) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(columns(kind))
    for row in rows:
        writer.writerow(_cell(value) for value in astuple(row))
    return text.getvalue()


def _cell(value: object) -> object:
    if value is None:
        return ""
    return f"{value:.6g}" if isinstance(value, float) else value

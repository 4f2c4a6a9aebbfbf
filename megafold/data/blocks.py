"""Structure files of any kind to the tables of mmCIF."""

from __future__ import annotations

import gzip
import re
from pathlib import Path
from typing import Any

import numpy as np
from biotite.structure.io import pdbx

from megafold.data import pdb_format
from megafold.data.errors import DataError

MMCIF_SUFFIXES = (".cif", ".mmcif")
SUFFIXES = (*MMCIF_SUFFIXES, ".bcif", *pdb_format.SUFFIXES)
# Of one assembly: some ten times the atoms of the largest capsids.
MAX_ATOMS = 50_000_000

# The archive writes assembly files in which the name of an item stands without a value.
_ITEM_WITHOUT_VALUE = re.compile(r"^_pdbx_struct_assembly\S*[ \t]*\r?\n(?=#)", re.MULTILINE)


def structure_name(path: str | Path) -> str:
    """The file's name without ``.cif`` and the like: ``1A8O`` for ``x/1A8O.cif.gz``."""
    name = Path(path).name.removesuffix(".gz")
    for suffix in SUFFIXES:
        name = name.removesuffix(suffix)
    return name


def read_block(path: str | Path) -> Any:
    """The first data block of a file, parsed lazily by biotite.

    Args:
        path: mmCIF (``.cif``, ``.mmcif``), BinaryCIF (``.bcif``) or PDB format (``.pdb``,
            ``.ent``), ``.gz`` or not.

    Raises:
        DataError: The file is missing, truncated, or not what its name says.
    """
    path = Path(path)
    if not path.is_file():
        raise DataError(f"{path}: no such file")
    kind = Path(path.name.removesuffix(".gz")).suffix
    if kind not in SUFFIXES:
        raise DataError(f"{path}: expected a name ending in {', '.join(SUFFIXES)} (or + .gz)")
    what = "PDB format" if kind in pdb_format.SUFFIXES else "mmCIF"
    try:
        opener = gzip.open if path.suffix == ".gz" else open
        with opener(path, "rb") as file:
            if kind == ".bcif":
                block = pdbx.BinaryCIFFile.read(file).block
            else:
                block = pdbx.CIFFile.deserialize(_mmcif_text(file.read(), kind)).block
        if "atom_site" not in block or block["atom_site"].row_count == 0:
            raise ValueError("no _atom_site category: no atoms")
    except (EOFError, gzip.BadGzipFile, OSError) as error:
        raise DataError(f"{path}: truncated or not gzip: {error}") from error
    except Exception as error:
        raise DataError(f"{path}: truncated or not {what}: {error}") from error
    return block


def _mmcif_text(content: bytes, kind: str) -> str:
    if kind in pdb_format.SUFFIXES:
        return pdb_format.pdb_to_mmcif(content)
    text = content.decode("utf-8", errors="replace")
    last = text.rstrip()
    last = last[last.rfind("\n") + 1 :]
    if last.startswith(("ATOM ", "HETATM ")) and re.search(r"^#\s*$", text, re.MULTILINE):
        raise ValueError(
            "it ends with a row of atoms, without the # that ends its other tables: the end of "
            "the file is missing"
        )
    return _ITEM_WITHOUT_VALUE.sub("", text)


def check_complete(block: Any) -> None:
    """Refuse a file that lost atoms, or one whose assembly would not fit any memory.

    Raises:
        DataError: A chain is listed that has no atom, or the first assembly has too many.
    """
    site = block["atom_site"]
    chains = site["label_asym_id"].as_array(str)
    if "struct_asym" in block:
        listed = set(block["struct_asym"]["id"].as_array(str).tolist())
        if missing := sorted(listed - set(chains.tolist())):
            raise DataError(f"chain {missing[0]} is listed in struct_asym but has no atom")
    if "pdbx_struct_assembly_gen" not in block:
        return
    table = block["pdbx_struct_assembly_gen"]
    ids, expressions, lists = (
        table[name].as_array(str).tolist()
        for name in ("assembly_id", "oper_expression", "asym_id_list")
    )
    number = dict(zip(*np.unique(chains, return_counts=True), strict=True))
    total = sum(
        count_operations(expression) * sum(int(number.get(c, 0)) for c in members.split(","))
        for identifier, expression, members in zip(ids, expressions, lists, strict=True)
        if identifier == ids[0]
    )
    if total > MAX_ATOMS:
        raise DataError(
            f"assembly {ids[0]} would have {total} atoms (oper_expression {expressions[0]!r}); at "
            f"most {MAX_ATOMS} is possible"
        )


def count_operations(expression: str) -> int:
    """How many copies an ``oper_expression`` makes: 3600 for ``(1-60)(1-60)``.

    Raises:
        DataError: It is none.
    """
    groups = re.findall(r"\(([^()]*)\)", expression) or [expression]
    total = 1
    for group in groups:
        count = 0
        for part in group.split(","):
            first, dash, last = part.strip().partition("-")
            if dash and first.isdigit() and last.isdigit():
                count += max(0, int(last) - int(first) + 1)
            elif re.fullmatch(r"\w+", part.strip()):
                count += 1
            else:
                raise DataError(f"oper_expression {expression!r}: {part!r} is no operation")
        total *= count
    return total

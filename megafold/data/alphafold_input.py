"""AlphaFold 3's input JSON: what is to be predicted, as its documentation defines it.

The dialect ``alphafold3``, versions 1 to 4. What this reader cannot take (``userCCD``, AlphaFold
Server's dialect) is refused by name; nothing is left out in silence.
"""

from __future__ import annotations

import gzip
import json
import lzma
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megafold.data.errors import DataError
from megafold.data.structure import DNA, LIGAND, PROTEIN, RNA

DIALECT = "alphafold3"
VERSIONS = (1, 2, 3, 4)
MAX_SEED = 2**32 - 1

_LETTERS = {PROTEIN: "ARNDCQEGHILKMFPSTWYV", RNA: "ACGU", DNA: "ACGT"}
_MODIFICATION = {
    PROTEIN: ("ptmType", "ptmPosition"),
    RNA: ("modificationType", "basePosition"),
    DNA: ("modificationType", "basePosition"),
}
_TOP = {"name", "modelSeeds", "sequences", "bondedAtomPairs", "dialect", "version"}
_UNSUPPORTED = {"userCCD", "userCCDPath"}
_COMMON = {"id", "description"}
_FIELDS = {
    PROTEIN: {
        "sequence", "modifications", "templates",
        "unpairedMsa", "unpairedMsaPath", "pairedMsa", "pairedMsaPath",
    },
    RNA: {"sequence", "modifications", "unpairedMsa", "unpairedMsaPath"},
    DNA: {"sequence", "modifications"},
    LIGAND: {"ccdCodes", "smiles"},
}  # fmt: skip
_TEMPLATE_FIELDS = {"mmcif", "mmcifPath", "queryIndices", "templateIndices"}

AtomAddress = tuple[str, int, str]  # chain id, residue from 1, atom name


@dataclass(frozen=True)
class TemplateInput:
    """A structure of one chain, and which of its residues are like which of the query."""

    mmcif: str  # the text
    query_indices: tuple[int, ...]  # from 0
    template_indices: tuple[int, ...]  # from 0, unresolved residues counted
    source: str  # where it is from, for messages


@dataclass(frozen=True)
class Entity:
    """One molecule and the chains that are copies of it."""

    kind: str  # protein, rna, dna or ligand
    chain_ids: tuple[str, ...]
    sequence: str = ""  # one-letter codes; empty for a ligand
    modifications: tuple[tuple[int, str], ...] = ()  # residue from 1, component id
    ccd_codes: tuple[str, ...] = ()  # of a ligand, one for each of its residues
    smiles: str = ""  # of a ligand that has no code
    unpaired_msa: str | None = None  # a3m text; None: not given, empty: the query alone
    paired_msa: str | None = None
    templates: tuple[TemplateInput, ...] | None = None  # None: not given


@dataclass(frozen=True)
class AlphaFoldInput:
    """One job."""

    name: str
    seeds: tuple[int, ...]
    entities: tuple[Entity, ...]
    bonds: tuple[tuple[AtomAddress, AtomAddress], ...] = ()
    source: str = "input"  # for messages


def read_alphafold_input(path: str | Path) -> AlphaFoldInput:
    """Read a job from a JSON file; files it names are read from beside it.

    Raises:
        DataError: The file is missing or no JSON, or anything in it is not as documented; the
            message names the place in the file, what is there, and what would be right.
    """
    path = Path(path)
    if not path.is_file():
        raise DataError(f"{path}: {'a folder, not a' if path.is_dir() else 'no such'} file")
    try:
        document = json.loads(path.read_text(encoding="utf-8-sig"))  # with or without a BOM
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise DataError(f"{path}: not JSON: {error}") from error
    return parse_alphafold_input(document, folder=path.parent, source=str(path))


def parse_alphafold_input(
    document: Any, *, folder: str | Path = ".", source: str = "input"
) -> AlphaFoldInput:
    """The same for a JSON document; ``folder`` is where the files it names are."""
    if isinstance(document, list):
        raise DataError(
            f"{source}: a list at the top is AlphaFold Server's dialect; this reads {DIALECT!r}, "
            "one job in a JSON object"
        )
    top = _Fields(document, source)
    if unsupported := sorted(_UNSUPPORTED & {k for k, v in top.values.items() if v is not None}):
        raise DataError(
            f"{source}: {unsupported[0]} is not supported; give the ligand as smiles or ccdCodes"
        )
    top.only(_TOP | _UNSUPPORTED)
    if (dialect := top.get("dialect", str)) != DIALECT:
        raise top.error("dialect", f"must be {DIALECT!r}, got {dialect!r}")
    if (version := top.get("version", int)) not in VERSIONS:
        raise top.error("version", f"must be one of {VERSIONS}, got {version!r}")
    name = top.get("name", str)
    if not re.sub(r"[^A-Za-z0-9]", "", name):
        raise top.error("name", f"must have a letter or digit, got {name!r}")
    seeds = tuple(top.get("modelSeeds", list))
    for seed in seeds:
        if type(seed) is not int or not 0 <= seed <= MAX_SEED:
            raise top.error("modelSeeds", f"must be integers from 0 to {MAX_SEED}, got {seed!r}")
    if not seeds or len(set(seeds)) < len(seeds):
        raise top.error("modelSeeds", f"must be one or more different integers, got {list(seeds)}")
    sequences = top.get("sequences", list)
    if not sequences:
        raise top.error("sequences", "is empty: nothing to predict")
    entities = tuple(
        _entity(item, Path(folder), f"{source}: sequences[{i}]") for i, item in enumerate(sequences)
    )
    seen: set[str] = set()
    for i, entity in enumerate(entities):
        if again := seen & set(entity.chain_ids):
            raise DataError(f"{source}: sequences[{i}].id: {min(again)!r} is in use already")
        seen |= set(entity.chain_ids)
    bonds = _bonds(top.get("bondedAtomPairs", list, default=[]), entities, source)
    return AlphaFoldInput(name, seeds, entities, bonds, source)


class _Fields:
    """A JSON object whose fields are checked as they are taken out."""

    def __init__(self, values: Any, where: str) -> None:
        if not isinstance(values, Mapping):
            raise DataError(f"{where}: expected an object, got {type(values).__name__}")
        self.values, self.where = values, where

    def error(self, field: str, message: str) -> DataError:
        return DataError(f"{self.where}: {field} {message}")

    def only(self, known: set[str]) -> None:
        if unknown := sorted(set(self.values) - known):
            raise DataError(
                f"{self.where}: unknown field {unknown[0]!r}; known: {', '.join(sorted(known))}"
            )

    def get(self, field: str, kind: type, **default: Any) -> Any:
        """A field of type ``kind``; null counts as missing."""
        value = self.values.get(field)
        if value is None:
            if "default" in default:
                return default["default"]
            raise self.error(field, "is missing")
        if not isinstance(value, kind) or isinstance(value, bool):
            expected = {str: "text", int: "an integer", list: "a list"}[kind]
            raise self.error(field, f"must be {expected}, got {type(value).__name__}")
        return value

    def text_or_file(self, field: str, path_field: str, folder: Path) -> tuple[str | None, str]:
        """The text of ``field``, or of the file in ``path_field``; None without either."""
        text, name = self.get(field, str, default=None), self.get(path_field, str, default=None)
        if text is not None and name is not None:
            raise self.error(field, f"and {path_field} exclude each other")
        if name is None:
            return text, f"{self.where}.{field}"
        return _read_text(folder / name, f"{self.where}.{path_field}"), str(folder / name)


def _read_text(path: Path, where: str) -> str:
    openers: dict[str, Callable[..., Any]] = {".gz": gzip.open, ".xz": lzma.open}
    if path.suffix == ".zst":
        raise DataError(f"{where}: {path} is compressed with zstd; use gzip, xz or none")
    if not path.is_file():
        raise DataError(f"{where}: {path}: no such file")
    try:
        with openers.get(path.suffix, open)(path, "rb") as file:
            return file.read().decode("utf-8")
    except (EOFError, OSError, UnicodeDecodeError, lzma.LZMAError) as error:
        raise DataError(f"{where}: {path}: truncated or no text: {error}") from error


def _entity(item: Any, folder: Path, where: str) -> Entity:
    if not isinstance(item, Mapping) or len(item) != 1 or (kind := next(iter(item))) not in _FIELDS:
        raise DataError(
            f"{where}: expected an object with one of {', '.join(_FIELDS)}, got "
            f"{sorted(item) if isinstance(item, Mapping) else type(item).__name__}"
        )
    fields = _Fields(item[kind], f"{where}.{kind}")
    fields.only(_COMMON | _FIELDS[kind])
    chain_ids = fields.values.get("id")
    chain_ids = (chain_ids,) if isinstance(chain_ids, str) else tuple(chain_ids or ())
    if not chain_ids or len(set(chain_ids)) < len(chain_ids):
        raise fields.error("id", "must be one or more different ids")
    for chain_id in chain_ids:
        if not isinstance(chain_id, str) or not re.fullmatch("[A-Z]+", chain_id):
            raise fields.error("id", f"must be capital letters, got {chain_id!r}")
    if kind == LIGAND:
        return _ligand(fields, chain_ids)
    sequence = fields.get("sequence", str)
    if not sequence:
        raise fields.error("sequence", "is empty")
    for i, letter in enumerate(sequence):
        if letter not in _LETTERS[kind]:
            raise fields.error(
                "sequence",
                f"has {letter!r} at residue {i + 1}; a {kind} has {_LETTERS[kind]}, other "
                "residues are modifications",
            )
    unpaired = paired = templates = None
    if kind in (PROTEIN, RNA):
        unpaired, _ = fields.text_or_file("unpairedMsa", "unpairedMsaPath", folder)
    if kind == PROTEIN:
        paired, _ = fields.text_or_file("pairedMsa", "pairedMsaPath", folder)
        if (unpaired is None) != (paired is None):
            raise fields.error(
                "unpairedMsa", 'and pairedMsa must be both given or neither; "" is the query alone'
            )
        given = fields.get("templates", list, default=None)
        if given is not None:
            templates = tuple(
                _template(template, len(sequence), folder, f"{fields.where}.templates[{i}]")
                for i, template in enumerate(given)
            )
    return Entity(
        kind=kind,
        chain_ids=chain_ids,
        sequence=sequence,
        modifications=_modifications(fields, kind, len(sequence)),
        unpaired_msa=unpaired,
        paired_msa=paired,
        templates=templates,
    )


def _ligand(fields: _Fields, chain_ids: tuple[str, ...]) -> Entity:
    codes = fields.get("ccdCodes", list, default=None)
    smiles = fields.get("smiles", str, default=None)
    if (codes is None) == (smiles is None):
        raise fields.error("ccdCodes", "or smiles must be given, and not both")
    if codes is not None and (not codes or any(not isinstance(c, str) or not c for c in codes)):
        raise fields.error("ccdCodes", f"must be one or more component ids, got {codes!r}")
    if smiles == "":
        raise fields.error("smiles", "is empty")
    return Entity(LIGAND, chain_ids, ccd_codes=tuple(codes or ()), smiles=smiles or "")


def _modifications(fields: _Fields, kind: str, length: int) -> tuple[tuple[int, str], ...]:
    type_field, position_field = _MODIFICATION[kind]
    found: dict[int, str] = {}
    for i, item in enumerate(fields.get("modifications", list, default=[])):
        entry = _Fields(item, f"{fields.where}.modifications[{i}]")
        entry.only({type_field, position_field})
        name, position = entry.get(type_field, str), entry.get(position_field, int)
        if not 1 <= position <= length:
            raise entry.error(position_field, f"is {position}, the sequence has 1 to {length}")
        if position in found:
            raise entry.error(position_field, f"{position} is modified already ({found[position]})")
        found[position] = name
    return tuple(sorted(found.items()))


def _template(item: Any, length: int, folder: Path, where: str) -> TemplateInput:
    fields = _Fields(item, where)
    fields.only(_TEMPLATE_FIELDS)
    text, source = fields.text_or_file("mmcif", "mmcifPath", folder)
    if text is None:
        raise fields.error("mmcif", "or mmcifPath is missing")
    indices = []
    for field in ("queryIndices", "templateIndices"):
        values = fields.get(field, list)
        if any(type(value) is not int or value < 0 for value in values):
            raise fields.error(field, "must be integers from 0")
        if len(set(values)) < len(values):
            raise fields.error(field, "must be different from each other")
        indices.append(tuple(values))
    if len(indices[0]) != len(indices[1]):
        raise fields.error(
            "queryIndices", f"has {len(indices[0])} entries, templateIndices {len(indices[1])}"
        )
    if indices[0] and (last := max(indices[0])) >= length:
        raise fields.error("queryIndices", f"has {last}, the last residue is {length - 1}")
    return TemplateInput(text, *indices, source)


def _bonds(
    items: list, entities: tuple[Entity, ...], source: str
) -> tuple[tuple[AtomAddress, AtomAddress], ...]:
    by_chain = {chain_id: entity for entity in entities for chain_id in entity.chain_ids}
    bonds = []
    for i, item in enumerate(items):
        where = f"{source}: bondedAtomPairs[{i}]"
        if not isinstance(item, list) or len(item) != 2:
            raise DataError(f"{where}: expected two atoms, got {item!r}")
        ends = tuple(_address(end, by_chain, where) for end in item)
        if ends[0] == ends[1]:
            raise DataError(f"{where}: an atom is not bonded to itself")
        if all(by_chain[end[0]].kind != LIGAND for end in ends):
            raise DataError(f"{where}: one of the two atoms must be of a ligand")
        bonds.append(ends)
    return tuple(bonds)


def _address(item: Any, by_chain: Mapping[str, Entity], where: str) -> AtomAddress:
    kinds = [type(part) for part in item] if isinstance(item, list) else []
    if kinds != [str, int, str]:
        raise DataError(f"{where}: an atom is [id, residue from 1, atom name], got {item!r}")
    chain_id, residue, atom = item
    if chain_id not in by_chain:
        raise DataError(f"{where}: no entity {chain_id!r}; there are {', '.join(by_chain)}")
    entity = by_chain[chain_id]
    if entity.smiles:
        raise DataError(
            f"{where}: {chain_id} is given as SMILES, whose atoms have no names to bond to; "
            "use ccdCodes"
        )
    length = len(entity.sequence) or len(entity.ccd_codes)
    if not 1 <= residue <= length:
        raise DataError(f"{where}: {chain_id} has residues 1 to {length}, got {residue}")
    return chain_id, residue, atom

"""From structures to what 3Dmol.js draws: atoms as text, one style per chain, one orientation."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np

from megafold.data.constants import DNA_NUCLEOTIDES, RNA_NUCLEOTIDES
from megafold.data.structure import LIGAND, PROTEIN, Chain, Structure
from megafold.viz import theme

COLORS = ("chain", "element", "plddt")
STYLES = ("cartoon", "trace", "sticks")

SMALL = 40  # residues; side chains of a protein this short are drawn
NEIGHBOURS = {PROTEIN: ("CA", 5.0)}  # angstrom between neighbours' atoms, with some slack
NUCLEIC_NEIGHBOURS = ("C1'", 8.0)
CONNECTED = 0.5  # least share of neighbours within reach for a cartoon to make sense

# AlphaFold's four classes of confidence: lower bound, colour, name.
CONFIDENCE = (
    (90.0, "#0053D6", "very high (90 and above)"),
    (70.0, "#65CBF3", "high (70 to 90)"),
    (50.0, "#FFDB13", "low (50 to 70)"),
    (-np.inf, "#FF7D45", "very low (below 50)"),
)
_ELEMENTS = {"N": "#3050F8", "O": "#E6261F", "S": "#D9A521", "P": "#E77F0D"}
_HALF_VIEW = np.tan(np.radians(10.0))  # the camera of 3Dmol.js sees 20 degrees
_BACKBONE = ["N", "C", "O", "OXT", "H", "HA"]
_WORD = re.compile(r"[A-Za-z0-9_.*+'-]+")


@dataclass(frozen=True)
class Layer:
    """One structure in a scene: its atoms, how to draw them, and what the colours mean."""

    atoms: str | list[dict[str, Any]]  # mmCIF text, or atoms with bonds
    styles: tuple[tuple[dict[str, Any], dict[str, Any]], ...]  # selection, style
    legend: tuple[tuple[str, str], ...]  # colour, meaning
    note: str = ""


def orientation(structure: Structure) -> tuple[np.ndarray, np.ndarray]:
    """Centre `[3]` and rotation `[3, 3]` that lay a structure flat before the viewer.

    The longest principal axis becomes x, the shortest points to the viewer. The rotation is
    proper: no mirror image. Use as ``(positions - centre) @ rotation``.
    """
    points = structure.positions[structure.resolved].astype(np.float64)
    centre = points.mean(axis=0)
    if len(points) < 3:
        return centre, np.eye(3)
    axes = np.linalg.svd(points - centre, full_matrices=False)[2].T
    if np.linalg.det(axes) < 0:
        axes[:, 2] *= -1
    return centre, axes


def zoom(points: np.ndarray, aspect: float) -> float:
    """How much nearer than 3Dmol.js's own choice the camera may go, at least 1.

    3Dmol.js fits a sphere around the atoms into the window's height. A flat, long molecule
    leaves most of that empty.

    Args:
        points: `[P, 3]` float, angstrom, as seen by the viewer.
        aspect: width of the window over its height.
    """
    about = points - points.mean(axis=0)
    radius = np.linalg.norm(about, axis=1).max(initial=5.0)
    reach = np.maximum(np.abs(about[:, 1]), np.abs(about[:, 0]) / aspect)
    needed = (reach + _HALF_VIEW * about[:, 2]).max(initial=0.0) + 2.0  # room for the ribbon
    return float(max(1.0, 0.95 * radius / needed))


def atoms_text(structure: Structure, positions: np.ndarray, shown: np.ndarray) -> str:
    """Some atoms as the shortest mmCIF that 3Dmol.js reads.

    This is for a view inside a notebook, where every byte is stored: one loop, two decimals.
    ``megafold.data.write_mmcif`` writes files. Polymer atoms are ATOM even in modified
    residues, because 3Dmol.js draws no cartoon through HETATM.

    Args:
        structure: whose layout names the atoms.
        positions: `[A, 3]` float, angstrom.
        shown: `[A]` bool, which atoms to write.
    """
    columns = ("group_PDB", "id", "label_asym_id", "auth_seq_id", "label_comp_id")
    columns += ("label_atom_id", "type_symbol", "Cartn_x", "Cartn_y", "Cartn_z")
    layout = structure.layout
    lines = ["data_view", "loop_", *(f"_atom_site.{column}" for column in columns)]
    for i in np.flatnonzero(shown):
        group = "HETATM" if layout.chain_type[i] == LIGAND else "ATOM"
        words = (layout.chain_id[i], layout.residue_number[i], layout.residue_name[i])
        name = f'"{_word(layout.atom_name[i])}"'
        x, y, z = positions[i]
        place = f"{_word(layout.element[i])} {x:.2f} {y:.2f} {z:.2f}"
        lines.append(f"{group} {i} {' '.join(map(_word, words))} {name} {place}")
    return "\n".join(lines) + "\n"


def chain_layer(
    structure: Structure, positions: np.ndarray, *, style: str | None, colors: dict[str, str]
) -> Layer:
    """A structure with one colour per chain.

    Args:
        structure: what to draw.
        positions: `[A, 3]` float, angstrom, as seen by the viewer.
        style: one of ``STYLES``; None takes a cartoon where the backbone hangs together.
        colors: colour by chain id.
    """
    note = ""
    if style is None:
        style = "cartoon"
        if (share := connected_share(structure)) < CONNECTED:
            style = "trace"
            note = (
                f"backbone drawn as a trace: {share:.0%} of neighbouring residues are near enough "
                "to each other for a cartoon"
            )
    if style == "trace":
        return Layer(_trace(structure, positions, colors), (({}, _TRACE),), (), note)
    styles = [
        (selection, drawn)
        for chain in structure.chains
        for selection, drawn in _chain_styles(structure, chain, style, colors[chain.chain_id])
    ]
    shown = structure.resolved & (_drawn(structure) if style == "cartoon" else True)
    return Layer(atoms_text(structure, positions, shown), tuple(styles), (), note)


def confidence_layer(
    structure: Structure, positions: np.ndarray, plddt: np.ndarray, *, style: str | None
) -> Layer:
    """A structure with its residues in the four colours of pLDDT, 0 to 100, `[A]`."""
    grey = {chain.chain_id: theme.PALETTE[7] for chain in structure.chains}
    base = chain_layer(structure, positions, style=style, colors=grey)
    if isinstance(base.atoms, list):
        colored = [
            {**atom, "color": confidence_color(float(plddt[atom["serial"]]))} for atom in base.atoms
        ]
        return Layer(colored, base.styles, _CONFIDENCE_LEGEND, base.note)
    bands: dict[tuple[str, str], list[int]] = {}
    edges = np.append(structure.residue_starts, len(plddt))
    for begin, end in pairwise(edges):
        key = (structure.layout.chain_id[begin], confidence_color(float(plddt[begin:end].mean())))
        bands.setdefault(key, []).append(int(structure.layout.residue_number[begin]))
    types = {chain.chain_id: chain.chain_type for chain in structure.chains}
    drawn = style or "cartoon"
    styles = tuple(
        (
            {"lchain": chain_id, "resi": numbers},
            _plain_style(types[chain_id], drawn, color),
        )
        for (chain_id, color), numbers in bands.items()
    )
    return Layer(base.atoms, styles, _CONFIDENCE_LEGEND, base.note)


def confidence_color(plddt: float) -> str:
    """Colour of a pLDDT between 0 and 100."""
    return next(color for bound, color, _ in CONFIDENCE if plddt >= bound)


def connected_share(structure: Structure) -> float:
    """Share of neighbouring polymer residues near enough to be bonded; 1 without polymers."""
    near = total = 0
    for numbers, points, reach in _backbones(structure):
        follows = np.diff(numbers) == 1
        steps = np.linalg.norm(np.diff(points, axis=0), axis=1)[follows]
        near, total = near + int((steps < reach).sum()), total + len(steps)
    return near / total if total else 1.0


_CONFIDENCE_LEGEND = tuple((color, f"pLDDT {name}") for _, color, name in CONFIDENCE)
_TRACE = {"stick": {"radius": 0.3}, "sphere": {"radius": 0.45}}


def _chain_styles(
    structure: Structure, chain: Chain, style: str, color: str
) -> Iterable[tuple[dict[str, Any], dict[str, Any]]]:
    here = {"lchain": chain.chain_id}
    if chain.chain_type == LIGAND:
        yield here, _ligand_style(len(chain), structure, chain, color)
        return
    yield here, _plain_style(chain.chain_type, style, color)
    if style != "cartoon":
        return
    sticks = {"stick": {"radius": 0.13, "colorscheme": _scheme(color)}}
    if chain.chain_type == PROTEIN:
        if len(chain) <= SMALL:
            side = {**here, "not": {"atom": _BACKBONE}}
            yield side, {**_plain_style(PROTEIN, style, color), **sticks}
        return
    known = (*RNA_NUCLEOTIDES, *DNA_NUCLEOTIDES)  # 3Dmol.js draws no bases for the others
    odd = sorted(set(chain.components) - set(known))
    if odd:
        yield {**here, "resn": odd}, {**_plain_style(chain.chain_type, style, color), **sticks}


def _plain_style(chain_type: str, style: str, color: str) -> dict[str, Any]:
    if chain_type == LIGAND:
        return {
            "stick": {"radius": 0.26, "color": color},
            "sphere": {"radius": 0.4, "color": color},
        }
    if style == "sticks":
        return {"stick": {"radius": 0.16, "colorscheme": _scheme(color)}}
    return {"cartoon": {"color": color, "arrows": True}}


def _ligand_style(residues: int, structure: Structure, chain: Chain, color: str) -> dict[str, Any]:
    here = structure.layout.chain_id == chain.chain_id
    if int(here.sum()) == residues:  # ions: single atoms have no stick to show
        return {"sphere": {"scale": 0.5, "color": color}}
    return {"stick": {"radius": 0.26, "colorscheme": _scheme(color)}}


def _scheme(carbon: str) -> dict[str, Any]:
    """Elements in their usual colours, carbon and the rest in the chain's."""
    return {"prop": "elem", "map": {"C": carbon, **_ELEMENTS}}


def _trace(
    structure: Structure, positions: np.ndarray, colors: dict[str, str]
) -> list[dict[str, Any]]:
    """One atom per polymer residue, bonded to its neighbours however far; ligands in full."""
    layout = structure.layout
    index = np.flatnonzero(structure.resolved & (_traced(structure) | _ligand(structure)))
    atoms: list[dict[str, Any]] = []
    for i in index:
        x, y, z = (round(float(v), 2) for v in positions[i])
        atom = {"serial": int(i), "elem": "C", "x": x, "y": y, "z": z, "bonds": [], "bondOrder": []}
        atom |= {"chain": str(layout.chain_id[i]), "resi": int(layout.residue_number[i])}
        atom |= {"resn": str(layout.residue_name[i]), "color": colors[str(layout.chain_id[i])]}
        polymer = layout.chain_type[i] != LIGAND
        last = len(atoms) - 1
        if polymer and atoms and _follows(atom, atoms[last]):
            atom["bonds"].append(last)
            atoms[last]["bonds"].append(last + 1)
            atom["bondOrder"].append(1)
            atoms[last]["bondOrder"].append(1)
        atoms.append(atom)
    return atoms


def _follows(atom: dict[str, Any], before: dict[str, Any]) -> bool:
    """Whether ``atom`` is the next residue of the same chain: none is missing in between."""
    return atom["chain"] == before["chain"] and atom["resi"] == before["resi"] + 1


def _backbones(structure: Structure) -> Iterable[tuple[np.ndarray, np.ndarray, float]]:
    traced = structure.resolved & _traced(structure)
    for chain in structure.chains:
        if chain.chain_type == LIGAND:
            continue
        rows = np.flatnonzero(traced & (structure.layout.chain_id == chain.chain_id))
        _, reach = NEIGHBOURS.get(chain.chain_type, NUCLEIC_NEIGHBOURS)
        yield structure.layout.residue_number[rows], structure.positions[rows], reach


def _traced(structure: Structure) -> np.ndarray:
    """The one atom of each polymer residue that a trace goes through. [A] bool."""
    layout = structure.layout
    protein = layout.chain_type == PROTEIN
    alpha = protein & (layout.atom_name == NEIGHBOURS[PROTEIN][0])
    sugar = ~protein & ~_ligand(structure) & (layout.atom_name == NUCLEIC_NEIGHBOURS[0])
    return alpha | sugar


def _drawn(structure: Structure) -> np.ndarray:
    """Atoms that a cartoon shows or needs: of long proteins, the backbone only. [A] bool."""
    layout = structure.layout
    long = [c.chain_id for c in structure.chains if c.chain_type == PROTEIN and len(c) > SMALL]
    return ~np.isin(layout.chain_id, long) | np.isin(layout.atom_name, ("N", "CA", "C", "O"))


def _ligand(structure: Structure) -> np.ndarray:
    return structure.layout.chain_type == LIGAND


def _word(value: object) -> str:
    """A token that needs no quoting and cannot end the script it is embedded in."""
    text = str(value)
    if not _WORD.fullmatch(text):
        raise ValueError(f"cannot show {text!r}: not a chain, component or atom name of mmCIF")
    return text

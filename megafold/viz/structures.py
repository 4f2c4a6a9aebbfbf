"""Three-dimensional views of structures."""

from __future__ import annotations

import html
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import py3Dmol
from IPython.display import HTML, Image, display

from megafold.data.structure import LIGAND, Chain, Structure
from megafold.viz import browser, scene, theme, viewer

WIDTH, HEIGHT = 680, 400


@dataclass(frozen=True)
class StructureView:
    """A view that a notebook displays: it can be turned, and has a still beside it."""

    view: py3Dmol.view
    legend: tuple[tuple[str, str], ...]  # colour, meaning
    notes: tuple[str, ...]
    title: str

    def still(self) -> bytes:
        """A PNG of the view as it first appears.

        Raises:
            BrowserNotFound: there is no browser to draw it.
        """
        page = viewer.page(self.view)
        return browser.page_image(page, WIDTH, HEIGHT, ready="$3Dmolpromise")

    def legend_html(self) -> str:
        """Title, colours and notes, as they stand above the view."""
        marks = [
            f'<span style="color:{color}">&#9632;</span> {html.escape(meaning)}'
            for color, meaning in self.legend
        ]
        lines = [f"<b>{html.escape(self.title)}</b>", " &nbsp; ".join(marks)]
        lines += [f"<i>{html.escape(note)}</i>" for note in self.notes]
        return "<br>".join(line for line in lines if line)

    def _ipython_display_(self) -> None:
        viewer.publish_library()
        has_still = browser.find_browser() is not None
        if has_still:
            display(Image(self.still(), width=WIDTH, height=HEIGHT))
        else:
            print(f"{self.title}: no still image of this view, because no browser was found")
        body = viewer.view_html(self.view, hides_still=has_still)
        display(HTML(f"<div>{self.legend_html()}</div>{body}"))


def show(
    structures: Structure | Mapping[str, Structure],
    *,
    color: str | None = None,
    style: str | None = None,
    plddt: np.ndarray | None = None,
) -> None:
    """Display one structure, or several on top of each other.

    Proteins and nucleic acids are cartoons, ligands sticks, ions spheres; side chains are
    drawn in proteins of at most 40 residues. Nothing is fetched from the network.

    Args:
        structures: one structure, or several by name, already superposed.
        color: ``"chain"`` (the default for one structure), ``"element"`` (sticks, carbon by
            chain) or ``"plddt"``. Several structures have one colour each.
        style: ``"cartoon"``, ``"trace"`` (one point per residue, bonded in sequence) or
            ``"sticks"``; by default a cartoon where the backbone hangs together, else a trace,
            and then the view says so.
        plddt: `[A]` float, 0 to 100; for ``color="plddt"``.

    Raises:
        ValueError: an unknown color or style, or ``plddt`` of the wrong shape.
        TypeError: what is given is not a structure.
    """
    display(structure_view(structures, color=color, style=style, plddt=plddt))


def structure_view(
    structures: Structure | Mapping[str, Structure],
    *,
    color: str | None = None,
    style: str | None = None,
    plddt: np.ndarray | None = None,
) -> StructureView:
    """What ``show`` displays, for a script or a test. Arguments as there."""
    if isinstance(structures, Structure):
        named = {structures.name: structures}
    elif isinstance(structures, Mapping) and structures:
        named = dict(structures)
    else:
        raise TypeError(f"show takes a Structure or a mapping of them, not {structures!r:.80}")
    _check(named, color, style, plddt)
    centre, rotation = scene.orientation(next(iter(named.values())))
    view = viewer.new_view(WIDTH, HEIGHT)
    legend: list[tuple[str, str]] = []
    notes: list[str] = []
    for number, (name, structure) in enumerate(named.items()):
        positions = (structure.positions - centre) @ rotation
        if color == "plddt":
            layer = scene.confidence_layer(structure, positions, plddt, style=style)
            legend += layer.legend
        else:
            colors = _colors(structure, number if len(named) > 1 else None)
            drawn = "sticks" if color == "element" and style is None else style
            layer = scene.chain_layer(structure, positions, style=drawn, colors=colors)
            legend += (
                [(next(iter(colors.values())), name)]
                if len(named) > 1
                else [(colors[c.chain_id], _describe(c)) for c in structure.chains]
            )
        notes += [layer.note] if layer.note else []
        _add(view, layer, number)
    view.zoomTo()
    view.zoom(1.15)
    return StructureView(view, tuple(legend), tuple(notes), " and ".join(named))


def _add(view: py3Dmol.view, layer: scene.Layer, number: int) -> None:
    if isinstance(layer.atoms, str):
        view.addModel(layer.atoms, "cif")
    else:
        view.addModel()
        view.getModel(number).addAtoms(layer.atoms)
    view.setStyle({"model": number}, {})
    for selection, style in layer.styles:
        view.setStyle({"model": number, **selection}, style)


def _colors(structure: Structure, number: int | None) -> dict[str, str]:
    """One colour per chain; all chains the same where structures are told apart by colour."""
    palette = theme.PALETTE
    if number is not None:
        return {c.chain_id: palette[number % len(palette)] for c in structure.chains}
    return {c.chain_id: palette[i % len(palette)] for i, c in enumerate(structure.chains)}


def _describe(chain: Chain) -> str:
    if chain.chain_type == LIGAND:
        return f"{chain.chain_id}: {'-'.join(chain.components[:3])}"
    return f"{chain.chain_id}: {chain.chain_type}, {len(chain)} residues"


def _check(
    named: Mapping[str, Structure], color: str | None, style: str | None, plddt: np.ndarray | None
) -> None:
    for name, structure in named.items():
        if not isinstance(structure, Structure):
            raise TypeError(f"show: {name!r} is a {type(structure).__name__}, not a Structure")
        if not structure.resolved.any():
            raise ValueError(f"show: {name!r} has no resolved atom")
    if color is not None and color not in scene.COLORS:
        raise ValueError(f"show: color is one of {', '.join(scene.COLORS)}; not {color!r}")
    if style is not None and style not in scene.STYLES:
        raise ValueError(f"show: style is one of {', '.join(scene.STYLES)}; not {style!r}")
    if (color == "plddt") != (plddt is not None):
        raise ValueError('show: color="plddt" and the array plddt go together')
    if plddt is not None:
        structure = next(iter(named.values()))
        if len(named) > 1:
            raise ValueError('show: color="plddt" takes one structure')
        if np.shape(plddt) != (len(structure.layout),):
            raise ValueError(
                f"show: plddt has shape {np.shape(plddt)}; one value per atom is "
                f"{(len(structure.layout),)}"
            )

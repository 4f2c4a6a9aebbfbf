"""Three-dimensional views of structures."""

from __future__ import annotations

import html
from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
import py3Dmol
from IPython.display import HTML, Image, display

from megafold.data.structure import LIGAND, Chain, Structure
from megafold.viz import browser, scene, theme, viewer

WIDTH, HEIGHT = 680, 400
LEGEND = 10  # entries shown
FRAME_INTERVAL = 150  # milliseconds
REPEATS = 3  # of an animation


@dataclass(frozen=True)
class StructureView:
    """A view that a notebook displays: it can be turned, and has a still beside it."""

    view: py3Dmol.view
    title: str
    legend: tuple[tuple[str, str], ...] = ()  # colour, meaning
    notes: tuple[str, ...] = ()
    poster: py3Dmol.view | None = None  # what the still shows, where it is not the view itself

    def still(self) -> bytes:
        """A PNG of the view as it first appears.

        Raises:
            BrowserNotFound: there is no browser to draw it.
        """
        page = viewer.page(self.poster or self.view)
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
        still = self.still() if has_still else b""  # draws the view once, under another id
        body = viewer.view_html(self.view, hides_still=has_still)
        display(HTML(viewer.legend_html(self.view, self.legend_html())))
        if has_still:
            display(Image(still, width=WIDTH, height=HEIGHT))
        else:
            print(f"{self.title}: no still image of this view, because no browser was found")
        display(HTML(body))


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
    named = _named(structures)
    _check(named, color, style, plddt)
    view = viewer.new_view(WIDTH, HEIGHT)
    place = scene.orientation(next(iter(named.values())))
    legend, notes = draw(view, named, place, color=color, style=style, plddt=plddt)
    if notes:
        view.zoomTo()  # nothing to be near to where a structure is no structure yet
    else:
        aim(view, named, place)
    return StructureView(view, " and ".join(named), legend, notes)


def show_frames(structure: Structure, frames: np.ndarray) -> None:
    """Display frames as an animation that runs three times and ends on the last one.

    The backbone is a trace, one point per residue, because early frames of a sampler hold no
    chain together. ``viz.frame_browser`` stops where you want to look.

    Args:
        structure: whose layout names the atoms; its own coordinates are not shown.
        frames: `[F, A, 3]` float, angstrom, superposed on each other.

    Raises:
        ValueError: ``frames`` has another shape.
    """
    display(frames_view(structure, frames))


def frames_view(structure: Structure, frames: np.ndarray) -> StructureView:
    """What ``show_frames`` displays. Arguments as there."""
    frames = check_frames(structure, frames)
    last = with_positions(structure, frames[-1])
    centre, rotation = scene.orientation(last)
    turned = (frames - centre) @ rotation
    colors = _colors(structure, None)
    layer = scene.chain_layer(last, turned[-1], style="trace", colors=colors)
    rows = [atom["serial"] for atom in layer.atoms]
    view, poster = viewer.new_view(WIDTH, HEIGHT), viewer.new_view(WIDTH, HEIGHT)
    for each in (view, poster):
        _add(each, layer, 0)
        each.zoomTo()
    view.getModel(0).setCoordinates(turned[:, rows].round(1).tolist(), "array")
    view.animate({"loop": "forward", "interval": FRAME_INTERVAL, "reps": REPEATS})
    title = f"{structure.name}, {len(frames)} frames"
    return StructureView(view, title, _chain_legend(structure, colors), (), poster)


def draw(
    view: py3Dmol.view,
    named: Mapping[str, Structure],
    place: tuple[np.ndarray, np.ndarray],
    *,
    color: str | None = None,
    style: str | None = None,
    plddt: np.ndarray | None = None,
) -> tuple[tuple[tuple[str, str], ...], tuple[str, ...]]:
    """Add structures to an empty view; returns legend and notes.

    Args:
        view: where to draw.
        named: structures by name.
        place: centre `[3]` and rotation `[3, 3]`, from ``scene.orientation``.
        color, style, plddt: as for :func:`show`.
    """
    centre, rotation = place
    legend: list[tuple[str, str]] = []
    notes: list[str] = []
    for number, (name, structure) in enumerate(named.items()):
        positions = (structure.positions - centre) @ rotation
        if plddt is not None:
            layer = scene.confidence_layer(structure, positions, plddt, style=style)
            legend += layer.legend
        else:
            colors = _colors(structure, number if len(named) > 1 else None)
            chosen = "sticks" if color == "element" and style is None else style
            layer = scene.chain_layer(structure, positions, style=chosen, colors=colors)
            if len(named) > 1:
                legend.append((next(iter(colors.values())), name))
            else:
                legend += _chain_legend(structure, colors)
        if layer.note:
            notes.append(f"{name}: {layer.note}" if len(named) > 1 else layer.note)
        _add(view, layer, number)
    return tuple(legend), tuple(notes)


def aim(
    view: py3Dmol.view, named: Mapping[str, Structure], place: tuple[np.ndarray, np.ndarray]
) -> None:
    """Point the camera so that the structures fill the window. Arguments as for :func:`draw`."""
    centre, rotation = place
    points = [(s.positions[s.resolved] - centre) @ rotation for s in named.values()]
    view.zoomTo()
    view.zoom(round(scene.zoom(np.concatenate(points), WIDTH / HEIGHT), 2))


def check_frames(structure: Structure, frames: np.ndarray) -> np.ndarray:
    """``frames`` as float `[F, A, 3]`, or a ValueError that says what it should be."""
    array = np.asarray(frames, dtype=np.float64)
    atoms = len(structure.layout)
    if array.ndim != 3 or array.shape[1:] != (atoms, 3) or len(array) == 0:
        raise ValueError(f"frames has shape {array.shape}; [F, {atoms}, 3] for {structure.name!r}")
    if not np.isfinite(array).all():
        raise ValueError("frames has coordinates that are not finite")
    return array


def with_positions(structure: Structure, positions: np.ndarray) -> Structure:
    """The same atoms elsewhere; all of them count as resolved. positions `[A, 3]`."""
    everywhere = np.ones(len(structure.layout), dtype=bool)
    return replace(structure, positions=positions.astype(np.float32), resolved=everywhere)


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
    """Colour by chain: polymers in order, then one for each kind of ligand.

    Where structures are told apart by colour, ``number`` decides for all chains.
    """
    palette = theme.PALETTE
    if number is not None:
        return {chain.chain_id: palette[number % len(palette)] for chain in structure.chains}
    keys = {chain.chain_id: _color_key(chain) for chain in structure.chains}
    ordered = dict.fromkeys(sorted(keys.values(), key=lambda key: key[0] == LIGAND))
    index = {key: i for i, key in enumerate(ordered)}
    return {chain_id: palette[index[key] % len(palette)] for chain_id, key in keys.items()}


def _color_key(chain: Chain) -> tuple[str, ...]:
    if chain.chain_type == LIGAND:
        return (LIGAND, *chain.components)
    return (chain.chain_type, chain.chain_id)


def _chain_legend(structure: Structure, colors: dict[str, str]) -> tuple[tuple[str, str], ...]:
    """One entry per polymer and per kind of ligand; of many, the first and a count."""
    polymers = [
        (colors[chain.chain_id], f"{chain.chain_id}: {chain.chain_type}, {len(chain)} residues")
        for chain in structure.chains
        if chain.chain_type != LIGAND
    ]
    ligands: dict[tuple[str, str], int] = {}
    for chain in structure.chains:
        if chain.chain_type == LIGAND:
            key = (colors[chain.chain_id], "-".join(chain.components))
            ligands[key] = ligands.get(key, 0) + 1
    entries = polymers + [
        (color, name if count == 1 else f"{name} \N{MULTIPLICATION SIGN} {count}")
        for (color, name), count in ligands.items()
    ]
    if len(entries) <= LEGEND:
        return tuple(entries)
    return (*entries[:LEGEND], (theme.MUTED, f"and {len(entries) - LEGEND} more"))


def _named(structures: Structure | Mapping[str, Structure]) -> dict[str, Structure]:
    if isinstance(structures, Structure):
        return {structures.name: structures}
    if not isinstance(structures, Mapping) or not structures:
        raise TypeError(f"show takes a Structure or a mapping of them, not {structures!r:.80}")
    for name, structure in structures.items():
        if not isinstance(structure, Structure):
            raise TypeError(f"show: {name!r} is a {type(structure).__name__}, not a Structure")
    return dict(structures)


def _check(
    named: Mapping[str, Structure], color: str | None, style: str | None, plddt: np.ndarray | None
) -> None:
    for name, structure in named.items():
        if not structure.resolved.any():
            raise ValueError(f"show: {name!r} has no resolved atom")
    if color is not None and color not in scene.COLORS:
        raise ValueError(f"show: color is one of {', '.join(scene.COLORS)}; not {color!r}")
    if style is not None and style not in scene.STYLES:
        raise ValueError(f"show: style is one of {', '.join(scene.STYLES)}; not {style!r}")
    if (color == "plddt") != (plddt is not None):
        raise ValueError('show: color="plddt" and the array plddt go together')
    if plddt is not None:
        atoms = len(next(iter(named.values())).layout)
        if len(named) > 1:
            raise ValueError('show: color="plddt" takes one structure')
        if np.shape(plddt) != (atoms,):
            raise ValueError(
                f"show: plddt has shape {np.shape(plddt)}; one value per atom is ({atoms},)"
            )

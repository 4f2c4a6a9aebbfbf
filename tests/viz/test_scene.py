"""From structures to what is drawn."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from megafold.data import Structure
from megafold.viz import scene

COLORS = {"A": "#000000", "B": "#111111", "C": "#222222", "D": "#333333"}


def layer(structure: Structure, style: str | None = None) -> scene.Layer:
    return scene.chain_layer(structure, structure.positions, style=style, colors=COLORS)


def styles_of(drawn: scene.Layer, chain_id: str) -> list[set[str]]:
    return [set(style) for selection, style in drawn.styles if selection["lchain"] == chain_id]


def atom_lines(drawn: scene.Layer) -> list[list[str]]:
    assert isinstance(drawn.atoms, str)
    return [line.split() for line in drawn.atoms.splitlines() if line.startswith(("ATOM", "HET"))]


def test_the_longest_axis_lies_across_and_the_shortest_towards_the_viewer() -> None:
    rng = np.random.default_rng(0)
    turn = np.linalg.qr(rng.normal(size=(3, 3)))[0]
    points = (rng.normal(size=(200, 3)) * (2.0, 9.0, 4.0)) @ turn + 50
    structure = _points(points)
    centre, rotation = scene.orientation(structure)
    spread = ((points - centre) @ rotation).std(axis=0)
    assert spread[0] > spread[1] > spread[2]
    assert np.linalg.det(rotation) == pytest.approx(1.0)


def test_the_camera_comes_nearer_to_a_flat_long_molecule_and_never_goes_away() -> None:
    x = np.linspace(-50, 50, 30)
    rod = np.stack([x, 0 * x, 0 * x], axis=1)
    ball = np.random.default_rng(0).normal(size=(300, 3)) * 10
    assert scene.zoom(rod, 1.7) > 1.5
    assert 1.0 <= scene.zoom(ball, 1.7) < scene.zoom(rod, 1.7)


def test_atoms_are_written_with_their_names_and_places(peptide: Structure) -> None:
    lines = atom_lines(layer(peptide))
    assert len(lines) == int(peptide.resolved.sum())
    first = lines[0]
    assert first[0] == "ATOM"
    assert first[2:7] == ["A", "1", peptide.layout.residue_name[0], '"N"', "N"]
    assert [float(v) for v in first[7:]] == pytest.approx(peptide.positions[0], abs=0.006)


def test_atoms_that_were_not_seen_are_not_drawn(peptide: Structure) -> None:
    resolved = peptide.resolved.copy()
    resolved[:40] = False
    assert len(atom_lines(layer(replace(peptide, resolved=resolved)))) == int(resolved.sum())


def test_a_short_protein_shows_its_side_chains(peptide: Structure) -> None:
    assert styles_of(layer(peptide), "A") == [{"cartoon"}, {"cartoon", "stick"}]


def test_of_a_long_protein_only_the_backbone_is_stored(myoglobin: Structure) -> None:
    drawn = layer(myoglobin)
    assert styles_of(drawn, "A") == [{"cartoon"}]
    names = {line[5].strip('"') for line in atom_lines(drawn) if line[2] == "A"}
    assert names == {"N", "CA", "C", "O"}


def test_ligands_are_sticks_and_ions_spheres(
    myoglobin: Structure, complex_with_dna: Structure
) -> None:
    (haem,) = [chain for chain in myoglobin.chains if chain.components == ("HEM",)]
    assert styles_of(layer(myoglobin), haem.chain_id) == [{"stick"}]
    assert styles_of(layer(complex_with_dna), "D") == [{"sphere"}]


def test_nucleic_acids_are_cartoons_with_all_their_atoms(complex_with_dna: Structure) -> None:
    drawn = layer(complex_with_dna)
    assert styles_of(drawn, "A") == [{"cartoon"}]
    names = {line[5] for line in atom_lines(drawn) if line[2] == "A"}
    assert {'"P"', '"N1"', '"C1\'"'} <= names


def test_a_backbone_that_does_not_hang_together_is_drawn_as_a_trace_and_says_so(
    myoglobin: Structure,
) -> None:
    noise = np.random.default_rng(0).normal(scale=20, size=myoglobin.positions.shape)
    broken = replace(myoglobin, positions=(myoglobin.positions + noise).astype(np.float32))
    assert scene.connected_share(myoglobin) == 1.0
    drawn = layer(broken)
    assert "trace" in drawn.note
    assert isinstance(drawn.atoms, list)
    protein = [atom for atom in drawn.atoms if atom["chain"] == "A"]
    assert len(protein) == 154
    assert all(len(atom["bonds"]) == 2 for atom in protein[1:-1])


def test_a_style_that_was_asked_for_is_kept_whatever_the_backbone(myoglobin: Structure) -> None:
    broken = replace(myoglobin, positions=myoglobin.positions * 10)
    assert isinstance(layer(broken, "cartoon").atoms, str)


def test_every_residue_has_the_colour_of_its_confidence(peptide: Structure) -> None:
    plddt = np.where(peptide.layout.residue_number <= 10, 95.0, 40.0)
    drawn = scene.confidence_layer(peptide, peptide.positions, plddt, style=None)
    colored = {style["cartoon"]["color"]: selection["resi"] for selection, style in drawn.styles}
    assert colored == {"#0053D6": list(range(1, 11)), "#FF7D45": list(range(11, 26))}
    assert [scene.confidence_color(v) for v in (90, 89.9, 70, 50, 0)] == [
        "#0053D6", "#65CBF3", "#65CBF3", "#FFDB13", "#FF7D45",
    ]  # fmt: skip


def test_a_name_that_could_end_the_script_is_refused(peptide: Structure) -> None:
    names = peptide.layout.atom_name.astype("<U12").copy()
    names[0] = "</script>"
    hostile = replace(peptide, layout=replace(peptide.layout, atom_name=names))
    with pytest.raises(ValueError, match=r"cannot show '</script>'"):
        layer(hostile)


def _points(points: np.ndarray) -> Structure:
    """A structure that has coordinates only."""
    here = np.ones(len(points), bool)
    return Structure("points", None, points.astype(np.float32), here, np.empty((0, 2)))  # type: ignore[arg-type]


def test_a_trace_is_not_drawn_over_residues_that_were_not_seen(peptide: Structure) -> None:
    resolved = peptide.resolved & (peptide.layout.residue_number != 10)
    drawn = layer(replace(peptide, resolved=resolved), "trace")
    ends = [atom["resi"] for atom in drawn.atoms if len(atom["bonds"]) == 1]
    assert ends == [1, 9, 11, 24]  # residue 25 is the amide at the end

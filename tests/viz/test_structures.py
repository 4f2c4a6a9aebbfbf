"""Views of structures: what is said, and what is refused."""

from __future__ import annotations

import io
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from megafold.data import Structure
from megafold.viz import structures, viewer


def shifted(structure: Structure, by: float) -> Structure:
    return replace(structure, positions=structure.positions + np.float32(by))


def test_chains_and_ligands_are_named_in_their_colours(complex_with_dna: Structure) -> None:
    legend = structures.structure_view(complex_with_dna).legend
    assert [meaning for _, meaning in legend] == [
        "A: dna, 11 residues", "B: dna, 11 residues", "C: protein, 51 residues", "NA",
    ]  # fmt: skip
    assert len({color for color, _ in legend}) == 4


def test_structures_on_top_of_each_other_have_a_colour_each(peptide: Structure) -> None:
    both = {"truth": peptide, "prediction": shifted(peptide, 1.0)}
    drawn = structures.structure_view(both)
    assert [meaning for _, meaning in drawn.legend] == ["truth", "prediction"]
    assert len({color for color, _ in drawn.legend}) == 2
    assert drawn.title == "truth and prediction"


def test_all_structures_are_moved_alike(peptide: Structure) -> None:
    both = {"truth": peptide, "prediction": shifted(peptide, 3.0)}
    html = viewer.view_html(structures.structure_view(both).view)
    first, second = (_first_atom(model) for model in html.split(".addModel(")[1:])
    assert np.linalg.norm(second - first) == pytest.approx(3.0 * 3**0.5, abs=0.03)


def test_a_legend_with_many_entries_is_cut_and_counted(complex_with_dna: Structure) -> None:
    colors = {chain.chain_id: "#000" for chain in complex_with_dna.chains}
    many = replace(complex_with_dna)
    object.__setattr__(many, "chains", complex_with_dna.chains[:1] * 14)
    legend = structures._chain_legend(many, colors)
    assert len(legend) == structures.LEGEND + 1
    assert legend[-1][1] == "and 4 more"


def test_a_title_is_text_and_never_markup(peptide: Structure) -> None:
    drawn = structures.structure_view({"<script>x": peptide})
    assert "<script>" not in drawn.legend_html()


def test_confidence_is_explained(peptide: Structure) -> None:
    plddt = np.full(len(peptide.layout), 80.0)
    drawn = structures.structure_view(peptide, color="plddt", plddt=plddt)
    assert len(drawn.legend) == 4
    assert all("pLDDT" in meaning for _, meaning in drawn.legend)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"color": "rainbow"}, r"color is one of chain, element, plddt; not 'rainbow'"),
        ({"style": "balls"}, r"style is one of cartoon, trace, sticks; not 'balls'"),
        ({"color": "plddt"}, r"plddt.* go together"),
        ({"color": "plddt", "plddt": np.zeros(3)}, r"shape \(3,\); one value per atom is \(185,\)"),
    ],
)
def test_a_wrong_argument_is_named_with_what_would_be_right(
    peptide: Structure, arguments: dict, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        structures.structure_view(peptide, **arguments)


def test_what_is_no_structure_is_refused() -> None:
    with pytest.raises(TypeError, match=r"'path/to.cif'"):
        structures.structure_view("path/to.cif")  # type: ignore[arg-type]


def test_a_structure_without_a_resolved_atom_is_refused(peptide: Structure) -> None:
    unseen = replace(peptide, resolved=np.zeros_like(peptide.resolved))
    with pytest.raises(ValueError, match=r"'1AS5' has no resolved atom"):
        structures.structure_view(unseen)


def test_frames_of_another_shape_are_refused(peptide: Structure) -> None:
    with pytest.raises(ValueError, match=r"shape \(4, 7, 3\); \[F, 185, 3\]"):
        structures.frames_view(peptide, np.zeros((4, 7, 3)))
    with pytest.raises(ValueError, match=r"not finite"):
        structures.frames_view(peptide, np.full((2, 185, 3), np.nan))


def test_an_animation_has_every_frame_and_stops(peptide: Structure) -> None:
    frames = np.stack([peptide.positions * scale for scale in (3.0, 2.0, 1.0)])
    html = viewer.view_html(structures.frames_view(peptide, frames).view)
    assert html.count('"array"') == 1
    assert '"reps": 3' in html


@pytest.mark.usefixtures("no_browser")
def test_without_a_browser_the_missing_still_is_announced(
    peptide: Structure, capsys: pytest.CaptureFixture[str]
) -> None:
    structures.structure_view(peptide)._ipython_display_()
    assert "1AS5: no still image of this view, because no browser was found" in (
        capsys.readouterr().out
    )


@pytest.mark.browser
@pytest.mark.usefixtures("browser_path")
def test_the_still_shows_the_structure(peptide: Structure) -> None:
    picture = Image.open(io.BytesIO(structures.structure_view(peptide).still()))
    assert picture.size == (structures.WIDTH, structures.HEIGHT)
    pixels = np.asarray(picture.convert("RGB")).astype(int)
    drawn = (pixels.min(axis=-1) < 200).mean()
    assert 0.03 < drawn < 0.6
    assert len(np.unique(pixels.reshape(-1, 3), axis=0)) > 50


@pytest.mark.browser
@pytest.mark.usefixtures("browser_path")
def test_the_still_of_an_animation_shows_the_last_frame(peptide: Structure) -> None:
    frames = np.stack([peptide.positions * 10, peptide.positions])
    last = structures.frames_view(peptide, frames).still()
    alone = structures.frames_view(peptide, frames[1:]).still()
    assert last == alone


def _first_atom(model: str) -> np.ndarray:
    line = next(line for line in model.split("\\n") if line.startswith("ATOM"))
    return np.array([float(v) for v in line.split()[-3:]])

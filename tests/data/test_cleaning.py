"""Each rule of cleaning, on a real entry that it touches or on one edited so that it does."""

from __future__ import annotations

import gzip
import re
from pathlib import Path

import numpy as np
import pytest

from megafold.data import (
    DataError,
    ExcludedError,
    build_cache,
    examine_cache,
    read_structure,
    sample_path,
)
from megafold.data.targets import target_fault

ENTRIES = Path(__file__).parent / "entries"


@pytest.fixture
def edited(tmp_path):
    """(entry, row -> row or None) -> path of a file with its rows of atoms edited."""

    def write(name: str, edit) -> Path:
        path = ENTRIES / f"{name}.cif.gz"
        text = gzip.decompress((path if path.exists() else sample_path(name)).read_bytes()).decode()
        lines = []
        for line in text.splitlines():
            if line.startswith(("ATOM", "HETATM")):
                fields = edit(line.split())
                line = None if fields is None else " ".join(fields)
            lines += [] if line is None else [line]
        (out := tmp_path / f"{name}.cif").write_text("\n".join(lines) + "\n")
        return out

    return write


def test_of_alternative_locations_the_most_occupied_is_taken(structure_of) -> None:
    """All residues of 5UGO and 3NZD that have two."""
    for name, residues in (("5UGO", 7), ("3NZD", 3)):
        text = gzip.decompress(sample_path(name).read_bytes()).decode()
        columns = re.findall(r"^_atom_site\.(\S+)", text, re.MULTILINE)
        at = {column: i for i, column in enumerate(columns)}
        places: dict[tuple[str, int, str], list[tuple[float, list[float]]]] = {}
        for line in text.splitlines():
            if line.startswith("ATOM"):
                row = line.split()
                if row[at["label_alt_id"]] != ".":
                    key = (row[at["label_asym_id"]], int(row[at["label_seq_id"]]),
                           row[at["label_atom_id"]])  # fmt: skip
                    xyz = [float(row[at[f"Cartn_{axis}"]]) for axis in "xyz"]
                    places.setdefault(key, []).append((float(row[at["occupancy"]]), xyz))
        structure, compared = structure_of(name), set()
        layout = structure.layout
        keys = zip(layout.chain_id.tolist(), layout.residue_number.tolist(),
                   layout.atom_name.tolist(), strict=True)  # fmt: skip
        for row, key in enumerate(keys):
            if key in places and key[2] not in ("NH1", "NH2"):
                most = max(occupancy for occupancy, _ in places[key])
                best = [xyz for occupancy, xyz in places[key] if occupancy == most]
                error = min(np.abs(structure.positions[row] - xyz).max() for xyz in best)
                assert error < 1e-3, (name, key)
                compared.add(key[:2])
        assert len(compared) == residues


def test_hydrogens_go(structure_of) -> None:
    """1AS5 was solved by NMR: 172 of the atoms of its first model are hydrogens."""
    structure = structure_of("1AS5")
    assert structure.removed["atoms: hydrogen"] == 172
    assert not np.isin(structure.layout.element, ("H", "D")).any()


def test_a_component_of_unknown_chemistry_goes() -> None:
    """3EK3 has a UNL of 8 atoms; its assembly has two of them."""
    structure = read_structure(ENTRIES / "3EK3.cif.gz")
    assert structure.removed["atoms: unknown component"] == 2 * 8
    assert {c.components[0] for c in structure.chains if len(c) == 1} == {"FMN"}


def test_an_atom_that_leaves_when_a_residue_is_bonded_goes() -> None:
    structure = read_structure(ENTRIES / "1GL4.bcif.gz")
    assert structure.removed["atoms: leaving"] == 2


def test_a_chain_that_clashes_goes() -> None:
    """In 1NCB a calcium ion lies within 1.7 angstrom of the protein, in each of four copies."""
    structure = read_structure(ENTRIES / "1NCB.cif.gz")
    assert structure.removed["chains: clashing with another"] == 4
    names = {chain.chain_id.partition("-")[0] for chain in structure.chains}
    assert names == set("ABCDEF")  # G is the ion, H to J are water


def test_a_chain_of_unknown_residues_goes(edited) -> None:
    """1A8O as if nobody had known its sequence: N, CA, C, O and CB of UNK."""

    def unknown(row: list[str]) -> list[str] | None:
        row[0], row[5] = "ATOM", "UNK" if row[0] == "ATOM" or row[5] == "MSE" else row[5]
        return row if row[5] != "UNK" or row[3] in ("N", "CA", "C", "O", "CB") else None

    path = edited("1A8O", unknown)
    text = re.sub(r"(?m)^(1 +\d+ +)[A-Z]{3}( +n)", r"\1UNK\2", path.read_text())
    path.write_text(text)
    with pytest.raises(ExcludedError, match="chain of unknown residues': 2"):
        read_structure(path)


@pytest.mark.parametrize("resolved", [3, 4])
def test_a_chain_of_fewer_than_4_resolved_residues_goes(resolved, edited) -> None:
    path = edited("1CRN", lambda row: row if int(row[8]) <= resolved else None)
    if resolved == 4:
        assert len(read_structure(path).chains) == 1
        return
    with pytest.raises(ExcludedError, match="fewer than 4 resolved residues': 1"):
        read_structure(path)


@pytest.mark.parametrize(("shift", "stays"), [(5.0, True), (20.0, False)])
def test_a_protein_with_a_gap_over_10_angstrom_goes(shift, stays, edited) -> None:
    """Crambin, its second half moved away."""

    def move(row: list[str]) -> list[str]:
        if int(row[8]) > 23:
            row[10] = f"{float(row[10]) + shift:.3f}"
        return row

    path = edited("1CRN", move)
    if stays:
        assert len(read_structure(path).chains) == 1
        return
    with pytest.raises(ExcludedError, match="gap over 10 A between neighbours': 1"):
        read_structure(path)


def test_a_gap_of_unresolved_residues_is_none(structure_of) -> None:
    """2XHE: the ends of its unresolved loops are further apart than 10 angstrom."""
    structure = structure_of("2XHE")
    alpha = structure.layout.atom_name == "CA"
    seen = np.flatnonzero(alpha & structure.resolved & (structure.layout.chain_id == "A"))
    step = np.linalg.norm(np.diff(structure.positions[seen], axis=0), axis=-1)
    assert (step > 10).any()
    assert len(structure.chains) == 2


def test_a_bond_longer_than_a_bond_goes(edited) -> None:
    """4I39's ligand moved by 40 angstrom: it stays, its bond to cysteine does not."""

    def move(row: list[str]) -> list[str]:
        if row[5] == "HC4":
            row[10] = f"{float(row[10]) + 40:.3f}"
        return row

    structure = read_structure(edited("4I39", move))
    assert structure.removed["bonds: longer than 2.4 A"] == 1
    assert len(structure.bonds) == 0
    assert "HC4" in structure.layout.residue_name


def test_targets_for_training_have_a_resolution_a_size_and_a_date(structure_of) -> None:
    from dataclasses import replace

    structure = structure_of("5UGO")
    assert target_fault(structure) is None
    assert "resolution of 9.5" in target_fault(replace(structure, resolution=9.5))
    assert target_fault(replace(structure, resolution=None)) is None
    late = replace(structure, release_date="2021-10-01")
    assert target_fault(late) == "released 2021-10-01, after 2021-09-30"
    assert target_fault(late, released_by=None) is None


def test_targets_for_training_have_at_most_300_polymer_chains(structure_of, monkeypatch) -> None:
    from megafold.data import targets

    monkeypatch.setattr(targets, "MAX_POLYMER_CHAINS", 3)
    assert target_fault(structure_of("5UGO")) == "4 polymer chains, at most 3"


def test_a_component_without_coordinates_for_any_atom_is_an_error_not_an_empty_chain(
    edited,
) -> None:
    with pytest.raises(DataError, match="no atom has coordinates"):
        read_structure(edited("1CRN", lambda row: [*row[:10], "?", "?", "?", *row[13:]]))


def test_a_cache_of_targets_excludes_the_others_and_says_why(tmp_path) -> None:
    """1CRN was released in 1981; as if it had been in 2022, and at once in both ways."""
    text = gzip.decompress(sample_path("1CRN").read_bytes()).decode()
    assert "1981-07-28" in text
    late = re.sub(r"\b(19|20)\d\d-\d\d-\d\d\b", "2022-01-05", text)
    structures = tmp_path / "structures"
    structures.mkdir()
    (structures / "EARLY.cif").write_text(text)
    (structures / "LATE.cif").write_text(late)
    everything = build_cache(structures, tmp_path / "cache")
    assert everything.ok == 2
    targets = build_cache(structures, tmp_path / "cache", targets_only=True)
    assert (targets.ok, targets.excluded) == (1, 1)
    (reason,) = (entry.reason for entry in targets.entries if entry.status == "excluded")
    assert "no target for training: released 2022-01-05, after 2021-09-30" in reason
    (row,) = (e for e in examine_cache(tmp_path / "cache") if e.name == "LATE")
    assert row.status == "excluded"

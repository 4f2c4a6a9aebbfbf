"""Structure files that cannot be used: the error names the file and the cause."""

from __future__ import annotations

import gzip
import re

import numpy as np
import pytest

from megafold.data import DataError, ExcludedError, read_structure, sample_path


def _refused(path, cause: str) -> None:
    with pytest.raises(DataError, match=f"(?s)^{path}: .*{cause}"):
        read_structure(path)


def test_a_missing_file(tmp_path) -> None:
    _refused(tmp_path / "gone.cif", "no such file")


def test_an_unknown_kind_of_file(tmp_path) -> None:
    (path := tmp_path / "model.xyz").write_text("ATOM")
    _refused(path, r"expected a name ending in \.cif, \.mmcif, \.bcif, \.pdb, \.ent")


@pytest.mark.parametrize("name", ["EMPTY.cif", "EMPTY.bcif"])
def test_an_empty_file(name, tmp_path) -> None:
    (path := tmp_path / name).write_bytes(b"")
    _refused(path, "truncated or not mmCIF")


def test_an_empty_compressed_file(tmp_path) -> None:
    (path := tmp_path / "EMPTY.cif.gz").write_bytes(gzip.compress(b""))
    _refused(path, "truncated or not mmCIF")


@pytest.mark.parametrize(
    "text", ["hello", "<html>404</html>", "data_X\n#\n", "data_X\n_entry.id X\n", "\x00\x01\x02"]
)
def test_what_is_not_mmcif(text, write_cif) -> None:
    _refused(write_cif("X.cif", text), "not mmCIF")


def test_text_that_is_called_binary(write_cif, cif_text) -> None:
    _refused(write_cif("X.bcif", cif_text), "not mmCIF")


def test_text_that_is_called_compressed(write_cif, cif_text) -> None:
    _refused(write_cif("X.cif.gz", cif_text), "not gzip")


@pytest.mark.parametrize("share", [0.2, 0.5, 0.9, 0.999])
def test_a_truncated_compressed_file(share, tmp_path) -> None:
    whole = sample_path("1CRN").read_bytes()
    (path := tmp_path / "CUT.cif.gz").write_bytes(whole[: int(share * len(whole))])
    _refused(path, "truncated")


def test_text_cut_off_within_a_row_of_atoms(write_cif, cif_text) -> None:
    at = cif_text.index("\nATOM 100 ")
    _refused(write_cif("CUT.cif", cif_text[: at + 30]), "truncated")


def test_text_cut_off_between_two_rows_of_atoms(write_cif) -> None:
    """Nothing in the table of atoms shows it, but a chain is listed that has none."""
    text = gzip.decompress(sample_path("5UGO").read_bytes()).decode()
    at = text.index("\nATOM   1000")
    _refused(write_cif("CUT.cif", text[:at] + "\n#\n"), "listed in struct_asym but has no atom")


def test_text_cut_off_between_the_last_rows_of_atoms(write_cif, cif_text) -> None:
    """Only the # is missing that the tables before end with."""
    at = cif_text.index("\nATOM 300 ")
    _refused(write_cif("CUT.cif", cif_text[:at] + "\n"), "ends with a row of atoms, without the #")


def test_a_file_that_never_separates_its_tables_may_end_with_a_row_of_atoms(
    write_cif, cif_text
) -> None:
    rows = [line for line in cif_text.splitlines() if line.startswith("ATOM")]
    head = cif_text[: cif_text.index(rows[0])]
    text = head[head.rindex("loop_") :] + "\n".join(rows) + "\n"
    assert len(read_structure(write_cif("BARE.cif", f"data_BARE\n{text}")).layout) == 327


@pytest.mark.parametrize("expression", ["1-9999999", "(1-9999)(1-9999)", "1,(2-99999999)"])
def test_an_assembly_that_no_memory_holds(expression, write_cif) -> None:
    text = gzip.decompress(sample_path("1A8O").read_bytes()).decode()
    many = text.replace("oper_expression   1,2 ", f"oper_expression '{expression}' ")
    _refused(write_cif("MANY.cif", many), r"assembly 1 would have \d+ atoms \(oper_expression")


def test_an_assembly_of_something_that_is_no_operation(write_cif) -> None:
    text = gzip.decompress(sample_path("1A8O").read_bytes()).decode()
    odd = text.replace("oper_expression   1,2 ", "oper_expression   1,,2 ")
    _refused(write_cif("ODD.cif", odd), "'' is no operation")


def test_pdb_format_without_atoms(tmp_path) -> None:
    (path := tmp_path / "X.pdb").write_text("HEADER    NOTHING\nEND\n")
    _refused(path, "truncated or not PDB format: no ATOM or HETATM")


def test_an_entry_in_pdb_format_that_is_cut(tmp_path, pdb_text) -> None:
    text = pdb_text("1CRN")
    (path := tmp_path / "CUT.pdb").write_text(text[: len(text) // 2])
    _refused(path, "HEADER but no END")


def test_a_component_that_nobody_knows(write_cif) -> None:
    text = gzip.decompress(sample_path("102M").read_bytes()).decode().replace("HEM", "QQQQQ")
    _refused(write_cif("ODD.cif", text), "component 'QQQQQ' is not in the chemical component")


def test_an_unknown_component_among_unresolved_residues(write_cif, structure_of) -> None:
    structure = structure_of("2XHE")
    starts = structure.residue_starts
    unseen = np.add.reduceat(structure.resolved, starts) == 0
    first = starts[np.flatnonzero(unseen)[0]]
    number, name = structure.layout.residue_number[first], structure.layout.residue_name[first]
    text = gzip.decompress(sample_path("2XHE").read_bytes()).decode()
    row = next(line for line in text.splitlines() if line.split() == ["1", f"{number}", name, "n"])
    odd = text.replace(f"\n{row}\n", f"\n1 {number} QQQQQ n\n")
    _refused(write_cif("ODD.cif", odd), "component 'QQQQQ'")


def test_atoms_that_are_not_of_the_sequence(write_cif) -> None:
    text = gzip.decompress(sample_path("2XHE").read_bytes()).decode()
    row = next(line for line in text.splitlines() if line.split() == ["1", "1", "HIS", "n"])
    odd = text.replace(f"\n{row}\n", "\n1 1 ALA n\n")
    _refused(write_cif("ODD.cif", odd), "residue 1 is HIS in atom_site, ALA in entity_poly_seq")


def test_nothing_but_water(write_cif, water) -> None:
    path = write_cif("WET.cif", water)
    _refused(path, "nothing left after cleaning")
    with pytest.raises(ExcludedError):
        read_structure(path)


def test_coordinates_that_are_no_numbers(write_cif, cif_text) -> None:
    assert " 17.047 " in cif_text
    _refused(write_cif("NAN.cif", cif_text.replace(" 17.047 ", " xx.xxx ")), "malformed")


@pytest.mark.parametrize("number", ["1e9", "-9999999.999", "1e38"])
def test_atoms_that_are_impossibly_far_apart(number, write_cif, cif_text) -> None:
    far = cif_text.replace(" 17.047 ", f" {number} ")
    _refused(write_cif("FAR.cif", far), "angstrom apart, at most 5000 is possible")


def test_atoms_without_coordinates(write_cif, cif_text) -> None:
    nowhere = re.sub(r"(?m)^(ATOM (?:\S+ +){9})\S+", r"\1?", cif_text)
    _refused(write_cif("NOWHERE.cif", nowhere), "no atom has coordinates")


def test_an_atom_without_coordinates_is_not_at_zero(write_cif, cif_text) -> None:
    assert " 17.047 " in cif_text
    structure = read_structure(write_cif("GAP.cif", cif_text.replace(" 17.047 ", " ? ")))
    assert structure.resolved[:3].tolist() == [False, True, True]

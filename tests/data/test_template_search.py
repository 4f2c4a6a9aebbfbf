"""Templates: hits that are read or found, filters, and coordinates of real structures."""

from __future__ import annotations

import gzip
from pathlib import Path

import numpy as np
import pytest

from megafold.data import DataError, query_alignment, sample_path
from megafold.data.blocks import read_block
from megafold.data.template_hits import (
    TemplateHit,
    hit_fault,
    latest_release,
    parse_hhr,
    parse_m8,
    read_template_hits,
    release_fault,
)
from megafold.data.template_search import (
    chain_residues,
    find_templates,
    read_templates,
    search_template_hits,
    template_of_hit,
    write_templates,
)

HHR = """Query         query

No 1
>1CRN_A CRAMBIN; PLANT SEED PROTEIN
Probab=98.84  E-value=4.1e-12  Score=71.92  Aligned_cols=8  Identities=33%

Q query             2 CPSI-VAR    8 (45)
Q Consensus         2 cpsi~var    8 (45)
T Consensus         4 c~si~~ar    9 (46)
T 1CRN_A            4 C-SIVVAR   10 (46)
T ss_dssp             CCCCCCCC

Q query             9 SN   10 (45)
T 1CRN_A           11 SN   12 (46)
Confidence            99

No 2
>2XHE_B SYNTAXIN
Probab=50  E-value=3  Score=1

Q query             1 AA    2 (45)
T 2XHE_B            5 AA    6 (46)
"""
SEQUENCES = {
    "1crn_A mol:protein length:46": "TTCCPSIVARSNFNVCRLPGTPEAICATYTGCIIIPGATCPGDYAN",
    "9xyz_A mol:protein length:46": "TTCCPSIVARSNFNVCRLPGTPEAICATYTGCIIIPGATCPGDYAN",
    "8na_A mol:na length:46": "TTCCPSIVARSNFNVCRLPGTPEAICATYTGCIIIPGATCPGDYAN",
}
QUERY = "TTCCPSIVARSNFNVCRLPGTPEAICATWTGCIIIPGATCPGDYANAA"  # Y29W, and two residues more


@pytest.fixture(scope="module")
def structures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pdb")
    for name in ("1CRN", "3NZD"):
        (folder / f"{name.lower()}.cif.gz").write_bytes(sample_path(name).read_bytes())
    return folder


@pytest.fixture(scope="module")
def database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("seqres") / "pdb_seqres.txt"
    path.write_text("".join(f">{name}\n{sequence}\n" for name, sequence in SEQUENCES.items()))
    return path


def _hit(rows, template_rows, residues="", chain="A", entry="1CRN") -> TemplateHit:
    return TemplateHit(entry, chain, np.array(rows), np.array(template_rows), residues, 1e-5)


def test_hhsearch_rows_are_aligned_where_neither_has_a_gap() -> None:
    first, second = parse_hhr(HHR)
    assert (first.entry, first.chain, first.e_value) == ("1CRN", "A", 4.1e-12)
    assert first.rows.tolist() == [1, 3, 4, 5, 6, 7, 8, 9]
    assert first.template_rows.tolist() == [3, 4, 5, 7, 8, 9, 10, 11]
    assert first.residues == "CSIVARSN"
    assert second.name == "2XHE_B"


def test_mmseqs_rows_are_aligned_by_the_cigar() -> None:
    line = "101\t1crn_A\t1.0\t9\t0\t0\t2\t10\t4\t11\t9.8E-39\t142\t3M2I1M1D3M"
    (hit,) = parse_m8(line + "\n")
    assert (hit.name, hit.e_value) == ("1CRN_A", 9.8e-39)
    assert hit.rows.tolist() == [1, 2, 3, 6, 7, 8, 9]
    assert hit.template_rows.tolist() == [3, 4, 5, 6, 8, 9, 10]


@pytest.mark.parametrize(
    ("name", "text", "cause"),
    [
        ("x.hhr", "nothing", "no hit in it"),
        ("x.hhr", "\nNo 1\n>1CRN_A\nE-value=1\n", "hit 1 has no name, E-value or alignment"),
        ("x.m8", "101\t1crn_A\t1.0\n", "line 1 has 3 columns, expected 13"),
        ("x.m8", "q\t1crn_A\t1\t9\t0\t0\t1\t9\t1\t9\t1\t2\t3Z\n", "'3Z' is no CIGAR"),
        ("x.m8", "q\t1crn_A\t1\t9\t0\t0\t1\t9\t1\t9\t1\t2\t8M\n", "does not end where the columns"),
        ("x.m8", "q\tcrambin\t1\t9\t0\t0\t1\t9\t1\t9\t1\t2\t9M\n", "'crambin' does not name"),
        ("x.txt", "", "expected template hits as .hhr or .m8"),
    ],
)
def test_what_are_no_hits_is_refused(name, text, cause, tmp_path) -> None:
    (path := tmp_path / name).write_text(text)
    with pytest.raises(DataError, match=cause):
        read_template_hits(path)


def test_compressed_hits_that_are_cut_are_refused(tmp_path) -> None:
    (path := tmp_path / "x.hhr.gz").write_bytes(gzip.compress(HHR.encode())[:-9])
    with pytest.raises(DataError, match=r"x\.hhr\.gz: truncated"):
        read_template_hits(path)


@pytest.mark.parametrize(
    ("count", "fault"),
    [(9, "9 aligned residues, fewer than 10"), (10, None), (48, None)],
)
def test_ten_residues_are_the_least(count, fault) -> None:
    hit = _hit(range(count), range(count), "A" * count)
    assert hit_fault(hit, QUERY) == fault


@pytest.mark.parametrize(("count", "passes"), [(19, False), (20, True)])
def test_a_tenth_of_the_query_is_the_least(count, passes) -> None:
    fault = hit_fault(_hit(range(count), range(count), "A" * count), "C" * 200)
    assert (fault is None) is passes
    assert passes or "less than 10% of the query's 200" in fault


@pytest.mark.parametrize(("count", "passes"), [(95, True), (96, False)])
def test_the_query_itself_is_no_template(count, passes) -> None:
    """Identical over more than 95 % of 100 residues; one that differs anywhere may stay."""
    query = "ACDEFGHIKL" * 10
    assert (hit_fault(_hit(range(count), range(count), query[:count]), query) is None) is passes
    other = "W" + query[1:count]
    assert hit_fault(_hit(range(count), range(count), other), query) is None


def test_templates_are_60_days_older_than_the_example() -> None:
    assert latest_release("2020-03-01") == "2020-01-01"
    assert release_fault("2020-01-01", "2020-01-01") is None
    assert release_fault("2020-01-02", "2020-01-01") == "released 2020-01-02, after 2020-01-01"
    assert "no release date" in release_fault("", "2020-01-01")
    assert latest_release("") is None
    assert release_fault("2030-01-01", None) is None


def test_a_profile_finds_the_chain_and_says_where_it_is_alike(database) -> None:
    hits = search_template_hits(query_alignment(QUERY), database)
    assert [hit.name for hit in hits] == ["1CRN_A", "9XYZ_A"]  # not the nucleic acid
    assert hits[0].rows.tolist() == hits[0].template_rows.tolist() == list(range(46))
    assert hits[0].residues == SEQUENCES["1crn_A mol:protein length:46"]
    assert hits[0].e_value < 1e-10


def test_a_found_template_has_the_coordinates_of_its_structure(database, structures) -> None:
    notes: list[str] = []
    hits = search_template_hits(query_alignment(QUERY), database)
    (template,) = find_templates(hits, QUERY, structures, note=notes.append)
    assert notes == [f"9XYZ_A: no file of 9XYZ in {structures}"]
    text = gzip.decompress(sample_path("1CRN").read_bytes()).decode()
    rows = [line.split() for line in text.splitlines() if line.startswith("ATOM")]
    for place, name in enumerate(("N", "CA", "C")):
        (row,) = (r for r in rows if r[8] == "29" and r[3] == name)
        np.testing.assert_allclose(template.backbone[28, place], [float(x) for x in row[10:13]])
    assert template.backbone_mask.tolist() == [True] * 46 + [False] * 2


def test_templates_that_are_too_young_are_left_out_and_named(database, structures) -> None:
    notes: list[str] = []
    hits = search_template_hits(query_alignment(QUERY), database)
    assert not find_templates(hits, QUERY, structures, latest="1981-07-27", note=notes.append)
    assert notes[0] == "1CRN_A: released 1981-07-28, after 1981-07-27"


def test_a_hit_read_without_its_residues_is_still_known_as_the_query(structures) -> None:
    """MMseqs2's table has no sequences: that of the structure counts."""
    sequence = SEQUENCES["1crn_A mol:protein length:46"]
    with pytest.raises(DataError, match="the query itself: identical over 100%"):
        template_of_hit(_hit(range(46), range(46)), sequence, structures / "1crn.cif.gz")


def test_unresolved_residues_of_a_template_are_masked(tmp_path) -> None:
    """2XHE's first chain, of which many residues were not seen."""
    block = read_block(sample_path("2XHE"))
    names, atoms = chain_residues(block, "A", "2XHE")
    assert len(names) == 650
    seen = np.isfinite(atoms["CA"]).all(axis=-1)
    assert 0 < (~seen).sum() < 650


@pytest.mark.parametrize(
    ("hit", "cause"),
    [
        (_hit(range(12), range(12), chain="Q"), "no polymer chain Q"),
        (_hit(range(12), range(40, 52)), "aligned up to residue 52, but chain A of .* has 46"),
        (_hit(range(12), range(12), "WWWWWWWWWWWW"), "its sequence is not that of chain A"),
    ],
)
def test_a_hit_that_is_not_of_the_structure_is_refused(hit, cause, structures) -> None:
    with pytest.raises(DataError, match=cause):
        template_of_hit(hit, QUERY, structures / "1crn.cif.gz")


def test_templates_come_back_from_their_file(database, structures, tmp_path) -> None:
    hits = search_template_hits(query_alignment(QUERY), database)
    written = find_templates(hits, QUERY, structures)
    (read,) = read_templates(write_templates(tmp_path / "x.templates.npz", written))
    assert read.name == "1CRN_A"
    for name in ("restype", "pseudo_beta", "pseudo_beta_mask", "backbone", "backbone_mask"):
        np.testing.assert_array_equal(getattr(read, name), getattr(written[0], name))
    assert read_templates(write_templates(tmp_path / "none.templates.npz", [])) == []


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04", b"\x80\x04]\x94."])
def test_a_damaged_file_of_templates_is_refused(content, tmp_path) -> None:
    (path := tmp_path / "x.templates.npz").write_bytes(content)
    with pytest.raises(DataError, match="damaged or no file of templates"):
        read_templates(path)

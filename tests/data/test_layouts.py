"""Alignments from the folders that different programs leave."""

from __future__ import annotations

import gzip

import numpy as np
import pytest

from megafold.data import DataError, build_cache, featurize, read_alignment, sample_path
from megafold.data.alignment import merge_alignments, parse_alignment
from megafold.data.constants import RESTYPE_INDEX
from megafold.data.layouts import find_alignments, read_inputs
from megafold.data.stockholm import stockholm_to_a3m
from megafold.data.template_chains import template_from_chain
from megafold.data.template_search import write_templates

STOCKHOLM = """# STOCKHOLM 1.0
#=GF ID query
#=GS hit/3-9 DE [subseq from] Some protein OS=Homo sapiens OX=9606
query         AC-DE
hit/3-9       AGk-E
#=GC RF       xx.xx

query         FG
hit/3-9       F.
//
"""


@pytest.fixture
def complex_of_two(structure_of):
    """2XHE and the sequences of its two proteins."""
    structure = structure_of("2XHE")
    return structure, *(chain.sequence for chain in structure.chains)


def _change(sequence: str, at: int) -> str:
    return sequence[:at] + ("W" if sequence[at] != "W" else "A") + sequence[at + 1 :]


def test_stockholm_has_the_columns_of_its_first_row(tmp_path) -> None:
    (path := tmp_path / "x.sto").write_text(STOCKHOLM)
    alignment = read_alignment(path)
    expected = parse_alignment(">query\nACDEFG\n>hit\nAGk-EF-\n")
    np.testing.assert_array_equal(alignment.msa, expected.msa)
    np.testing.assert_array_equal(alignment.deletions, expected.deletions)


def test_stockholm_descriptions_name_the_organism(tmp_path) -> None:
    (path := tmp_path / "x.sto.gz").write_bytes(gzip.compress(STOCKHOLM.encode()))
    assert read_alignment(path).species == ("", "9606")


@pytest.mark.parametrize(
    ("text", "cause"),
    [
        (">q\nAC\n", "must start with '# STOCKHOLM'"),
        (STOCKHOLM.replace("//", ""), "truncated: no // at the end"),
        ("# STOCKHOLM 1.0\n//\n", "no sequence"),
        (STOCKHOLM.replace("hit/3-9       F.", "hit/3-9       F"), "has 6 columns"),
        (STOCKHOLM.replace("F.", "F. x"), "is not a name and its residues"),
    ],
)
def test_what_is_no_stockholm_is_refused(text, cause) -> None:
    with pytest.raises(DataError, match=rf"x\.sto: .*{cause}"):
        stockholm_to_a3m(text, "x.sto")


def test_one_file_a_chain(tmp_path, structure_of) -> None:
    structure = structure_of("1CRN")
    sequence = structure.chains[0].sequence
    (tmp_path / "1CRN_A.sto").write_text(f"# STOCKHOLM 1.0\nq {sequence}\n//\n")
    found = find_alignments(tmp_path)
    assert found == {"1CRN": {"A": tmp_path / "1CRN_A.sto"}}
    assert len(read_inputs(structure, found["1CRN"]).alignments["A"]) == 1


@pytest.mark.parametrize("second", ["1CRN_A.a3m.gz", "1CRN_A.sto"])
def test_two_files_of_one_chain_are_refused(tmp_path, second) -> None:
    for name in ("1CRN_A.a3m", second):
        (tmp_path / name).write_bytes(b"")
    with pytest.raises(DataError, match="are both of chain A of 1CRN"):
        find_alignments(tmp_path)


def test_rows_to_pair_and_templates_stand_beside(tmp_path, complex_of_two) -> None:
    structure, a, b = complex_of_two
    for chain, sequence in (("A", a), ("B", b)):
        (tmp_path / f"2XHE_{chain}.a3m").write_text(f">q\n{sequence}\n")
        rows = f">q\n{sequence}\n>x OX=7\n{_change(sequence, 3)}\n"
        (tmp_path / f"2XHE_{chain}.pair.a3m").write_text(rows)
    atoms = {name: np.zeros((1, 3), np.float32) for name in ("N", "CA", "C", "CB")}
    template = template_from_chain("1ABC_A", len(a), [5], [0], np.zeros(1, np.uint8), atoms)
    write_templates(tmp_path / "2XHE_A.templates.npz", [template])
    inputs = read_inputs(structure, find_alignments(tmp_path)["2XHE"])
    features = featurize(
        structure, inputs.alignments, to_pair=inputs.to_pair, templates=inputs.templates
    )
    assert len(features.msa) == 2
    assert features.msa_mask[1].all()
    rows = np.flatnonzero(features.template_restype[0] != RESTYPE_INDEX["GAP"])
    assert features.residue_index[rows].tolist() == [6]


def test_openproteinset_has_a_folder_for_each_chain(tmp_path, structure_of) -> None:
    structure = structure_of("1CRN")
    sequence = structure.chains[0].sequence
    folder = tmp_path / "1CRN_A" / "a3m"
    folder.mkdir(parents=True)
    for i, name in enumerate(("mgnify_hits", "uniref90_hits", "bfd_uniclust_hits")):
        rows = f">q\n{sequence}\n>{name}\n{_change(sequence, i)}\n"
        (folder / f"{name}.a3m").write_text(rows)
    (folder / "uniprot_hits.a3m").write_text(f">q\n{sequence}\n>x OX=7\n{sequence}\n")
    (tmp_path / "1CRN_A" / "hhr").mkdir()
    inputs = read_inputs(structure, find_alignments(tmp_path)["1CRN"])
    assert inputs.alignments["A"].descriptions == (
        "q", "uniref90_hits", "bfd_uniclust_hits", "mgnify_hits",
    )  # fmt: skip
    assert inputs.to_pair["A"].species == ("", "7")  # though it repeats the query


def test_colabfolds_complex_is_cut_into_its_chains(tmp_path, complex_of_two) -> None:
    structure, a, b = complex_of_two
    text = (
        f"#{len(a)},{len(b)}\t1,1\n>101\t102\n{a}{b}\n>X\tY\n{_change(a, 1)}{_change(b, 2)}\n"
        f">only A\nkk{_change(a, 3)}{'-' * len(b)}\n>only B\n{'-' * len(a)}{b[:5]}gg{b[5:]}\n"
    )
    (tmp_path / "2XHE.a3m").write_text(text)
    inputs = read_inputs(structure, find_alignments(tmp_path)["2XHE"])
    assert inputs.alignments["A"].descriptions == ("101\t102", "only A")
    assert inputs.to_pair["A"].species == inputs.to_pair["B"].species == ("", "row 1")
    features = featurize(structure, inputs.alignments, to_pair=inputs.to_pair)
    first = features.asym_id == 1
    np.testing.assert_array_equal(features.msa[1, first], inputs.to_pair["A"].msa[1])
    np.testing.assert_array_equal(features.msa[1, ~first], inputs.to_pair["B"].msa[1])


def test_insertions_go_with_the_chain_that_they_are_in(tmp_path, complex_of_two) -> None:
    structure, a, b = complex_of_two
    pair = f"{_change(a, 0)}{b[:1]}ww{_change(b[1:], 0)}"
    (tmp_path / "2XHE.a3m").write_text(f"#{len(a)},{len(b)}\t1,1\n>q\n{a}{b}\n>p\n{pair}\n")
    inputs = read_inputs(structure, find_alignments(tmp_path)["2XHE"])
    assert not inputs.to_pair["A"].deletions.any()
    assert inputs.to_pair["B"].deletions[1].tolist()[:3] == [0, 2, 0]


def test_colabfolds_server_leaves_a_block_for_each_query(tmp_path, complex_of_two) -> None:
    structure, a, b = complex_of_two
    env, pair = tmp_path / "2XHE_env", tmp_path / "2XHE_pairgreedy"
    env.mkdir()
    pair.mkdir()
    blocks = [f">{i}\n{s}\n>u{i}\n{_change(s, 1)}\n" for i, s in ((101, a), (102, b))]
    (env / "uniref.a3m").write_text("\0".join(blocks) + "\0")
    (env / "bfd.mgnify30.metaeuk30.smag30.a3m").write_text(blocks[0].replace("u101", "bfd") + "\0")
    paired = [f">{i}\n{s}\n>p\n{s}\n>r\n{_change(s, 4)}\n" for i, s in ((101, a), (102, b))]
    (pair / "pair.a3m").write_text("\0".join(paired) + "\0")
    inputs = read_inputs(structure, find_alignments(tmp_path)["2XHE"])
    assert inputs.alignments["A"].descriptions == ("101", "u101")  # bfd repeats it
    assert inputs.alignments["B"].descriptions == ("102", "u102")
    assert inputs.to_pair["B"].species == ("", "row 1", "row 2")


def test_a_query_of_no_chain_is_refused(tmp_path, structure_of) -> None:
    (tmp_path / "1CRN.a3m").write_text("#5\t1\n>101\nACDEF\n")
    with pytest.raises(DataError, match="query '101' of 5 residues is no chain of 1CRN"):
        read_inputs(structure_of("1CRN"), find_alignments(tmp_path)["1CRN"])


@pytest.mark.parametrize(
    ("text", "cause"),
    [
        ("#46;1\n>q\nA\n", "is not #lengths<TAB>copies"),
        ("#4,3\t1,1\n>q\nACDEFG\n", "row 'q' has 6 columns, the chains have 7"),
    ],
)
def test_a_damaged_complex_is_refused(text, cause, tmp_path, structure_of) -> None:
    (tmp_path / "1CRN.a3m").write_text(text)
    with pytest.raises(DataError, match=cause):
        read_inputs(structure_of("1CRN"), find_alignments(tmp_path)["1CRN"])


def test_alignments_of_different_queries_do_not_merge() -> None:
    with pytest.raises(DataError, match="have different queries"):
        merge_alignments([parse_alignment(">q\nAC\n"), parse_alignment(">q\nAD\n")])


def test_a_cache_is_built_from_any_of_them(tmp_path) -> None:
    structures, alignments = tmp_path / "structures", tmp_path / "msa" / "1CRN_A"
    structures.mkdir()
    alignments.mkdir(parents=True)
    (structures / "1CRN.cif.gz").write_bytes(sample_path("1CRN").read_bytes())
    sequence = "TTCCPSIVARSNFNVCRLPGTPEAICATYTGCIIIPGATCPGDYAN"
    rows = f">q\n{sequence}\n>h\n{_change(sequence, 2)}\n"
    (alignments / "uniref90_hits.a3m").write_text(rows)
    (report,) = build_cache(structures, tmp_path / "cache", alignments=tmp_path / "msa").entries
    assert (report.status, report.rows) == ("ok", 2)

"""PDB format gives what mmCIF gives of the same entry."""

from __future__ import annotations

import gzip

import numpy as np
import pytest

from megafold.data import DataError, read_structure

# With a modified residue, DNA and ions, RNA, a chromophore, symmetry, unresolved loops.
ENTRIES = ["1AS5", "1CRN", "5UGO", "1A8O", "102M", "4P5J", "1EMA", "3NZD", "4CUP", "2XHE"]


@pytest.mark.parametrize("sample_id", ENTRIES)
def test_the_structure_is_that_of_the_mmcif_file(
    sample_id, structure_of, pdb_text, tmp_path
) -> None:
    (path := tmp_path / f"{sample_id}.pdb").write_text(pdb_text(sample_id))
    theirs, ours = structure_of(sample_id), read_structure(path)
    assert [c.components for c in ours.chains] == [c.components for c in theirs.chains]
    assert [c.chain_type for c in ours.chains] == [c.chain_type for c in theirs.chains]
    np.testing.assert_array_equal(ours.layout.atom_name, theirs.layout.atom_name)
    np.testing.assert_array_equal(ours.resolved, theirs.resolved)
    np.testing.assert_allclose(ours.positions, theirs.positions, atol=1e-3)
    assert ours.removed == theirs.removed
    assert ours.method == theirs.method
    assert ours.resolution == pytest.approx(theirs.resolution, abs=0.01)


def test_polymers_keep_their_names_and_copies_are_numbered(pdb_text, tmp_path) -> None:
    (path := tmp_path / "4CUP.pdb").write_text(pdb_text("4CUP"))
    names = [chain.chain_id for chain in read_structure(path).chains]
    assert names == ["A", "B", "C", "D", "E", "A-2", "B-2", "C-2", "D-2", "E-2"]


def test_glycans_keep_their_bonds(structure_of, pdb_text, tmp_path) -> None:
    (path := tmp_path / "4ZXB.pdb.gz").write_bytes(gzip.compress(pdb_text("4ZXB").encode()))
    ours, theirs = read_structure(path), structure_of("4ZXB")
    assert len(ours.bonds) == len(theirs.bonds) == 50
    names = [
        sorted("-".join(sorted(s.layout.atom_name[bond].tolist())) for bond in s.bonds)
        for s in (ours, theirs)
    ]
    assert names[0] == names[1]


def test_the_release_is_the_first_revision_not_the_deposition(pdb_text, tmp_path) -> None:
    revisions = "REVDAT   2   24-FEB-09 1CRN    1\nREVDAT   1   28-JUL-81 1CRN    0\n"
    text = pdb_text("1CRN").replace("SEQRES", f"{revisions}SEQRES", 1)
    (path := tmp_path / "1CRN.ent").write_text(text)
    assert read_structure(path).release_date == "1981-07-28"


def test_a_model_without_seqres_is_as_long_as_what_is_there(pdb_text, tmp_path) -> None:
    lines = [line for line in pdb_text("1CRN").splitlines() if line.startswith(("ATOM", "TER"))]
    (path := tmp_path / "MODEL.pdb").write_text("\n".join(lines) + "\n")
    (chain,) = read_structure(path).chains
    assert chain.sequence == "TTCCPSIVARSNFNVCRLPGTPEAICATYTGCIIIPGATCPGDYAN"


def test_a_date_that_is_none_is_an_error(pdb_text, tmp_path) -> None:
    text = pdb_text("1CRN").replace("SEQRES", "REVDAT   1   99-XXX-81 1CRN\nSEQRES", 1)
    (path := tmp_path / "X.pdb").write_text(text)
    with pytest.raises(DataError, match="not PDB format"):
        read_structure(path)

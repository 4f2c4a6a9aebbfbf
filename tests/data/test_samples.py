"""The bundled entries are what their table says."""

from __future__ import annotations

import gzip
import hashlib

import pytest

from megafold.data import DataError, example_batch, sample_alignments, sample_path, samples
from megafold.data.bundled import describe_sample, samples_directory


def test_the_index_is_what_the_parser_finds(any_sample: str) -> None:
    (row,) = [sample for sample in samples() if sample.id == any_sample]
    assert describe_sample(any_sample) == row


def test_the_readme_has_the_numbers_of_the_index() -> None:
    readme = (samples_directory() / "README.md").read_text(encoding="utf-8")
    for s in samples():
        row = next(line for line in readme.splitlines() if line.startswith(f"| [{s.id}]"))
        cells = [cell.strip() for cell in row.strip("|").split("|")]
        assert cells[1] == s.title
        assert cells[3:] == [
            *map(str, (s.chains, s.protein_residues, s.dna_residues, s.rna_residues)),
            s.ligands or "-",
            s.modified or "-",
            *map(str, (s.tokens, s.atoms, s.resolved_atoms)),
        ]


def test_the_readme_has_the_size_of_every_alignment() -> None:
    from megafold.data import read_alignment

    readme = (samples_directory() / "README.md").read_text(encoding="utf-8")
    paths = [path for s in samples() for path in sample_alignments(s.id).values()]
    assert paths
    for path in paths:
        rows, columns = read_alignment(path).msa.shape
        assert f"| `{path.name}` | {rows} | {columns} |" in readme


def test_every_file_is_in_the_index() -> None:
    files = {path.name.removesuffix(".cif.gz") for path in samples_directory().glob("*.cif.gz")}
    assert files == {sample.id for sample in samples()}


def test_together_they_have_every_kind_of_molecule() -> None:
    rows = samples()
    assert any(s.dna_residues and s.protein_residues for s in rows)
    assert any(s.rna_residues for s in rows)
    assert any("HEM" in s.ligands for s in rows)
    assert any("CA" in s.ligands.split() for s in rows)
    assert any(s.modified for s in rows)
    assert any(s.method == "SOLUTION NMR" for s in rows)
    assert any(500 < s.tokens < 2000 for s in rows)
    assert any(s.tokens > 2000 for s in rows)
    assert any(s.alignments for s in rows)


def test_they_stay_small() -> None:
    total = sum(path.stat().st_size for path in samples_directory().rglob("*") if path.is_file())
    assert total < 4_000_000


def test_compressed_files_have_no_time_stamp(any_sample: str) -> None:
    header = sample_path(any_sample).read_bytes()[:10]
    assert header[4:8] == bytes(4)


def test_each_is_a_whole_deposited_entry(any_sample: str) -> None:
    text = gzip.decompress(sample_path(any_sample).read_bytes()).decode()
    for category in ("_entry.id", "_struct.title", "_exptl.method", "_entity_poly_seq.", "_cell."):
        assert category in text or (category == "_cell." and "NMR" in text)
    assert text.rstrip().endswith("#")


def test_ids_are_found_in_any_case() -> None:
    assert sample_path("1a8o") == sample_path("1A8O")


def test_an_unknown_sample_is_named_with_what_there_is() -> None:
    with pytest.raises(DataError, match=r"no bundled sample '9ZZZ'.*1A8O"):
        sample_path("9ZZZ")


def test_without_a_checkout_the_error_says_where_samples_come_from(monkeypatch, tmp_path) -> None:
    from megafold.data import bundled

    monkeypatch.setattr(bundled, "__file__", str(tmp_path / "a" / "b" / "bundled.py"))
    with pytest.raises(DataError, match="checkout of the repository"):
        samples()


def test_example_batch_is_the_same_for_the_same_seed() -> None:
    def digest(seed: int) -> str:
        return hashlib.sha256(example_batch("1AS5", seed=seed).ref_pos.numpy()).hexdigest()

    assert digest(0) == digest(0) != digest(1)

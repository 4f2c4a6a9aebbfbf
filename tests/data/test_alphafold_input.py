"""AlphaFold 3's input JSON: what it describes, and what is refused."""

from __future__ import annotations

import copy
import gzip
import json
import lzma

import pytest

from megafold.data.alphafold_input import parse_alphafold_input, read_alphafold_input
from megafold.data.errors import DataError

JOB = {
    "name": "Hello fold",
    "modelSeeds": [10, 42],
    "sequences": [
        {
            "protein": {
                "id": ["A", "B"],
                "sequence": "PVLSCGEWQL",
                "modifications": [{"ptmType": "HY3", "ptmPosition": 1}],
                "unpairedMsa": ">query\nPVLSCGEWQL\n>other\nPVLSC-EWaQL\n",
                "pairedMsa": "",
                "templates": [],
            }
        },
        {"dna": {"id": "C", "sequence": "GACCT"}},
        {
            "rna": {
                "id": "E",
                "sequence": "AGCU",
                "modifications": [{"modificationType": "2MG", "basePosition": 2}],
            }
        },
        {"ligand": {"id": ["F", "G"], "ccdCodes": ["ATP"]}},
        {"ligand": {"id": "I", "ccdCodes": ["NAG", "FUC"]}},
        {"ligand": {"id": "Z", "smiles": "CC(=O)OC1C[NH+]2CCC1CC2"}},
    ],
    "bondedAtomPairs": [
        [["A", 4, "OG"], ["I", 1, "C1"]],
        [["I", 1, "O6"], ["I", 2, "C1"]],
    ],
    "dialect": "alphafold3",
    "version": 3,
}


def job() -> dict:
    return copy.deepcopy(JOB)


def test_a_job_is_read_from_a_file(tmp_path):
    path = tmp_path / "job.json"
    path.write_text(json.dumps(JOB))
    read = read_alphafold_input(path)
    assert (read.name, read.seeds) == ("Hello fold", (10, 42))
    protein, dna, rna, atp, glycan, smiles = read.entities
    assert protein.chain_ids == ("A", "B")
    assert protein.modifications == ((1, "HY3"),)
    assert protein.paired_msa == ""
    assert protein.templates == ()
    assert (dna.kind, dna.sequence, dna.unpaired_msa) == ("dna", "GACCT", None)
    assert rna.modifications == ((2, "2MG"),)
    assert (atp.chain_ids, atp.ccd_codes) == (("F", "G"), ("ATP",))
    assert glycan.ccd_codes == ("NAG", "FUC")
    assert smiles.smiles == "CC(=O)OC1C[NH+]2CCC1CC2"
    assert read.bonds[1] == (("I", 1, "O6"), ("I", 2, "C1"))


@pytest.mark.parametrize("version", [1, 2, 3, 4])
def test_every_version_of_the_dialect_is_read(version):
    assert parse_alphafold_input(job() | {"version": version}).name == "Hello fold"


@pytest.mark.parametrize(
    ("name", "write"),
    [
        ("msa.a3m", lambda path, text: path.write_text(text)),
        ("msa.a3m.gz", lambda path, text: path.write_bytes(gzip.compress(text.encode()))),
        ("msa.a3m.xz", lambda path, text: path.write_bytes(lzma.compress(text.encode()))),
    ],
)
def test_an_alignment_is_read_from_a_file_beside_the_job(tmp_path, name, write):
    text = ">query\nAGCU\n"
    (tmp_path / "msas").mkdir()
    write(tmp_path / "msas" / name, text)
    document = job()
    document["sequences"][2]["rna"]["unpairedMsaPath"] = f"msas/{name}"
    assert parse_alphafold_input(document, folder=tmp_path).entities[2].unpaired_msa == text


def test_null_is_the_same_as_missing():
    document = job()
    document["bondedAtomPairs"] = document["userCCD"] = None
    document["sequences"][0]["protein"] |= {"unpairedMsa": None, "pairedMsa": None}
    read = parse_alphafold_input(document)
    assert read.bonds == ()
    assert read.entities[0].unpaired_msa is None


def at(document: dict, path: str):
    """The object and key that a path such as ``sequences.0.protein.id`` leads to."""
    *parts, last = [int(part) if part.isdigit() else part for part in path.split(".")]
    for part in parts:
        document = document[part]
    return document, last


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("dialect", "alphafoldserver", "dialect must be 'alphafold3', got 'alphafoldserver'"),
        ("version", 5, r"version must be one of \(1, 2, 3, 4\), got 5"),
        ("name", "()", "name must have a letter or digit"),
        ("modelSeeds", [], "modelSeeds must be one or more different integers"),
        ("modelSeeds", [1, 1], "modelSeeds must be one or more different integers"),
        ("modelSeeds", [1.5], "modelSeeds must be integers from 0"),
        ("modelSeeds", 3, "modelSeeds must be a list, got int"),
        ("sequences", [], "sequences is empty"),
        ("extra", 1, "unknown field 'extra'; known: bondedAtomPairs"),
        ("userCCD", "data_X", "userCCD is not supported; give the ligand as smiles or ccdCodes"),
        ("sequences.1", {"peptide": {}}, r"sequences\[1\]: expected an object with one of protein"),
        ("sequences.1.dna.id", "A", r"sequences\[1\]\.id: 'A' is in use already"),
        ("sequences.1.dna.id", "c", "id must be capital letters, got 'c'"),
        ("sequences.1.dna.sequence", "GAUC", "has 'U' at residue 3; a dna has ACGT"),
        ("sequences.0.protein.sequence", "PVLSCGEWQX", "has 'X' at residue 10"),
        ("sequences.0.protein.sequence", "", "sequence is empty"),
        ("sequences.0.protein.pairedMsa", None, "unpairedMsa and pairedMsa must be both given"),
        ("sequences.0.protein.unpairedMsaPath", "x", "and unpairedMsaPath exclude each other"),
        ("sequences.2.rna.unpairedMsaPath", "gone.a3m", "gone.a3m: no such file"),
        ("sequences.2.rna.unpairedMsaPath", "msa.zst", "compressed with zstd; use gzip, xz or"),
        ("sequences.0.protein.modifications.0.ptmPosition", 11, "is 11, the sequence has 1 to 10"),
        ("sequences.0.protein.modifications.0.basePosition", 1, "unknown field 'basePosition'"),
        ("sequences.3.ligand.smiles", "CCO", "ccdCodes or smiles must be given, and not both"),
        ("sequences.3.ligand.ccdCodes", [], "must be one or more component ids"),
        ("sequences.0.protein.templates", [{}], r"templates\[0\]: mmcif or mmcifPath is missing"),
        (
            "sequences.0.protein.templates",
            [{"mmcif": "x", "queryIndices": [0, 1], "templateIndices": [0]}],
            "queryIndices has 2 entries, templateIndices 1",
        ),
        (
            "sequences.0.protein.templates",
            [{"mmcif": "x", "queryIndices": [10], "templateIndices": [0]}],
            "queryIndices has 10, the last residue is 9",
        ),
        ("bondedAtomPairs.0", [["A", 4, "OG"]], r"bondedAtomPairs\[0\]: expected two atoms"),
        ("bondedAtomPairs.0.1", ["I", "1", "C1"], r"an atom is \[id, residue from 1, atom name\]"),
        ("bondedAtomPairs.0.1", ["Q", 1, "C1"], "no entity 'Q'; there are A, B, C"),
        ("bondedAtomPairs.0.1", ["I", 3, "C1"], "I has residues 1 to 2, got 3"),
        ("bondedAtomPairs.0.1", ["B", 5, "SG"], "one of the two atoms must be of a ligand"),
        ("bondedAtomPairs.0.1", ["Z", 1, "C1"], "Z is given as SMILES, whose atoms have no names"),
    ],
)
def test_what_is_not_as_documented_is_named(tmp_path, path, value, message):
    document = job()
    where, key = at(document, path)
    where[key] = value
    with pytest.raises(DataError, match=message):
        parse_alphafold_input(document, folder=tmp_path)


def test_what_is_no_job_is_named(tmp_path):
    with pytest.raises(DataError, match="no such file"):
        read_alphafold_input(tmp_path / "gone.json")
    (tmp_path / "bad.json").write_text("{")
    with pytest.raises(DataError, match=r"bad\.json: not JSON: "):
        read_alphafold_input(tmp_path / "bad.json")
    with pytest.raises(DataError, match="AlphaFold Server's dialect"):
        parse_alphafold_input([JOB])
    with pytest.raises(DataError, match="expected an object, got str"):
        parse_alphafold_input("job")

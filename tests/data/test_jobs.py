"""From AlphaFold 3's input JSON to features, without a structure."""

from __future__ import annotations

import gzip

import numpy as np
import pytest

from megafold.data import read_alignment, sample_alignments, sample_path, write_mmcif
from megafold.data.alphafold_input import parse_alphafold_input
from megafold.data.components import component, reference_conformer
from megafold.data.constants import RESTYPE_INDEX, RESTYPES
from megafold.data.errors import DataError
from megafold.data.features import ATOM_FIELDS, TOKEN_FIELDS
from megafold.data.jobs import (
    chains_without_alignment,
    input_alignments,
    input_features,
    input_structure,
)
from megafold.data.smiles import define_smiles

NO_TEMPLATE = {"mmcif": "x", "queryIndices": [], "templateIndices": []}


def job(*sequences: dict, bonds: list | None = None):
    return parse_alphafold_input(
        {
            "name": "job", "modelSeeds": [1], "dialect": "alphafold3", "version": 1,
            "sequences": list(sequences), "bondedAtomPairs": bonds,
        }
    )  # fmt: skip


def protein(sequence: str, ids: object = "A", **fields: object) -> dict:
    return {"protein": {"id": ids, "sequence": sequence, **fields}}


def ligand(ids: object, *codes: str) -> dict:
    return {"ligand": {"id": ids, "ccdCodes": list(codes)}}


def described(chain) -> dict:
    """The part of a job that describes a chain of a structure."""
    if chain.chain_type == "ligand":
        return ligand(chain.chain_id, *chain.components)
    if chain.chain_type == "protein":
        return protein(chain.sequence, chain.chain_id)
    standard = {"rna": "AGCU", "dna": ("DA", "DG", "DC", "DT")}[chain.chain_type]
    changes = [
        {"modificationType": name, "basePosition": number}
        for number, name in enumerate(chain.components, start=1)
        if name not in standard
    ]
    fields = {"id": chain.chain_id, "sequence": chain.sequence, "modifications": changes}
    return {chain.chain_type: fields}


@pytest.mark.parametrize("sample_id", ["1CRN", "1LCD", "102M", "4P5J"])
def test_a_job_that_describes_an_entry_has_the_features_of_the_entry(
    sample_id, structure_of, features_of
):
    sequences = [described(chain) for chain in structure_of(sample_id).chains]
    for path in sample_alignments(sample_id).values():
        text = gzip.decompress(path.read_bytes()).decode()
        sequences[0]["protein"] |= {"unpairedMsa": text, "pairedMsa": ""}
    made, expected = input_features(job(*sequences)), features_of(sample_id)
    for name in (*TOKEN_FIELDS, *ATOM_FIELDS, "msa", "deletions", "bonds"):
        if name not in ("positions", "resolved", "is_interface"):
            np.testing.assert_array_equal(getattr(made, name), getattr(expected, name), name)
    assert not made.resolved.any()


def test_a_modified_residue_is_its_component():
    changes = [{"ptmType": "SEP", "ptmPosition": 2}]
    made = input_structure(job(protein("ASA", modifications=changes)))
    assert made.chains[0].components == ("ALA", "SEP", "ALA")
    features = input_features(job(protein("ASA", modifications=changes)))
    # One token for each atom, all with the class of the parent.
    modified = features.residue_index == 2
    assert modified.sum() == len(component("SEP")) - component("SEP").leaving.sum()
    assert {RESTYPES[c] for c in features.restype[modified]} == {"SER"}


def test_chains_of_one_sequence_are_one_entity_however_they_are_listed():
    made = input_structure(job(protein("ACD", ["A", "B"]), protein("ACD", "C"), protein("AC", "D")))
    assert [chain.entity_id for chain in made.chains] == [1, 1, 1, 2]
    assert [chain.sym_id for chain in made.chains] == [1, 2, 3, 1]


def test_a_bond_takes_the_leaving_atom_with_it():
    free = input_structure(job(protein("ANA"), ligand("B", "NAG")))
    bonded = input_structure(
        job(protein("ANA"), ligand("B", "NAG"), bonds=[[["A", 2, "ND2"], ["B", 1, "C1"]]])
    )
    names = [set(s.layout.atom_name[s.layout.chain_id == "B"].tolist()) for s in (free, bonded)]
    assert names[0] - names[1] == {"O1"}
    first, second = bonded.bonds[0]
    assert bonded.layout.atom_name[[first, second]].tolist() == ["ND2", "C1"]
    features = input_features(
        job(protein("ANA"), ligand("B", "NAG"), bonds=[[["A", 2, "ND2"], ["B", 1, "C1"]]])
    )
    np.testing.assert_array_equal(features.ligand_bonds, bonded.bonds)


def test_smiles_are_a_ligand_with_a_conformer():
    name = define_smiles("CC(=O)[O-]")
    assert component(name).atom_names == ("C1", "C2", "O1", "O2")
    assert component(name).charges.tolist() == [0, 0, 0, -1]
    assert component(name).bonds.tolist() == [[0, 1], [1, 2], [1, 3]]
    positions = reference_conformer(name).positions
    assert 1.4 < np.linalg.norm(positions[0] - positions[1]) < 1.6
    features = input_features(job({"ligand": {"id": ["A", "B"], "smiles": "CC(=O)[O-]"}}))
    assert features.is_ligand.all()
    assert features.entity_id.tolist() == [1] * 8
    assert features.ref_element.tolist() == [6, 6, 8, 8] * 2
    assert len(features.bonds) == 6


def test_the_same_smiles_has_the_same_name_and_another_has_another():
    assert define_smiles("CCO") == define_smiles("CCO")
    assert define_smiles("CCO") != define_smiles("OCC")


def test_alignments_go_to_all_chains_of_their_entity():
    text = ">q\nACDE\n>h\nAC-E\n>h2\nACEaE\n"
    two = job(protein("ACDE", ["A", "B"], unpairedMsa=text, pairedMsa=""), protein("FGHI", "C"))
    features = input_features(two)
    gap = RESTYPE_INDEX["GAP"]
    assert features.msa.shape == (3, 12)
    assert (features.msa[1] == gap).nonzero()[0].tolist() == [2, 6, 8, 9, 10, 11]
    assert features.deletions[2].tolist() == [0, 0, 0, 1, 0, 0, 0, 1, 0, 0, 0, 0]
    assert not features.msa_mask[1:, 8:].any()
    assert list(chains_without_alignment(two)) == ["C"]


def test_paired_rows_stand_side_by_side():
    rows = {"A": ("ACDE", "ACDF"), "B": ("FGHI", "FGHK")}
    sequences = [
        protein(
            query, chain, unpairedMsa=f">q\n{query}\n",
            pairedMsa=f">q\n{query}\n>tr|A0A0A0|X_HUMAN\n{other}\n",
        )
        for chain, (query, other) in rows.items()
    ]  # fmt: skip
    features = input_features(job(*sequences))
    assert ["".join("ARNDCQEGHILKMFPSTWYV"[c] for c in row) for row in features.msa] == [
        "ACDEFGHI", "ACDFFGHK",
    ]  # fmt: skip


def test_an_empty_alignment_is_the_query_alone():
    main, to_pair = input_alignments(job(protein("ACDE", unpairedMsa="", pairedMsa="")))
    assert len(main["A"]) == len(to_pair["A"]) == 1


def test_a_template_lies_along_its_indices(structure_of, tmp_path):
    structure = structure_of("1CRN")
    text = write_mmcif(structure, tmp_path / "1CRN.cif").read_text()
    sequence = structure.chains[0].sequence
    template = {"mmcif": text, "queryIndices": [0, 1, 3], "templateIndices": [10, 11, 12]}
    features = input_features(job(protein(sequence[:5], templates=[template])))
    assert features.template_restype.shape == (1, 5)
    aligned = features.template_restype[0] != RESTYPE_INDEX["GAP"]
    assert aligned.tolist() == [True, True, False, True, False]
    names = [RESTYPES[c] for c in features.template_restype[0][aligned]]
    assert names == list(structure.chains[0].components[10:13])
    layout = structure.layout
    alpha = structure.positions[layout.atom_name == "CA"][10:13]
    np.testing.assert_allclose(features.template_backbone[0][aligned][:, 1], alpha, atol=1e-3)
    assert features.template_backbone_mask[0].tolist() == aligned.tolist()


@pytest.mark.parametrize(
    ("sequences", "bonds", "message"),
    [
        ([ligand("A", "QQQQQ")], None, "ligand A: component 'QQQQQ' is not in the chemical"),
        (
            [protein("AAA", modifications=[{"ptmType": "2MG", "ptmPosition": 2}])], None,
            "protein A, residue 2: 2MG is a rna component",
        ),
        ([{"ligand": {"id": "A", "smiles": "C1CC"}}], None, "'C1CC' is no SMILES that RDKit"),
        ([{"ligand": {"id": "A", "smiles": "C*"}}], None, "an atom that is no element"),
        (
            [protein("ANA"), ligand("B", "NAG")], [[["A", 2, "SG"], ["B", 1, "C1"]]],
            "residue 2 of A has no atom 'SG'; it has N CA C",
        ),
        (
            [protein("ACDE", unpairedMsa=">q\nACDF\n", pairedMsa="")], None,
            "unpairedMsa of A: the first row must be the sequence itself",
        ),
        (
            [protein("ACDE", unpairedMsa="nonsense", pairedMsa="")], None,
            "unpairedMsa of A: not an a3m alignment",
        ),
        (
            [protein("ACDE", unpairedMsa="", pairedMsa=""), protein("ACDE", "B")], None,
            "A and B are the same molecule, but their alignments differ",
        ),
        (
            [protein("ACDE", templates=[NO_TEMPLATE])], None,
            r"templates\[0\]\.mmcif: truncated or malformed mmCIF",
        ),
    ],
)  # fmt: skip
def test_what_cannot_be_modelled_is_named(sequences, bonds, message):
    with pytest.raises(DataError, match=message):
        input_features(job(*sequences, bonds=bonds))


def test_ligands_beside_a_template_do_not_matter():
    text = gzip.decompress(sample_path("102M").read_bytes()).decode()
    template = {"mmcif": text, "queryIndices": [0, 1], "templateIndices": [0, 1]}
    features = input_features(job(protein("MVLS", templates=[template])))
    assert [RESTYPES[c] for c in features.template_restype[0]] == ["MET", "VAL", "GAP", "GAP"]


def test_a_template_of_several_chains_is_refused():
    text = gzip.decompress(sample_path("1LCD").read_bytes()).decode()
    template = {"mmcif": text, "queryIndices": [0], "templateIndices": [0]}
    with pytest.raises(DataError, match=r"has one polymer chain, this has 3 \("):
        input_features(job(protein("AAAA", templates=[template])))


def test_an_alignment_found_by_search_fills_in_what_the_job_leaves_out():
    found = read_alignment(sample_alignments("102M")["A"])
    sequence = "".join("ARNDCQEGHILKMFPSTWYV"[c] for c in found.msa[0])
    features = input_features(job(protein(sequence)), {"A": found})
    assert len(features.msa) == len(found)
    with pytest.raises(DataError, match="chain A has an alignment in the job already"):
        input_features(job(protein(sequence, unpairedMsa="", pairedMsa="")), {"A": found})

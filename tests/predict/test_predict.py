"""Predictions from AlphaFold 3's input JSON to files, end to end with a tiny untrained model."""

from __future__ import annotations

import copy
import csv
import json
import warnings
from dataclasses import replace

import biotite.structure.io.pdbx as pdbx
import gemmi
import numpy as np
import pytest
import torch

from megafold import cli
from megafold.data.alphafold_input import parse_alphafold_input
from megafold.data.errors import DataError
from megafold.model import AlphaFold3
from megafold.model.checkpoints import save_model
from megafold.predict import job_folder_name, predict, write_predictions
from megafold.predict.files import confidences, summary_confidences

DOCUMENT = {
    "name": "Small job (TEST)",
    "modelSeeds": [3, 7],
    "sequences": [
        {
            "protein": {
                "id": ["A", "B"], "sequence": "ANA",
                "modifications": [{"ptmType": "SEP", "ptmPosition": 3}],
                "unpairedMsa": "", "pairedMsa": "",
            }
        },
        {"dna": {"id": "C", "sequence": "GA"}},
        {"ligand": {"id": "L", "ccdCodes": ["NAG"]}},
        {"ligand": {"id": "M", "ccdCodes": ["MG"]}},
        {"ligand": {"id": "S", "smiles": "CC(=O)[O-]"}},
    ],
    "bondedAtomPairs": [[["A", 2, "ND2"], ["L", 1, "C1"]]],
    "dialect": "alphafold3",
    "version": 1,
}  # fmt: skip
STEPS = 10  # few, but enough for samples that the confidence head tells apart
CHAINS = ["A", "B", "C", "L", "M", "S"]


@pytest.fixture(scope="module")
def job():
    return parse_alphafold_input(DOCUMENT)


@pytest.fixture(scope="module")
def model() -> AlphaFold3:
    """Moved off its initial zeros, so that confidences differ."""
    torch.manual_seed(0)
    model = AlphaFold3.from_name("tiny")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
    return model


@pytest.fixture(scope="module")
def predictions(model, job):
    return predict(model, job, samples=2, steps=STEPS)


@pytest.fixture(scope="module")
def folder(predictions, tmp_path_factory):
    return write_predictions(predictions, tmp_path_factory.mktemp("out") / "new")


def test_each_seed_has_its_samples_the_surest_first(predictions):
    assert {(p.seed, p.sample) for p in predictions} == {(3, 0), (3, 1), (7, 0), (7, 1)}
    scores = [p.ranking_score for p in predictions]
    assert scores == sorted(scores, reverse=True)
    assert len(set(scores)) == 4


def test_a_seed_gives_the_same_structures_again_whatever_stands_beside_it(model, job, predictions):
    again = predict(model, replace(job, seeds=(7,)), samples=2, steps=STEPS)
    for one in again:
        other = next(p for p in predictions if (p.seed, p.sample) == (one.seed, one.sample))
        np.testing.assert_array_equal(one.structure.positions, other.structure.positions)
        np.testing.assert_array_equal(one.atom_plddt, other.atom_plddt)
    assert not np.allclose(*(p.structure.positions for p in again))


def test_the_model_is_left_in_the_mode_it_was_in(model, job):
    model.train()
    predict(model, replace(job, seeds=(1,)), samples=1, steps=1)
    assert model.training
    model.eval()


def test_the_files_are_those_of_alphafold_3(folder, predictions):
    stem = "Small_job_TEST"
    kinds = ("model.cif", "summary_confidences.json", "confidences.json")
    expected = {f"{stem}_{kind}" for kind in kinds} | {"ranking_scores.csv"}
    for one in predictions:
        expected |= {f"{one.name}/{stem}_{one.name}_{kind}" for kind in kinds}
    found = {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()}
    assert folder.name == stem
    assert found == expected
    best = predictions[0].name
    for kind in kinds:
        copied = (folder / best / f"{stem}_{best}_{kind}").read_bytes()
        assert (folder / f"{stem}_{kind}").read_bytes() == copied


def test_gemmi_and_biotite_read_every_atom_with_its_confidence(folder, predictions):
    best = predictions[0]
    path = folder / "Small_job_TEST_model.cif"
    theirs = gemmi.read_structure(str(path))
    atoms = list(theirs[0].all())
    assert [cra.chain.name for cra in atoms] == best.structure.layout.chain_id.tolist()
    positions = np.array([cra.atom.pos.tolist() for cra in atoms])
    np.testing.assert_allclose(positions, best.structure.positions, atol=1e-3)
    b_factors = np.array([cra.atom.b_iso for cra in atoms])
    np.testing.assert_allclose(b_factors, best.atom_plddt, atol=5.1e-3)
    assert 0 < b_factors.min() < b_factors.max() < 100
    assert len(theirs.connections) == 1
    assert theirs.get_entity("1").full_sequence == ["ALA", "ASN", "SEP"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        array = pdbx.get_structure(pdbx.CIFFile.read(path), model=1, extra_fields=["b_factor"])
    assert array.chain_id.tolist() == best.structure.layout.chain_id.tolist()
    np.testing.assert_allclose(array.b_factor, b_factors, atol=1e-3)


def test_confidences_have_alphafold_3s_names_and_shapes(folder, predictions):
    best = predictions[0]
    content = json.loads((folder / "Small_job_TEST_confidences.json").read_text())
    tokens, atoms = len(best.token_chain_ids), len(best.structure.layout)
    assert list(content) == [
        "atom_chain_ids", "atom_plddts", "contact_probs", "pae", "token_chain_ids",
        "token_res_ids",
    ]  # fmt: skip
    assert len(content["atom_chain_ids"]) == len(content["atom_plddts"]) == atoms
    assert np.shape(content["pae"]) == np.shape(content["contact_probs"]) == (tokens, tokens)
    # ALA and ASN are a token each, phosphoserine one for each of its atoms.
    assert content["token_chain_ids"][:3] == ["A", "A", "A"]
    assert content["token_res_ids"][:4] == [1, 2, 3, 3]
    assert list(dict.fromkeys(content["token_chain_ids"])) == CHAINS
    np.testing.assert_allclose(content["pae"], best.pae, atol=5.1e-3)


def test_the_summary_has_alphafold_3s_names_and_shapes(folder, predictions):
    best = predictions[0]
    content = json.loads((folder / "Small_job_TEST_summary_confidences.json").read_text())
    assert list(content) == [
        "chain_iptm", "chain_pair_iptm", "chain_pair_pae_min", "chain_ptm",
        "fraction_disordered", "has_clash", "iptm", "ptm", "ranking_score",
    ]  # fmt: skip
    assert np.shape(content["chain_iptm"]) == np.shape(content["chain_ptm"]) == (6,)
    assert np.shape(content["chain_pair_iptm"]) == (6, 6)
    chain = np.array(best.token_chain_ids)
    least = best.pae[np.ix_(chain == "B", chain == "L")].min()
    assert content["chain_pair_pae_min"][1][3] == pytest.approx(least, abs=5.1e-3)
    others = [value for k, value in enumerate(best.chain_pair_iptm[0]) if k != 0]
    assert content["chain_iptm"][0] == pytest.approx(np.nanmean(others), abs=5.1e-3)
    assert content["ranking_score"] == pytest.approx(best.ranking_score, abs=5.1e-3)
    assert content["has_clash"] in (0.0, 1.0)


def test_ranking_scores_are_listed_by_seed_and_sample(folder, predictions):
    rows = list(csv.DictReader((folder / "ranking_scores.csv").open()))
    assert list(rows[0]) == ["seed", "sample", "ranking_score"]
    scores = {(p.seed, p.sample): p.ranking_score for p in predictions}
    assert {(int(r["seed"]), int(r["sample"])): float(r["ranking_score"]) for r in rows} == scores
    assert [(r["seed"], r["sample"]) for r in rows] == [("3", "0"), ("3", "1"), ("7", "0"),
                                                        ("7", "1")]  # fmt: skip


def test_scores_that_have_no_meaning_are_null(model):
    document = copy.deepcopy(DOCUMENT) | {"modelSeeds": [1], "bondedAtomPairs": []}
    document["sequences"] = [{"ligand": {"id": "M", "ccdCodes": ["MG"]}}]
    (one,) = predict(model, parse_alphafold_input(document), samples=1, steps=1)
    summary = summary_confidences(one)
    assert summary["iptm"] is None
    assert summary["chain_iptm"] == [None]
    json.dumps([summary, confidences(one)], allow_nan=False)


def test_there_is_nothing_left_of_what_could_not_be_written(predictions, tmp_path, monkeypatch):
    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr("megafold.predict.files._ranking_scores", fail)
    with pytest.raises(OSError, match="disk full"):
        write_predictions(predictions, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_what_is_there_is_not_overwritten(predictions, folder):
    with pytest.raises(DataError, match="Small_job_TEST exists already"):
        write_predictions(predictions, folder.parent)


@pytest.mark.parametrize(
    ("name", "expected"),
    [("My fold (TEST)", "My_fold_TEST"), ("a/../b", "a..b"), ("..x", "x"), ("T1-a_2", "T1-a_2")],
)
def test_a_name_is_safe_as_a_folder(name, expected):
    assert job_folder_name(name) == expected


@pytest.fixture
def input_file(tmp_path):
    document = copy.deepcopy(DOCUMENT) | {"modelSeeds": [1], "name": "job", "bondedAtomPairs": []}
    document["sequences"] = [{"protein": {"id": "A", "sequence": "ANA"}}]
    path = tmp_path / "job.json"
    path.write_text(json.dumps(document))
    return path


def test_the_command_predicts_with_a_checkpoint(input_file, model, tmp_path, capsys):
    save_model(tmp_path / "model.safetensors", model)
    arguments = ["predict", str(input_file), "--out", str(tmp_path / "out"), "--device", "cpu",
                 "--checkpoint", str(tmp_path / "model.safetensors")]  # fmt: skip
    assert cli.main([*arguments, "--samples", "1", "--steps", "2"]) == 0
    out, err = capsys.readouterr()
    assert "seed-1_sample-0  ranking score" in out
    assert "no alignment of A: predicted from the sequence alone" in err
    assert (tmp_path / "out" / "job" / "job_model.cif").is_file()
    assert cli.main(arguments) == 2
    assert "job exists already" in capsys.readouterr().err


def test_the_command_searches_alignments_where_it_is_given_a_database(input_file, tmp_path, capsys):
    database = tmp_path / "database.fasta"
    database.write_text(">tr|A0A0A0|X_HUMAN\nANAANAANA\n")
    arguments = ["predict", str(input_file), "--out", str(tmp_path / "out"), "--device", "cpu",
                 "--untrained", "tiny", "--samples", "1", "--steps", "1"]  # fmt: skip
    assert cli.main([*arguments, "--database", str(database)]) == 0
    err = capsys.readouterr().err
    assert "random weights: the structures mean nothing" in err
    assert "no alignment" not in err


def test_a_job_too_large_for_memory_is_refused_before_it_begins(
    input_file, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr("megafold.model.memory.available_memory", lambda device: 1000)
    arguments = ["predict", str(input_file), "--out", str(tmp_path / "out"), "--device", "cpu"]
    assert cli.main([*arguments, "--untrained", "tiny"]) == 2
    error = capsys.readouterr().err
    assert "megafold: sampling 3 tokens and" in error
    assert "leave out chains" in error or "take a smaller configuration" in error
    assert not (tmp_path / "out").exists()


def test_bad_input_is_one_sentence_on_stderr(input_file, tmp_path, capsys):
    rest = ["--out", str(tmp_path / "out"), "--device", "cpu"]
    for arguments, message in (
        ([str(tmp_path / "gone.json"), "--untrained", "tiny"], "gone.json: no such file"),
        ([str(input_file), "--untrained", "huge"], "unknown model configuration 'huge'"),
        ([str(input_file), "--checkpoint", str(tmp_path / "no.pt")], "no checkpoint at"),
        ([str(input_file), "--checkpoint", str(input_file)], "is not a safetensors file"),
        ([str(input_file), "--untrained", "tiny", "--samples", "0"], "must be at least 1"),
        ([str(input_file), "--untrained", "tiny", "--device", "tpu"], "no device 'tpu'; there are"),
        ([str(tmp_path), "--untrained", "tiny"], "a folder, not a file"),
    ):
        assert cli.main(["predict", *rest, *arguments]) == 2
        error = capsys.readouterr().err
        assert message in error
        assert "Traceback" not in error
    assert not (tmp_path / "out").exists()

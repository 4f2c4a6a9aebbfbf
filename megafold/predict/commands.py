"""``megafold predict``."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from megafold.data.alignment import Alignment
    from megafold.data.alphafold_input import AlphaFoldInput
    from megafold.model import AlphaFold3


def add_parser(commands: argparse._SubParsersAction) -> None:
    """Add this module's command."""
    parser = commands.add_parser(
        "predict",
        help="predict the structure of what an AlphaFold 3 input JSON describes",
        description="Reads AlphaFold 3's input JSON and writes what AlphaFold 3 writes: "
        "structures as mmCIF, confidences as JSON, ranking_scores.csv. Exit status 2 where the "
        "input cannot be used.",
    )
    parser.add_argument("input", help="AlphaFold 3 input JSON")
    parser.add_argument("--out", required=True, help="folder; the job gets a folder in it")
    weights = parser.add_mutually_exclusive_group(required=True)
    weights.add_argument("--checkpoint", metavar="FILE", help="safetensors written by megafold")
    weights.add_argument(
        "--untrained", metavar="NAME", help="random weights of a configuration, to try the command"
    )
    parser.add_argument("--samples", type=int, default=5, help="of each seed (default: 5)")
    parser.add_argument("--steps", type=int, default=200, help="of the sampler (default: 200)")
    parser.add_argument(
        "--database", metavar="FASTA", help="search protein alignments that the input leaves out"
    )
    parser.add_argument("--device", help="cpu or cuda (default: cuda where there is one)")
    parser.set_defaults(func=_predict)


def _predict(arguments: argparse.Namespace) -> int:
    from megafold.data.alphafold_input import read_alphafold_input
    from megafold.data.errors import DataError
    from megafold.predict.files import job_folder_name, write_predictions
    from megafold.predict.run import predict

    try:
        job = read_alphafold_input(arguments.input)
        folder = Path(arguments.out) / job_folder_name(job.name)
        if folder.exists():  # said before an hour of work, not after
            raise DataError(f"{folder} exists already; remove it, or write to another folder")
        model = _model(arguments)
        alignments = _search(job, arguments.database)
        predictions = predict(
            model,
            job,
            samples=arguments.samples,
            steps=arguments.steps,
            alignments=alignments,
        )
        folder = write_predictions(predictions, arguments.out)
    except (ValueError, OSError, MemoryError) as error:  # DataError is a ValueError
        print(f"megafold: {error}", file=sys.stderr)
        return 2
    for one in predictions:
        print(f"{one.name}  ranking score {one.ranking_score:.3f}  pTM {one.ptm:.3f}")
    print(f"written to {folder}")
    return 0


def _model(arguments: argparse.Namespace) -> AlphaFold3:
    import torch

    import megafold
    from megafold.model import AlphaFold3
    from megafold.model.checkpoints import load_model

    device = megafold.device(arguments.device)
    if arguments.checkpoint:
        return load_model(arguments.checkpoint, device)[0]
    print("megafold: random weights: the structures mean nothing", file=sys.stderr)
    torch.manual_seed(0)
    return AlphaFold3.from_name(arguments.untrained).to(device).eval()


def _search(job: AlphaFoldInput, database: str | None) -> dict[str, Alignment]:
    from megafold.data.jobs import chains_without_alignment
    from megafold.data.search import search_alignment
    from megafold.data.structure import PROTEIN

    missing = chains_without_alignment(job)
    searched = {c for c, e in missing.items() if database and e.kind == PROTEIN}
    if alone := sorted(set(missing) - searched):
        print(
            f"megafold: no alignment of {', '.join(alone)}: predicted from the sequence alone",
            file=sys.stderr,
        )
    found: dict[str, Alignment] = {}
    by_sequence: dict[str, Alignment] = {}
    for chain_id in sorted(searched):
        sequence = missing[chain_id].sequence
        if sequence not in by_sequence:
            by_sequence[sequence] = search_alignment(sequence, database)
        found[chain_id] = by_sequence[sequence]
    return found

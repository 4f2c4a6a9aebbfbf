"""``megafold train memorise``."""

from __future__ import annotations

import argparse
import csv
import io
import sys
import time
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

    from megafold.train.memorising import Memorised


def add_parser(commands: argparse._SubParsersAction) -> None:
    """Add this module's commands."""
    train = commands.add_parser("train", help="training")
    actions = train.add_subparsers(required=True, metavar="ACTION")
    parser = actions.add_parser(
        "memorise",
        help="train a fresh model on one bundled entry until it knows it by heart",
        description="Writes ENTRY_MODEL_curve.csv (every step), ENTRY_MODEL_lddt.csv (every "
        "evaluation) and ENTRY_MODEL.cif (a sampled structure, pLDDT as B-factors). Exit status "
        "1 where a target was asked for and not reached. On a GPU it computes in bfloat16, and "
        "the steps are replayed as CUDA graphs, which keeps the activations of all blocks.",
    )
    parser.add_argument("entry", help="a bundled entry, see `megafold samples`")
    parser.add_argument("--model", default="small", help="configuration (default: small)")
    parser.add_argument("--steps", type=int, default=4000, help="at most (default: 4000)")
    parser.add_argument("--every", type=int, default=200, help="steps between evaluations (200)")
    parser.add_argument("--sampler-steps", type=int, default=50, help="of an evaluation (50)")
    parser.add_argument("--learning-rate", type=float, help="after warm-up (default: 5e-4)")
    parser.add_argument("--minutes", type=float, help="stop after so long")
    parser.add_argument("--target", type=float, help="stop at this lDDT of all atoms, 0 to 1")
    parser.add_argument("--out", required=True, help="folder")
    parser.add_argument("--device", help="cpu or cuda (default: cuda where there is one)")
    parser.set_defaults(func=_memorise)


def _memorise(arguments: argparse.Namespace) -> int:
    from dataclasses import replace

    import torch

    import megafold
    from megafold.train.memorising import AT_LENGTH, Recipe, memorise

    try:
        device = megafold.device(arguments.device)
    except ValueError as error:
        print(f"megafold: {error}", file=sys.stderr)
        return 2
    on_gpu = device.type == "cuda"
    if on_gpu:
        torch.set_float32_matmul_precision("high")  # products in TensorFloat-32
    train = replace(AT_LENGTH, bfloat16=on_gpu, captured=on_gpu)
    if arguments.learning_rate is not None:
        train = replace(train, learning_rate=arguments.learning_rate)
    recipe = Recipe(
        entry=arguments.entry.upper(),
        model=arguments.model,
        steps=arguments.steps,
        evaluate_every=arguments.every,
        sampler_steps=arguments.sampler_steps,
        train=train,
    )
    begin = time.perf_counter()
    try:
        run = memorise(
            recipe,
            device=device,
            progress=_report,
            target=arguments.target,
            seconds=None if arguments.minutes is None else 60 * arguments.minutes,
        )
        files = _write(run, device, Path(arguments.out))
    except (ValueError, FloatingPointError, MemoryError) as error:
        print(f"megafold: {error}", file=sys.stderr)
        return 2
    seconds = time.perf_counter() - begin
    for one in run.evaluations:
        print(f"step {one.step:5d}  lDDT {one.lddt:.4f}  of centre atoms {one.lddt_centre:.4f}")
    print(f"{len(run.history)} steps in {seconds:.0f} s on {device}; memorised, not predicted")
    print(*(f"written: {path}" for path in files), sep="\n")
    missed = arguments.target is not None and run.evaluations[-1].lddt < arguments.target
    return 1 if missed else 0


def _report(steps: Iterable[int], desc: str = "") -> Iterable[int]:
    from tqdm import tqdm

    return tqdm(steps, desc=desc, unit="step", disable=not sys.stderr.isatty())


def _write(run: Memorised, device: torch.device, folder: Path) -> list[Path]:
    from megafold import data
    from megafold.atomic import atomic_write
    from megafold.model import predict_confidence
    from megafold.train.memorising import sample_memorised

    recipe = run.recipe
    batch = data.example_batch(recipe.entry, seed=recipe.train.seed).to(device)
    x = sample_memorised(run.model, batch, recipe)
    plddt = predict_confidence(run.model, batch, x[None]).plddt[0]
    structure = data.predicted_structure(batch.layout, x.cpu(), name=f"{recipe.entry} memorised")
    stem = f"{recipe.entry}_{recipe.model}"
    curve = [
        {
            "step": record.step + 1,
            **record.losses,
            "gradient_norm": record.gradient_norm,
            "learning_rate": record.learning_rate,
            "seconds": record.seconds,
        }
        for record in run.history
    ]
    tables = {"curve": curve, "lddt": [asdict(one) for one in run.evaluations]}
    files = [
        atomic_write(folder / f"{stem}_{kind}.csv", _table(rows).encode())
        for kind, rows in tables.items()
    ]
    path = folder / f"{stem}.cif"
    return [*files, data.write_mmcif(structure, path, b_factors=plddt.cpu().numpy())]


def _table(rows: list[dict[str, object]]) -> str:
    """CSV with the columns of all rows; a loss that a step did not have is left empty."""
    columns = list(dict.fromkeys(name for row in rows for name in row))
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n", restval="")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()

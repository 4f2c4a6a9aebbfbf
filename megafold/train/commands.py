"""``megafold train memorise``."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterable
from pathlib import Path


def add_parser(commands: argparse._SubParsersAction) -> None:
    """Add this module's commands."""
    train = commands.add_parser("train", help="training")
    actions = train.add_subparsers(required=True, metavar="ACTION")
    parser = actions.add_parser(
        "memorise",
        help="train a fresh model on one bundled entry until it knows it by heart",
        description="Writes ENTRY_MODEL_curve.csv (every step), ENTRY_MODEL_lddt.csv (every "
        "evaluation) and ENTRY_MODEL.cif (a sampled structure on the experiment, pLDDT as "
        "B-factors). Exit status 1 where a target was asked for and not reached. On a GPU it "
        "computes in bfloat16, and the steps are replayed as CUDA graphs, which keeps the "
        "activations of all blocks.",
    )
    parser.add_argument("entry", help="a bundled entry, see `megafold samples`")
    parser.add_argument("--model", default="small", help="configuration (default: small)")
    parser.add_argument(
        "--steps",
        type=int,
        default=4000,
        help="at most; the learning rate is halved after each quarter of them (default: 4000)",
    )
    parser.add_argument("--every", type=int, default=200, help="steps between evaluations (200)")
    parser.add_argument("--sampler-steps", type=int, default=50, help="of an evaluation (50)")
    parser.add_argument("--learning-rate", type=float, help="after warm-up (default: 1e-3)")
    parser.add_argument("--minutes", type=float, help="stop after so long")
    parser.add_argument("--target", type=float, help="stop at this lDDT of all atoms, 0 to 1")
    parser.add_argument(
        "--state",
        metavar="FILE",
        help="written at each evaluation; a run that finds it goes on from there",
    )
    parser.add_argument("--out", required=True, help="folder")
    parser.add_argument("--device", help="cpu or cuda (default: cuda where there is one)")
    parser.set_defaults(func=_memorise)


def _memorise(arguments: argparse.Namespace) -> int:
    from dataclasses import replace

    import torch

    import megafold
    from megafold.train.memorising import AT_LENGTH, Recipe, memorise
    from megafold.train.runs import write_run

    try:
        device = megafold.device(arguments.device)
    except ValueError as error:
        print(f"megafold: {error}", file=sys.stderr)
        return 2
    on_gpu = device.type == "cuda"
    if on_gpu:
        torch.set_float32_matmul_precision("high")  # products in TensorFloat-32
    quarter = max(1, arguments.steps // 4)
    train = replace(AT_LENGTH, decay_steps=quarter, bfloat16=on_gpu, captured=on_gpu)
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
            state=arguments.state,
        )
        files = write_run(run, device, Path(arguments.out))
    except (OSError, ValueError, FloatingPointError, MemoryError) as error:
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

"""The command ``megafold``. Each group of commands stands in the module that does the work."""

from __future__ import annotations

import argparse
import importlib
from collections.abc import Sequence

import megafold

# Each has ``add_parser(subparsers)``, which sets ``func``: arguments in, exit status out.
GROUPS = (
    "megafold.bench.commands",
    "megafold.bench.data_command",
    "megafold.bench.step_command",
    "megafold.bench.tune_command",
    "megafold.data.commands",
    "megafold.data.search_command",
    "megafold.predict.commands",
    "megafold.train.commands",
    "megafold.runner",
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status.

    Args:
        argv: arguments without the program's name; those of the process if None.
    """
    parser = argparse.ArgumentParser(prog="megafold", description=megafold.__doc__.splitlines()[0])
    parser.add_argument("--version", action="version", version=f"megafold {megafold.__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for name in GROUPS:
        importlib.import_module(name).add_parser(commands)
    arguments = parser.parse_args(argv)
    return arguments.func(arguments)

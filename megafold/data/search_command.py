"""``megafold search``: alignments and templates for structures, from sequence databases."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from megafold.data.errors import DataError

_INTERRUPTED = 130  # as a shell says it of a program that Ctrl-C ended


def add_parser(commands: argparse._SubParsersAction) -> None:
    """Add this module's command."""
    search = commands.add_parser(
        "search",
        help="search sequence databases for alignments and templates",
        description="Writes NAME_CHAIN.a3m.gz and the like into OUT, for megafold cache build "
        "--msa OUT. Finished searches are kept there: after Ctrl-C the same command goes on. "
        "Exit status 0, 1 where a structure could not be read, 2 for a database that cannot.",
    )
    search.add_argument("structures", nargs="+", help="structure files, or folders of them")
    search.add_argument("--out", required=True, help="folder for alignments and templates")
    search.add_argument("--proteins", metavar="FASTA", help="protein sequences, by jackhmmer")
    search.add_argument("--to-pair", metavar="FASTA", help="proteins with organisms, for pairing")
    search.add_argument("--rna", metavar="FASTA", help="RNA sequences, by nhmmer")
    search.add_argument("--templates", metavar="FASTA", help="sequences of known structures")
    search.add_argument("--template-structures", metavar="FOLDER", help="those structures")
    search.set_defaults(func=_search)


def _path(argument: str | None) -> Path | None:
    return None if argument is None else Path(argument)


def _search(arguments: argparse.Namespace) -> int:
    from tqdm import tqdm

    from megafold.data.building import one_line
    from megafold.data.retrieval import Databases, retrieve

    databases = Databases(
        proteins=_path(arguments.proteins),
        to_pair=_path(arguments.to_pair),
        rna=_path(arguments.rna),
        templates=_path(arguments.templates),
        structures=_path(arguments.template_structures),
    )
    done = [0.0, 0]
    with tqdm(
        unit="search", disable=not sys.stderr.isatty(),
        bar_format="{l_bar}{bar}| {n:.2f}/{total} searches [{elapsed}<{remaining}]",
    ) as bar:  # fmt: skip

        def progress(finished: float, total: int) -> None:
            done[:] = finished, total
            bar.total, bar.n = total, finished
            bar.refresh()

        try:
            if not any(vars(databases).values()):
                raise DataError("no database: give --proteins, --rna or another (see --help)")
            report = retrieve(arguments.structures, arguments.out, databases, progress=progress)
        except DataError as error:
            print(f"megafold: {error}", file=sys.stderr)
            return 2
        except KeyboardInterrupt:
            bar.close()
            print(
                f"megafold: interrupted after {int(done[0])} of {done[1]} searches; they are kept, "
                "and the same command goes on from there",
                file=sys.stderr,
            )
            return _INTERRUPTED
    for note in report.notes:
        print(one_line(f"left out: {note}"))
    print("\n".join(map(one_line, str(report).split("\n"))))
    return 1 if report.failed else 0

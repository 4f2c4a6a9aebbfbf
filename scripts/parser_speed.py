"""How fast Biopython, gemmi and biotite read structure files, for docs/decisions.md.

    python scripts/parser_speed.py FOLDER

Each reads every ``.cif[.gz]`` of the folder from text in memory to atoms with names, elements and
coordinates, three times; the shortest counts. biotite is asked for the first model only, the
others read all. Files in BinaryCIF go to those that read it. Prints seconds for all files.
"""

from __future__ import annotations

import gzip
import io
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import gemmi
from Bio.PDB import MMCIFParser
from Bio.PDB.binary_cif import BinaryCIFParser
from biotite.structure.io import pdbx

REPEATS = 3


def biopython(content: bytes) -> int:
    parser = MMCIFParser(QUIET=True)
    return sum(1 for _ in next(iter(parser.get_structure("x", _text(content)))).get_atoms())


def _text(content: bytes) -> io.StringIO:
    return io.StringIO(content.decode("utf-8", errors="replace"))


def with_gemmi(content: bytes) -> int:
    block = gemmi.cif.read_string(content.decode("utf-8", errors="replace")).sole_block()
    return gemmi.make_structure_from_block(block)[0].count_atom_sites()


def biotite(content: bytes) -> int:
    file = pdbx.CIFFile.deserialize(content.decode("utf-8", errors="replace"))
    return len(pdbx.get_structure(file, model=1, altloc="occupancy"))


def biopython_binary(content: bytes) -> int:
    with tempfile.NamedTemporaryFile(suffix=".bcif") as file:  # it reads from paths only
        file.write(content)
        file.flush()
        structure = BinaryCIFParser().get_structure("x", file.name)
    return sum(1 for _ in next(iter(structure)).get_atoms())


def biotite_binary(content: bytes) -> int:
    file = pdbx.BinaryCIFFile.read(io.BytesIO(content))
    return len(pdbx.get_structure(file, model=1, altloc="occupancy"))


def measure(read: Callable[[bytes], int], files: dict[str, bytes]) -> tuple[float, list[str]]:
    """Seconds for all files, each at its shortest, and those that could not be read."""
    total, failed = 0.0, []
    for name, content in files.items():
        times = []
        try:
            for _ in range(REPEATS):
                begin = time.perf_counter()
                read(content)
                times.append(time.perf_counter() - begin)
        except Exception as error:
            failed.append(f"{name} ({type(error).__name__}: {str(error)[:80]})")
            continue
        total += min(times)
    return total, failed


def main() -> None:
    warnings.simplefilter("ignore")
    text: dict[str, bytes] = {}
    binary: dict[str, bytes] = {}
    for path in sorted(Path(sys.argv[1]).iterdir()):
        content = path.read_bytes()
        content = gzip.decompress(content) if path.suffix == ".gz" else content
        inner = path.name.removesuffix(".gz")
        if inner.endswith(".cif"):
            text[inner] = content
        elif inner.endswith(".bcif"):
            binary[inner] = content
    rows = sum(content.count(b"\nATOM") + content.count(b"\nHETATM") for content in text.values())
    print(f"{len(text)} mmCIF files, {rows} rows of atoms")
    for read in (biopython, with_gemmi, biotite):
        seconds, failed = measure(read, text)
        name = read.__name__.removeprefix("with_")
        print(f"  {name:10} {seconds:7.2f} s   failed: {', '.join(failed) or 'none'}")
    print(f"{len(binary)} BinaryCIF files")
    for read in (biopython_binary, biotite_binary):
        seconds, failed = measure(read, binary)
        name = read.__name__.removesuffix("_binary")
        print(f"  {name:10} {seconds:7.2f} s   failed: {', '.join(failed) or 'none'}")


if __name__ == "__main__":
    main()

"""Entries from the Protein Data Bank."""

from __future__ import annotations

import gzip
import re
import time
import urllib.error
import urllib.request
from pathlib import Path

from megafold.atomic import atomic_create
from megafold.data.errors import DataError

RCSB = "https://files.rcsb.org/download"

# Four characters starting with a digit, or the longer form that will follow it.
_PDB_ID = re.compile(r"[0-9][A-Za-z0-9]{3}|pdb_[A-Za-z0-9]{8}", re.IGNORECASE)
_TRY_AGAIN = (429, 500, 502, 503, 504)


class Unreachable(DataError):
    """The server cannot be reached at all; another entry would fare no better."""


def fetch(
    pdb_id: str,
    out: str | Path = ".",
    *,
    base_url: str = RCSB,
    attempts: int = 4,
    wait: float = 1.0,
    timeout: float = 30.0,
) -> Path:
    """Download one entry as ``<ID>.cif.gz``; what is there already is not fetched again.

    The file appears whole or not at all.

    Args:
        pdb_id: For example ``1ubq``.
        out: Folder, made where there is none.
        base_url: Where ``<base_url>/<ID>.cif.gz`` is found.
        attempts: How often to try when the server is busy or the connection breaks.
        wait: Seconds before the second attempt; doubled each time.
        timeout: Seconds without an answer.

    Raises:
        Unreachable: No connection to the server.
        DataError: Not a PDB id, no such entry, or what came is not an mmCIF file.
    """
    if not _PDB_ID.fullmatch(pdb_id):
        raise DataError(f"{pdb_id!r} is not a PDB id: expected four characters such as 1ubq")
    name = pdb_id.upper() if len(pdb_id) == 4 else pdb_id.lower()
    path = Path(out) / f"{name}.cif.gz"
    if not path.exists():
        content = _download(f"{base_url}/{name}.cif.gz", attempts, wait, timeout)
        _check(content, f"{base_url}/{name}.cif.gz")
        atomic_create(path, lambda file: file.write_bytes(content))
    return path


def _download(url: str, attempts: int, wait: float, timeout: float) -> bytes:
    for attempt in range(1, attempts + 1):
        try:
            with urllib.request.urlopen(url, timeout=timeout) as response:
                return response.read()
        except urllib.error.HTTPError as error:
            if error.code == 404:
                raise DataError(f"{url}: no such entry") from error
            if error.code not in _TRY_AGAIN:
                raise DataError(f"{url}: the server answered {error.code}") from error
            fault: DataError = DataError(f"{url}: the server answered {error.code}")
        except (urllib.error.URLError, TimeoutError, ConnectionError) as error:
            reason = getattr(error, "reason", error)
            fault = Unreachable(
                f"{url}: cannot be reached ({reason}). Without a network, work with the bundled "
                "entries: megafold samples"
            )
        except Exception as error:  # a connection that broke half-way
            fault = DataError(f"{url}: {type(error).__name__}: {error}")
        if attempt < attempts:
            time.sleep(wait * 2 ** (attempt - 1))
    raise type(fault)(f"{fault} (tried {attempts} times)")


def _check(content: bytes, url: str) -> None:
    try:
        text = gzip.decompress(content)
    except (OSError, EOFError) as error:
        raise DataError(f"{url}: what came is not a whole gzip file: {error}") from error
    if not text.lstrip().startswith(b"data_"):
        raise DataError(f"{url}: what came is not an mmCIF file")

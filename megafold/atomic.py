"""Files that appear whole or not at all."""

from __future__ import annotations

import gzip
import os
import tempfile
from collections.abc import Callable
from pathlib import Path


def atomic_write(path: str | Path, content: bytes) -> Path:
    """Write ``content`` to ``path``, compressed where it ends in ``.gz``.

    The bytes go to a temporary file in the same folder, reach the disk, and are then
    renamed, so that whoever reads ``path`` sees the old file, the new one, or none.
    """
    path = Path(path)
    if path.suffix == ".gz":
        content = gzip.compress(content, mtime=0)
    return atomic_create(path, lambda temporary: temporary.write_bytes(content))


def atomic_create(path: str | Path, write: Callable[[Path], object]) -> Path:
    """Let ``write`` fill a temporary file beside ``path``, then rename it to ``path``."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    os.close(handle)
    temporary = Path(name)
    try:
        write(temporary)
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.chmod(temporary, 0o666 & ~_umask())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    return path


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask

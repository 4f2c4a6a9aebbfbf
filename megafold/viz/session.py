"""Whether somebody watches."""

from __future__ import annotations

import os
import sys

_WATCHED = ("JPY_SESSION_NAME", "VSCODE_PID", "COLAB_RELEASE_TAG")


def headless() -> bool:
    """True where nobody watches: executed by nbclient, in a test, or with output redirected.

    ``MEGAFOLD_HEADLESS`` set to 1 or 0 decides. Otherwise a kernel is watched when a Jupyter
    server, VS Code or Colab started it, and a script is watched when it writes to a terminal.

    Raises:
        ValueError: ``MEGAFOLD_HEADLESS`` is neither 1 nor 0.
    """
    chosen = os.environ.get("MEGAFOLD_HEADLESS")
    if chosen is not None:
        if chosen not in ("0", "1"):
            raise ValueError(f"MEGAFOLD_HEADLESS must be 0 or 1, not {chosen!r}")
        return chosen == "1"
    if "ipykernel" in sys.modules:
        return not any(name in os.environ for name in _WATCHED)
    return not sys.stderr.isatty()

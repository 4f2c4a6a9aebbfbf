"""How far a run has come, in a terminal."""

from __future__ import annotations

import sys
import threading
import time
from types import TracebackType
from typing import TextIO


class Line:
    """One line for one task, rewritten every second in a terminal, written once elsewhere.

    Use as a context manager; ``update`` says what is going on, ``close`` what came of it.
    """

    def __init__(self, label: str, stream: TextIO | None = None) -> None:
        self.label = label
        self.stream = stream or sys.stdout
        self.started = time.monotonic()
        self._status = "starting"
        self._live = self.stream.isatty()
        self._stop = threading.Event()
        self._lock = threading.Lock()
        self._ticker = threading.Thread(target=self._tick, daemon=True)

    @property
    def seconds(self) -> float:
        """Wall-clock seconds since the task began."""
        return time.monotonic() - self.started

    def update(self, status: str) -> None:
        """Show ``status`` beside the label."""
        self._status = status
        self._draw()

    def close(self, outcome: str) -> None:
        """End the line with ``outcome`` and the seconds it took."""
        self._stop.set()
        with self._lock:
            start = "\r\x1b[K" if self._live else ""
            self.stream.write(f"{start}{self.label}  {self.seconds:7.1f} s  {outcome}\n")
            self.stream.flush()

    def __enter__(self) -> Line:
        if self._live:
            self._ticker.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if not self._stop.is_set():
            self.close("interrupted" if error is not None else "done")

    def _tick(self) -> None:
        while not self._stop.wait(1.0):
            self._draw()

    def _draw(self) -> None:
        with self._lock:
            if self._live and not self._stop.is_set():
                self.stream.write(f"\r\x1b[K{self.label}  {self.seconds:7.1f} s  {self._status}")
                self.stream.flush()

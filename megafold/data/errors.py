"""What bad input raises."""

from __future__ import annotations


class DataError(ValueError):
    """An input that cannot be used. The message names the file and the cause."""


class ExcludedError(DataError):
    """An input in good order of which cleaning leaves nothing: no failure, but no entry either."""

"""The one error that bad input raises."""

from __future__ import annotations


class DataError(ValueError):
    """An input that cannot be used. The message names the file and the cause."""

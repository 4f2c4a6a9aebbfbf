"""Block sizes of the kernels: data in tables, looked up by device, bits of an operand and sizes."""

from megafold.ops.tuning.config import (
    Asked,
    Config,
    Found,
    Sizes,
    is_overridden,
    lookup,
    lookups,
    reset_configs,
    use_config,
)
from megafold.ops.tuning.table import Entry, read_table, tables

__all__ = [
    "Asked",
    "Config",
    "Entry",
    "Found",
    "Sizes",
    "is_overridden",
    "lookup",
    "lookups",
    "read_table",
    "reset_configs",
    "tables",
    "use_config",
]

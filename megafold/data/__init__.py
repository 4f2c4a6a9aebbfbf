"""mmCIF to features, cache, crops and batches, and coordinates back to mmCIF.

Public names are imported on first use, so that ``megafold.data.batch`` loads neither
biotite nor RDKit. A module never has the name of a public function.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from megafold.data.alignment import Alignment, query_alignment, read_alignment
    from megafold.data.alphafold_input import AlphaFoldInput, read_alphafold_input
    from megafold.data.batch import Batch, make_batch, pad_batch
    from megafold.data.buckets import Buckets
    from megafold.data.building import BuildReport, EntryReport, build_cache, examine_cache
    from megafold.data.bundled import (
        Sample,
        example_batch,
        example_features,
        sample_alignments,
        sample_path,
        samples,
    )
    from megafold.data.cache import Cache, cache_key
    from megafold.data.cropping import crop
    from megafold.data.dataset import CachedDataset, SampledDataset
    from megafold.data.download import fetch
    from megafold.data.errors import DataError, ExcludedError
    from megafold.data.features import Features
    from megafold.data.featurization import featurize
    from megafold.data.jobs import input_features, input_structure
    from megafold.data.layout import AtomLayout
    from megafold.data.layouts import ChainInputs, find_alignments, read_inputs
    from megafold.data.loader import BatchLoader
    from megafold.data.merging import merge_caches
    from megafold.data.read import read_structure
    from megafold.data.retrieval import Databases, retrieve
    from megafold.data.sampling import Example, example_weights, find_examples
    from megafold.data.search import search_alignment
    from megafold.data.structure import Chain, Structure
    from megafold.data.targets import target_fault
    from megafold.data.template_chains import Template
    from megafold.data.template_hits import TemplateHit, latest_release, read_template_hits
    from megafold.data.template_search import find_templates, search_template_hits
    from megafold.data.tokens import Tokens, tokenize
    from megafold.data.write import predicted_structure, write_mmcif

_PUBLIC = {
    "alignment": ("Alignment", "query_alignment", "read_alignment"),
    "alphafold_input": ("AlphaFoldInput", "read_alphafold_input"),
    "batch": ("Batch", "make_batch", "pad_batch"),
    "buckets": ("Buckets",),
    "building": ("BuildReport", "EntryReport", "build_cache", "examine_cache"),
    "bundled": (
        "Sample", "example_batch", "example_features", "sample_alignments", "sample_path",
        "samples",
    ),
    "cache": ("Cache", "cache_key"),
    "cropping": ("crop",),
    "dataset": ("CachedDataset", "SampledDataset"),
    "download": ("fetch",),
    "errors": ("DataError", "ExcludedError"),
    "features": ("Features",),
    "featurization": ("featurize",),
    "jobs": ("input_features", "input_structure"),
    "layout": ("AtomLayout",),
    "layouts": ("ChainInputs", "find_alignments", "read_inputs"),
    "loader": ("BatchLoader",),
    "merging": ("merge_caches",),
    "read": ("read_structure",),
    "retrieval": ("Databases", "retrieve"),
    "sampling": ("Example", "example_weights", "find_examples"),
    "search": ("search_alignment",),
    "structure": ("Chain", "Structure"),
    "targets": ("target_fault",),
    "template_chains": ("Template",),
    "template_hits": ("TemplateHit", "latest_release", "read_template_hits"),
    "template_search": ("find_templates", "search_template_hits"),
    "tokens": ("Tokens", "tokenize"),
    "write": ("predicted_structure", "write_mmcif"),
}  # fmt: skip
_HOME = {name: module for module, names in _PUBLIC.items() for name in names}

__all__ = [
    "Alignment",
    "AlphaFoldInput",
    "AtomLayout",
    "Batch",
    "BatchLoader",
    "Buckets",
    "BuildReport",
    "Cache",
    "CachedDataset",
    "Chain",
    "ChainInputs",
    "DataError",
    "Databases",
    "EntryReport",
    "Example",
    "ExcludedError",
    "Features",
    "Sample",
    "SampledDataset",
    "Structure",
    "Template",
    "TemplateHit",
    "Tokens",
    "build_cache",
    "cache_key",
    "crop",
    "examine_cache",
    "example_batch",
    "example_features",
    "example_weights",
    "featurize",
    "fetch",
    "find_alignments",
    "find_examples",
    "find_templates",
    "input_features",
    "input_structure",
    "latest_release",
    "make_batch",
    "merge_caches",
    "pad_batch",
    "predicted_structure",
    "query_alignment",
    "read_alignment",
    "read_alphafold_input",
    "read_inputs",
    "read_structure",
    "read_template_hits",
    "retrieve",
    "sample_alignments",
    "sample_path",
    "samples",
    "search_alignment",
    "search_template_hits",
    "target_fault",
    "tokenize",
    "write_mmcif",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME})

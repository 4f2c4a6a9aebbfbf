"""What a training example is drawn for: a chain or an interface, by AlphaFold 3's weights.

Supplement, section 2.5: the weight of a chain or interface is beta / N_cluster times
(3 n_prot + 3 n_nuc + 1 n_ligand), with beta 0.5 for a chain and 1 for an interface.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

import numpy as np

from megafold.atomic import atomic_write
from megafold.data.cache import Cache
from megafold.data.clusters import cluster_sequences, clustering_method
from megafold.data.errors import DataError
from megafold.data.features import FEATURE_VERSION, Features

BETA_CHAIN, BETA_INTERFACE = 0.5, 1.0
ALPHA = {"protein": 3.0, "nucleic": 3.0, "ligand": 1.0}
CONTACT = 5.0  # angstrom, between heavy atoms of two chains
PEPTIDE = 10  # residues; shorter proteins are clustered at 100 % identity

_FILE = "examples.json"


@dataclass(frozen=True)
class ChainInfo:
    """One chain of a structure, as sampling sees it."""

    asym_id: int
    kind: str  # of ALPHA
    content: str  # one-letter codes of a polymer, component ids of a ligand


@dataclass(frozen=True)
class Example:
    """A chain, or two chains in contact, that a crop can be drawn for."""

    name: str  # of the structure
    chains: tuple[int, ...]  # asym_id, one or two
    kinds: tuple[str, ...]  # of each chain, of ALPHA
    cluster: str  # examples of one cluster share their weight

    @property
    def is_interface(self) -> bool:
        return len(self.chains) == 2


def chains_of(features: Features) -> list[ChainInfo]:
    """The chains of a structure, unresolved residues included, by asym_id."""
    from megafold.data.tokens import LETTERS  # loads the dictionary

    letters = np.array(list(LETTERS))
    found = []
    for asym in np.unique(features.asym_id).tolist():
        tokens = np.flatnonzero(features.asym_id == asym)
        _, first = np.unique(features.residue_index[tokens], return_index=True)
        residues = tokens[first]
        if features.is_ligand[tokens[0]]:
            names = features.layout.residue_name[features.center_atom[residues]]
            found.append(ChainInfo(asym, "ligand", "-".join(names.tolist())))
        else:
            kind = "protein" if features.is_protein[tokens[0]] else "nucleic"
            sequence = "".join(letters[features.restype[residues]])
            if kind == "nucleic":
                sequence = f"{'RNA' if features.is_rna[tokens[0]] else 'DNA'} {sequence}"
            found.append(ChainInfo(asym, kind, sequence))
    return found


def interfaces_of(features: Features) -> list[tuple[int, int]]:
    """Pairs of chains with resolved heavy atoms within 5 angstrom, by asym_id, sorted."""
    from biotite.structure import CellList

    rows = np.flatnonzero(features.resolved)
    chain = features.asym_id[features.atom_to_token[rows]]
    if len(np.unique(chain)) < 2:
        return []
    positions = features.positions[rows]
    near = CellList(positions, cell_size=CONTACT).get_atoms(positions, CONTACT)  # -1 after the last
    one, place = np.nonzero((near >= 0) & (chain[near] > chain[:, None]))
    pairs = np.unique(np.stack([chain[one], chain[near[one, place]]], axis=-1), axis=0)
    return [(int(a), int(b)) for a, b in pairs]


def find_examples(
    cache: Cache, *, progress: Callable[[str], object] | None = None
) -> tuple[Example, ...]:
    """Every chain and interface of a cache, clustered.

    Proteins of at least 10 residues are clustered at 40 % identity (``megafold.data.clusters``),
    shorter ones and nucleic acids by their sequence, ligands by their components; interfaces by
    the clusters of their two chains.

    What is found is kept in the cache's folder and read again as long as its entries and the
    way of clustering are the same.

    Args:
        cache: With at least one entry.
        progress: Called with the name of each structure that is looked at.

    Raises:
        DataError: The cache is empty, or clustering fails.
    """
    if not cache.names:
        raise DataError(f"{cache.folder}: the cache has no structure")
    method = clustering_method()
    recipe = [FEATURE_VERSION, method, [[n, cache.index[n]["key"]] for n in cache.names]]
    made_from = hashlib.sha256(json.dumps(recipe).encode()).hexdigest()
    path = cache.folder / _FILE
    if path.is_file():
        kept = json.loads(path.read_text(encoding="utf-8"))
        if kept["made_from"] == made_from:
            return tuple(_from_json(row) for row in kept["examples"])
    chains, interfaces = {}, {}
    for name in cache.names:
        features = cache.load(name)
        chains[name], interfaces[name] = chains_of(features), interfaces_of(features)
        if progress is not None:
            progress(name)
    examples = _clustered(chains, interfaces, method)
    content = {"made_from": made_from, "examples": [asdict(example) for example in examples]}
    atomic_write(path, json.dumps(content).encode())
    return examples


def example_weights(examples: Sequence[Example]) -> np.ndarray:
    """How often each example is to be drawn. [n] float64, of sum 1."""
    sizes = Counter(example.cluster for example in examples)
    weights = [
        (BETA_INTERFACE if example.is_interface else BETA_CHAIN)
        / sizes[example.cluster]
        * sum(ALPHA[kind] for kind in example.kinds)
        for example in examples
    ]
    return np.array(weights) / np.sum(weights)


def _clustered(
    chains: dict[str, list[ChainInfo]], interfaces: dict[str, list[tuple[int, int]]], method: str
) -> tuple[Example, ...]:
    proteins = {
        c.content
        for group in chains.values()
        for c in group
        if c.kind == "protein" and len(c.content) >= PEPTIDE
    }
    representative = cluster_sequences(proteins, method)
    examples = []
    for name, group in chains.items():
        kind = {c.asym_id: c.kind for c in group}
        cluster = {
            c.asym_id: f"{c.kind} {representative.get(c.content, c.content)}"
            if c.kind == "protein"
            else f"{c.kind} {c.content}"
            for c in group
        }
        examples += [Example(name, (a,), (kind[a],), cluster[a]) for a in kind]
        examples += [
            Example(name, (a, b), (kind[a], kind[b]), " | ".join(sorted((cluster[a], cluster[b]))))
            for a, b in interfaces[name]
        ]
    return tuple(examples)


def _from_json(row: dict) -> Example:
    return Example(row["name"], tuple(row["chains"]), tuple(row["kinds"]), row["cluster"])

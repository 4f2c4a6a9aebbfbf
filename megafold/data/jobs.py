"""AlphaFold 3's input JSON to a ``Structure`` without coordinates, and to ``Features``."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import numpy as np
from biotite.structure.io import pdbx

from megafold.data.alignment import Alignment, parse_alignment, query_alignment
from megafold.data.alphafold_input import AlphaFoldInput, Entity, TemplateInput
from megafold.data.assemble import lay_out
from megafold.data.components import component
from megafold.data.constants import AMINO_ACIDS, DNA_NUCLEOTIDES, RNA_NUCLEOTIDES
from megafold.data.drafts import DraftChain, component_type
from megafold.data.errors import DataError
from megafold.data.features import Features
from megafold.data.featurization import featurize
from megafold.data.smiles import define_smiles
from megafold.data.structure import DNA, LIGAND, PROTEIN, RNA, Structure
from megafold.data.template_chains import Template, template_from_chain
from megafold.data.tokens import LETTERS, restype_class

_COMPONENT_OF = {
    PROTEIN: dict(zip(LETTERS[: len(AMINO_ACIDS)], AMINO_ACIDS, strict=True)),
    RNA: {name: name for name in RNA_NUCLEOTIDES},
    DNA: {name[1]: name for name in DNA_NUCLEOTIDES},
}
_TEMPLATE_ATOMS = ("N", "CA", "C", "CB")


def input_structure(job: AlphaFoldInput) -> Structure:
    """Every heavy atom of what is to be predicted, all unresolved, with its bonds.

    Chains stand in the order of the job. Chains of the same components are one entity, whether
    the job lists them together or apart, as in a structure that is read from a file.

    Raises:
        DataError: A component is not in the dictionary or not of its chain's kind, a SMILES
            cannot be built, or a bond names an atom that is not there.
    """
    chains = []
    for entity in job.entities:
        components = _components(entity, job.source)
        for chain_id in entity.chain_ids:
            chains.append(
                DraftChain(
                    asym_id=chain_id,
                    copy=0,
                    is_polymer=entity.kind != LIGAND,
                    numbers=list(range(1, len(components) + 1)),
                    components=components,
                    types=[entity.kind] * len(components),
                    atoms={},
                )
            )
    layout, positions, resolved = lay_out(chains, list(job.bonds), {})
    rows = zip(
        layout.chain_id.tolist(), layout.residue_number.tolist(), layout.atom_name.tolist(),
        strict=True,
    )  # fmt: skip
    place = {key: row for row, key in enumerate(rows)}
    for bond in job.bonds:
        for end in bond:
            if end not in place:
                names = [key[2] for key in place if key[:2] == end[:2]]
                raise DataError(
                    f"{job.source}: bondedAtomPairs: residue {end[1]} of {end[0]} has no atom "
                    f"{end[2]!r}; it has {' '.join(names)}"
                )
    bonds = sorted({tuple(sorted(place[end] for end in bond)) for bond in job.bonds})
    return Structure(
        name=job.name,
        layout=layout,
        positions=positions,
        resolved=resolved,
        bonds=np.array(bonds, dtype=np.int64).reshape(-1, 2),
    )


def input_features(
    job: AlphaFoldInput, alignments: Mapping[str, Alignment] | None = None
) -> Features:
    """Features of what is to be predicted, with the job's alignments and templates.

    Args:
        job: As ``read_alphafold_input`` gives it.
        alignments: By chain id, for chains of which the job gives none (null).

    Raises:
        DataError: As ``input_structure``; an alignment or template is damaged, or is not of
            its chain.
    """
    structure = input_structure(job)
    main, to_pair = input_alignments(job)
    if given := sorted(set(alignments or {}) & set(main)):
        raise DataError(f"{job.source}: chain {given[0]} has an alignment in the job already")
    return featurize(
        structure,
        {**main, **(alignments or {})},
        to_pair=to_pair,
        templates=input_templates(job, structure),
    )


def input_alignments(job: AlphaFoldInput) -> tuple[dict[str, Alignment], dict[str, Alignment]]:
    """Each chain's own alignment, and what to pair rows from, of the chains that have them.

    A job that says ``""`` asks for the query alone; one that says nothing is left out here.
    """
    main, to_pair = {}, {}
    first: dict[tuple, Entity] = {}
    for entity in job.entities:
        same = first.setdefault((entity.kind, entity.sequence, entity.modifications), entity)
        given = (entity.unpaired_msa, entity.paired_msa)
        if entity.kind != LIGAND and given != (same.unpaired_msa, same.paired_msa):
            raise DataError(
                f"{job.source}: {same.chain_ids[0]} and {entity.chain_ids[0]} are the same "
                "molecule, but their alignments differ; give both the same"
            )
        if entity.unpaired_msa is not None:
            main |= dict.fromkeys(entity.chain_ids, _alignment(entity, "unpaired", job.source))
        if entity.paired_msa is not None:
            to_pair |= dict.fromkeys(entity.chain_ids, _alignment(entity, "paired", job.source))
    return main, to_pair


def chains_without_alignment(job: AlphaFoldInput) -> dict[str, Entity]:
    """Protein and RNA chains for which AlphaFold 3 would search: the job says nothing."""
    return {
        chain_id: entity
        for entity in job.entities
        if entity.kind in (PROTEIN, RNA) and entity.unpaired_msa is None
        for chain_id in entity.chain_ids
    }


def input_templates(job: AlphaFoldInput, structure: Structure) -> dict[str, list[Template]]:
    """The templates of each chain that has some."""
    return {
        entity.chain_ids[0]: [_template(t, len(entity.sequence)) for t in entity.templates]
        for entity in job.entities
        if entity.templates
    }


def _components(entity: Entity, source: str) -> list[str]:
    """Component id of each residue."""
    if entity.kind == LIGAND:
        where = f"{source}: ligand {entity.chain_ids[0]}"
        try:
            codes = [define_smiles(entity.smiles)] if entity.smiles else list(entity.ccd_codes)
        except DataError as error:
            raise DataError(f"{where}: {error}") from error
        for code in codes:
            _checked(code, where)
        return codes
    names = [_COMPONENT_OF[entity.kind][letter] for letter in entity.sequence]
    for position, name in entity.modifications:
        where = f"{source}: {entity.kind} {entity.chain_ids[0]}, residue {position}"
        _checked(name, where)
        if (kind := component_type(name)) != entity.kind:
            raise DataError(
                f"{where}: {name} is a {kind} component ({component(name).kind.lower()}), "
                f"not one of a {entity.kind}"
            )
        names[position - 1] = name
    return names


def _checked(name: str, where: str) -> None:
    try:
        component(name)
    except DataError as error:
        raise DataError(f"{where}: {error}") from error


def _alignment(entity: Entity, which: str, source: str) -> Alignment:
    text = entity.unpaired_msa if which == "unpaired" else entity.paired_msa
    where = f"{source}: {which}Msa of {entity.chain_ids[0]}"
    if not text:
        alignment = query_alignment(entity.sequence, entity.kind)
    else:
        alignment = parse_alignment(text, entity.kind, source=where)
    return _with_query_of(alignment, entity, where)


def _with_query_of(alignment: Alignment, entity: Entity, where: str) -> Alignment:
    """The alignment with the chain's own classes as its query.

    The job's query has the letters of ``sequence``, a modified residue the letter it was given
    there; the model sees the modified residue's parent.
    """
    letters = [restype_class(_COMPONENT_OF[entity.kind][c], entity.kind) for c in entity.sequence]
    query, expected = alignment.msa[0], np.array(letters, dtype=np.uint8)
    if len(query) != len(expected) or (query != expected).any():
        raise DataError(f"{where}: the first row must be the sequence itself")
    classes = [restype_class(name, entity.kind) for name in _components(entity, where)]
    msa = alignment.msa.copy()
    msa[0] = classes
    return dataclasses.replace(alignment, msa=msa)


def _template(given: TemplateInput, length: int) -> Template:
    try:
        block = pdbx.CIFFile.deserialize(given.mmcif).block
        atoms = pdbx.get_structure(
            block,
            model=1,
            altloc="occupancy",
            use_author_fields=False,
            extra_fields=["label_seq_id"],
        )
    except Exception as error:  # biotite raises whatever the malformed table led to
        raise DataError(f"{given.source}: truncated or malformed mmCIF: {error}") from error
    # Ligands and waters have no place in a sequence.
    atoms = atoms[np.char.isdigit(atoms.label_seq_id)]
    chains = sorted(set(atoms.chain_id.tolist()))
    if len(chains) != 1:
        raise DataError(
            f"{given.source}: a template has one polymer chain, this has {len(chains)}"
            + (f" ({', '.join(chains)})" if chains else "")
        )
    names = _template_sequence(block, atoms)
    coordinates = {atom: np.full((len(names), 3), np.nan, np.float32) for atom in _TEMPLATE_ATOMS}
    for atom, rows in coordinates.items():
        there = atoms[atoms.atom_name == atom]
        rows[there.res_id - 1] = there.coord
    return template_from_chain(
        given.source,
        length,
        np.array(given.query_indices, dtype=np.int64),
        np.array(given.template_indices, dtype=np.int64),
        np.array([restype_class(name, PROTEIN) for name in names], dtype=np.uint8),
        coordinates,
    )


def _template_sequence(block: pdbx.CIFBlock, atoms) -> list[str]:
    """Component of each residue, unresolved ones included where the file has its sequence."""
    last = int(atoms.res_id.max())
    names = ["UNK"] * last
    if "entity_poly_seq" in block:
        table = block["entity_poly_seq"]
        entities = table["entity_id"].as_array(str)
        if len(set(entities.tolist())) == 1:
            numbers = table["num"].as_array(int)
            names = ["UNK"] * max(last, int(numbers.max()))
            for number, name in zip(numbers, table["mon_id"].as_array(str), strict=True):
                names[number - 1] = str(name)
    for number, name in zip(atoms.res_id.tolist(), atoms.res_name.tolist(), strict=True):
        names[number - 1] = name
    return names

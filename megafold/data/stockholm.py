"""Stockholm alignments, as jackhmmer, nhmmer and HMMER's other programs write them, as a3m."""

from __future__ import annotations

from megafold.data.errors import DataError


def stockholm_to_a3m(text: str, source: str) -> str:
    """The text of an a3m file: columns are the residues of the first row, the query.

    Descriptions (``#=GS ... DE``) follow the names, because they may name the organism.

    Raises:
        DataError: It is not Stockholm, is cut, or its rows differ in length.
    """
    lines = text.splitlines()
    if not lines or not lines[0].startswith("# STOCKHOLM"):
        raise DataError(f"{source}: not a Stockholm alignment: it must start with '# STOCKHOLM'")
    if "//" not in (line.strip() for line in lines):
        raise DataError(f"{source}: truncated: no // at the end")
    rows: dict[str, list[str]] = {}
    described: dict[str, str] = {}
    for line in lines[1:]:
        fields = line.split(None, 3)
        if line.strip() == "//":
            break
        if line.startswith("#=GS") and len(fields) == 4 and fields[2] == "DE":
            described[fields[1]] = fields[3]
        elif fields and not line.startswith("#"):
            if len(fields) != 2:
                raise DataError(f"{source}: {line[:40]!r} is not a name and its residues")
            rows.setdefault(fields[0], []).append(fields[1])
    if not rows:
        raise DataError(f"{source}: no sequence in it")
    whole = {name: "".join(parts).replace(".", "-") for name, parts in rows.items()}
    query_name, query = next(iter(whole.items()))
    entries = []
    for name, row in whole.items():
        if len(row) != len(query):
            raise DataError(
                f"{source}: row {name!r} has {len(row)} columns, {query_name!r} has {len(query)}"
            )
        aligned = "".join(
            letter.upper() if column != "-" else letter.lower()
            for column, letter in zip(query, row, strict=True)
            if column != "-" or letter != "-"
        )
        label = f"{name} {described[name]}" if name in described else name
        entries.append(f">{label}\n{aligned}\n")
    return "".join(entries)

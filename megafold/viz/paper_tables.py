"""Tables beside the paper's figures, as Markdown: what it claims, and what we have measured."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING

from megafold.viz import reference
from megafold.viz.reference import OOM, Longest, Point

if TYPE_CHECKING:
    from megafold.bench.records import Record

TRAINING_STEP = "train_step"


def claims() -> str:
    """Each claimed factor over PyTorch beside the factors that the figures' values give."""
    points = {"step time": reference.step_time(), "peak memory": reference.peak_memory()}
    rows = []
    for claim in reference.claims():
        if claim.quantity == "longest sequence":
            factors = _longest(reference.longest_sequence(), claim.device)
            where = "GPUs"
        else:
            factors = _factors(points[claim.quantity], claim.device)
            where = "tokens"
        found = ", ".join(f"{factor:.2f} ({key} {where})" for key, factor in factors.items())
        rows.append((claim.quantity, claim.device, f"up to {claim.factor:g}", found))
    head = ("quantity", "device", "claimed factor", "factors from the figures' values")
    return _markdown(head, rows)


def measurements(records: Sequence[Record]) -> str:
    """What this project has measured so far, and whether the paper's figures can use it."""
    if not records:
        return "This project has no measurements yet: `data/records` is empty."
    counts = Counter((record.device, record.op) for record in records)
    full = {record.device for record in records if _full_model_step(record)}
    newest = {key: max(r.date for r in records if (r.device, r.op) == key)[:10] for key in counts}
    rows = [
        (device, op, str(number), newest[device, op], _use(device, op, full))
        for (device, op), number in sorted(counts.items())
    ]
    return _markdown(("device", "what", "rows", "newest", "in the figures below"), rows)


def training_steps(records: Sequence[Record], device: str) -> list[Record]:
    """The records that stand beside the paper's values of ``device``.

    Only steps of the full model, whose shape begins with ``af3``, can be compared with them.
    """
    ours = [record for record in records if _full_model_step(record)]
    return [record for record in ours if reference.same_device(record.device, device)]


def _full_model_step(record: Record) -> bool:
    return record.op == TRAINING_STEP and record.shape.split()[0] == "af3"


def _use(device: str, op: str, full: set[str]) -> str:
    if op != TRAINING_STEP:
        return "no: a single operator, not a training step"
    paper = sorted({point.device for point in reference.step_time()})
    if not any(reference.same_device(device, known) for known in paper):
        return f"no: the paper measured on {' and '.join(paper)}"
    return "yes" if device in full else "no: not the full model"


def _factors(points: Sequence[Point], device: str) -> dict[int, float]:
    values = {(p.implementation, p.tokens): p.value for p in points if p.device == device}
    return {
        tokens: eager / values["megafold", tokens]
        for (name, tokens), eager in values.items()
        if name == "eager" and eager is not OOM and values["megafold", tokens] is not OOM
    }


def _longest(rows: Sequence[Longest], device: str) -> dict[int, float]:
    tokens = {(r.implementation, r.gpus): r.tokens for r in rows if r.device == device}
    return {
        gpus: tokens["megafold", gpus] / eager
        for (name, gpus), eager in tokens.items()
        if name == "eager"
    }


def _markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)

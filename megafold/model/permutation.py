"""The truth, renamed to fit a prediction (supplement, section 4.2).

Which of several identical chains is called A, and which oxygen of a carboxylate OD1, is
arbitrary. Before any loss the truth takes the names under which it is nearest to the
prediction: identical chains and ligands first, then equivalent atoms within each.

Shape letters: N tokens, A atoms, C chains, K copies of an entity.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from megafold.geometry import weighted_rigid_align
from megafold.model.capture import captured

if TYPE_CHECKING:
    from megafold.data.batch import Batch


@torch.no_grad()
def permute_truth(batch: Batch, x: torch.Tensor) -> Batch:
    """``batch`` with ``positions`` and ``resolved`` renamed to fit ``x`` ``[A, 3]`` angstrom."""
    return permute_atoms(permute_chains(batch, x), x)


@torch.no_grad()
def permute_chains(batch: Batch, x: torch.Tensor) -> Batch:
    """Give each chain the truth of that copy of it which fits ``x`` best.

    One chain, the anchor, is superposed on each of its copies in turn. In that placement
    every chain takes the copy nearest to it, the best pairs first. Of all placements that
    counts under which the whole truth deviates least from x after superposition; where none
    is better than the names in use, these stay.
    """
    if batch.copy_positions.shape[0] == 1:
        return batch
    chains = _Chains(batch, x)
    best, least = chains.own, chains.deviation(chains.own)
    anchor = chains.anchor()
    for copy in range(chains.copies[anchor]):
        assigned = chains.assign(anchor, copy)
        if assigned is not None and (deviation := chains.deviation(assigned)) < least:
            best, least = assigned, deviation
    copy = torch.tensor(best)[chains.of_token].to(x.device)[batch.atom_to_token]
    atom = torch.arange(batch.num_atoms, device=x.device)
    return replace(
        batch,
        positions=batch.copy_positions[copy, atom],
        resolved=batch.copy_resolved[copy, atom] & batch.atom_mask,
    )


@torch.no_grad()
def permute_atoms(batch: Batch, x: torch.Tensor) -> Batch:
    """Give the atoms of each residue and ligand the equivalent names that fit ``x`` best.

    The truth is superposed on x as a whole; each residue then chooses for itself.
    """
    if not batch.symmetric_atoms:
        return batch
    positions, resolved = captured(
        _nearest_names, batch.positions, batch.resolved, batch.symmetric_atoms, x
    )
    return replace(batch, positions=positions, resolved=resolved)


def _nearest_names(
    positions: torch.Tensor, resolved: torch.Tensor, symmetric: tuple[torch.Tensor, ...],
    x: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    aligned = weighted_rigid_align(positions[None], x[None], resolved.float())[0]
    source = torch.arange(len(x), device=x.device)
    for orders in symmetric:  # [R, P, n]
        here = orders[:, 0]
        squared = (aligned[orders] - x[here][:, None]).square().sum(-1)
        cost = (squared * resolved[orders]).sum(-1)  # [R, P]
        chosen = cost.argmin(dim=1)
        chosen = torch.where(cost[:, 0] <= cost.amin(dim=1), 0, chosen)  # a tie changes nothing
        source[here] = orders[torch.arange(len(orders), device=x.device), chosen]
    return positions[source], resolved[source]


class _Chains:
    """Centre atoms of a prediction, and of every copy of the truth, chain by chain."""

    def __init__(self, batch: Batch, x: torch.Tensor) -> None:
        # On the CPU: these are thousands of numbers, and hundreds of operations on them.
        centre = batch.center_atom
        self.predicted = x[centre].float().cpu()  # [N, 3]
        self.true = batch.copy_positions[:, centre].cpu()  # [K, N, 3]
        self.known = (batch.copy_resolved[:, centre] & batch.token_mask).cpu()  # [K, N]
        ids, self.of_token = torch.unique(batch.asym_id.cpu(), return_inverse=True)
        self.count = len(ids)
        tokens = self.of_token.tolist()
        first = [tokens.index(c) for c in range(self.count)]
        self.entity = batch.entity_id.cpu()[first].tolist()
        self.polymer = (~batch.is_ligand.cpu()[first]).tolist()
        # Padding has no copy of its own; as it is never resolved, any will do.
        self.own = [max(0, s - 1) for s in batch.sym_id.cpu()[first].tolist()]
        there = torch.zeros(len(self.known), self.count)
        there.index_add_(1, self.of_token, self.known.float())
        self.resolved = there.T.tolist()  # [C, K], resolved tokens
        self.copies = []
        for c in range(self.count):
            same = [d for d in range(self.count) if self.entity[d] == self.entity[c]]
            seen = [k for k in range(len(self.known)) if any(self.resolved[d][k] for d in same)]
            self.copies.append(1 + max([*seen, *(self.own[d] for d in same)]))

    def anchor(self) -> int:
        """A polymer if there is one, with few copies and many resolved tokens."""
        return min(
            range(self.count),
            key=lambda c: (not self.polymer[c], self.copies[c], -max(self.resolved[c])),
        )

    def assign(self, anchor: int, copy: int) -> list[int] | None:
        """Copy of each chain, if the anchor is ``copy``; None if too little of it is resolved."""
        weight = torch.zeros(self.known.shape)
        weight[copy] = (self.known[copy] & (self.of_token == anchor)).float()
        if weight.sum() < min(3, max(self.resolved[anchor])):
            return None
        count = len(self.known)
        target = self.predicted.expand(count, -1, -1).reshape(1, -1, 3)
        moved = weighted_rigid_align(self.true.reshape(1, -1, 3), target, weight.flatten())
        squared = (moved - target).square().sum(-1).view(count, -1) * self.known
        total = torch.zeros(count, self.count)
        total.index_add_(1, self.of_token, squared)
        cost = [
            [t / n if n else math.inf for t, n in zip(totals, numbers, strict=True)]
            for totals, numbers in zip(total.T.tolist(), self.resolved, strict=True)
        ]
        assigned: dict[int, int] = {anchor: copy}
        taken = {(self.entity[anchor], copy)}
        pairs = sorted((cost[c][k], c, k) for c in range(self.count) for k in range(self.copies[c]))
        for _, c, k in pairs:
            if c not in assigned and (self.entity[c], k) not in taken:
                assigned[c] = k
                taken.add((self.entity[c], k))
        return [assigned[c] for c in range(self.count)]

    def deviation(self, assigned: list[int]) -> float:
        """Mean squared deviation of the renamed truth after superposition, angstrom squared."""
        copy = torch.tensor(assigned)[self.of_token]
        token = torch.arange(len(copy))
        true, known = self.true[copy, token], self.known[copy, token]
        if not bool(known.any()):
            return math.inf
        moved = weighted_rigid_align(true[None], self.predicted[None], known.float())[0]
        squared = (moved - self.predicted).square().sum(-1)
        return float((squared * known).sum() / known.sum())

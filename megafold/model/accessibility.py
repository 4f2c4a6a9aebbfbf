"""Which residues a structure leaves open to water, and so which look disordered.

AlphaFold 3 draws disordered residues as open loops or as compact nonsense; ranking favours the
former (supplement, section 5.9.3).

Shape letters: A atoms, P points on a sphere, B atoms of a block, R residues.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch

from megafold.geometry import distances

if TYPE_CHECKING:
    from megafold.data.batch import Batch

PROBE = 1.4  # angstrom, a water molecule
POINTS = 128  # on each atom's sphere
_BLOCK = 64

# Radii of heavy atoms in angstrom, as DSSP has them (Kabsch and Sander 1983).
RADII = {"N": 1.65, "CA": 1.87, "C": 1.76, "O": 1.40}
RADIUS_SIDE_CHAIN = 1.80

# Largest accessible surface of residues in square angstrom (Rost and Sander 1994), in the order
# of the classes: A R N D C Q E G H I L K M F P S T W Y V.
MAX_AREA = (106.0, 248.0, 157.0, 163.0, 135.0, 198.0, 194.0, 84.0, 184.0, 169.0,
            164.0, 205.0, 188.0, 197.0, 136.0, 130.0, 142.0, 227.0, 222.0, 142.0)  # fmt: skip
# Above this share of it, averaged over a window along the chain, a residue counts as disordered
# (Piovesan et al. 2022).
DISORDERED, WINDOW = 0.581, 25


@torch.no_grad()
def fraction_disordered(batch: Batch, x: torch.Tensor) -> float:
    """Share of the protein residues that look disordered, 0 to 1; 0 without protein.

    x ``[A, 3]`` angstrom. Each chain is taken by itself, as if the others were not there.
    """
    token = batch.atom_to_token
    protein = batch.is_protein[token] & batch.atom_mask
    names = batch.layout.atom_name
    open_residues, residues = 0, 0
    for chain in torch.unique(batch.asym_id[token][protein]).tolist():
        rows = (protein & (batch.asym_id[token] == chain)).nonzero().squeeze(1)
        radius = [RADII.get(str(names[row]), RADIUS_SIDE_CHAIN) for row in rows.tolist()]
        area = accessible_area(x[rows].float(), x.new_tensor(radius, dtype=torch.float32))
        _, residue = torch.unique_consecutive(batch.ref_space_uid[rows], return_inverse=True)
        total = area.new_zeros(int(residue.max()) + 1).index_add_(0, residue, area)
        kind = torch.zeros_like(total, dtype=torch.long)
        kind[residue] = batch.restype[token[rows]]
        largest = total.new_tensor(MAX_AREA)[torch.where(kind < len(MAX_AREA), kind, 0)]
        share = _windowed_mean(total / largest)
        open_residues += int((share > DISORDERED).sum())
        residues += len(share)
    return open_residues / residues if residues else 0.0


@torch.no_grad()
def accessible_area(x: torch.Tensor, radius: torch.Tensor) -> torch.Tensor:
    """Solvent accessible surface of each atom in square angstrom, ``[A]``.

    By counting points (Shrake and Rupley 1973). x ``[A, 3]`` and radius ``[A]``, angstrom.
    """
    reach = radius + PROBE
    sphere = _sphere(POINTS).to(x)
    free = torch.zeros(len(x), device=x.device)
    for begin in range(0, len(x), _BLOCK):
        block = torch.arange(begin, min(begin + _BLOCK, len(x)), device=x.device)
        close = distances(x[block], x) < reach[block, None] + reach
        others = close.any(0).nonzero().squeeze(1)
        points = x[block, None] + reach[block, None, None] * sphere  # [B, P, 3]
        gap = distances(points.flatten(0, 1), x[others]).unflatten(0, (-1, POINTS))
        covered = (gap < reach[others]) & (others != block[:, None])[:, None]
        free[block] = 1.0 - covered.any(-1).float().mean(-1)
    return 4.0 * math.pi * reach.square() * free


def _sphere(points: int) -> torch.Tensor:
    """Evenly spread unit vectors ``[points, 3]``, along a spiral."""
    index = torch.arange(points, dtype=torch.float64) + 0.5
    height = 1.0 - 2.0 * index / points
    angle = math.pi * (1.0 + math.sqrt(5.0)) * index
    ring = (1.0 - height.square()).sqrt()
    return torch.stack([ring * angle.cos(), ring * angle.sin(), height], dim=-1)


def _windowed_mean(values: torch.Tensor) -> torch.Tensor:
    """Mean over a window around each residue; at the ends the chain is mirrored. ``[R]``."""
    n, half = len(values), WINDOW // 2
    index = torch.arange(-half, n + half, device=values.device)
    period = max(1, 2 * (n - 1))
    index = index.remainder(period)
    index = torch.minimum(index, period - index) if n > 1 else torch.zeros_like(index)
    return values[index].unfold(0, WINDOW, 1).mean(-1)

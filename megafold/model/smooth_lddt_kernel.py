"""The sums of the smooth lDDT and their gradient as one Triton kernel.

A pair of atoms takes some sixty operations and no memory: all that is read is coordinates, and
all that is written is one gradient for each atom and one sum for each block. Blocks of pairs
that are far apart in the truth cost their distances only. There are no atomics.

Names: ``p_`` pointer, ``o_`` offsets, ``b_`` block, ``i_`` index; those behind ``_i`` look at the
atoms behind ``_j``.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from megafold.ops.launcher import on
from megafold.ops.sizes import cdiv

BLOCK_I, BLOCK_J, WARPS = 16, 32, 4


@triton.jit
def coordinates(p, o, atoms):
    """x, y and z of atoms ``o`` of ``[A, 3]``; zeros beyond the last."""
    p_x = p + 3 * o
    m = o < atoms
    b_x = tl.load(p_x, mask=m, other=0.0)
    b_y = tl.load(p_x + 1, mask=m, other=0.0)
    return b_x, b_y, tl.load(p_x + 2, mask=m, other=0.0)


@triton.jit
def distances(x_i, y_i, z_i, x_j, y_j, z_j):
    """Distances ``[I, J]`` and differences along the axes."""
    b_x = x_i[:, None] - x_j[None, :]
    b_y = y_i[:, None] - y_j[None, :]
    b_z = z_i[:, None] - z_j[None, :]
    return tl.sqrt_rn(b_x * b_x + b_y * b_y + b_z * b_z + 1e-10), b_x, b_y, b_z


@triton.jit
def smooth_lddt_kernel(
    p_x,  # fp32 [S, A, 3]
    p_true,  # fp32 [A, 3]
    p_resolved,  # bool [A]
    p_radius,  # fp32 [A]
    p_score,  # fp32 [S, blocks], written: sums of scores over near pairs
    p_pairs,  # fp32 [blocks], written by the first copy: their number
    p_gradient,  # fp32 [S, A, 3], written: gradient of the sums; or None
    atoms,
    blocks,
    BLOCK_I: tl.constexpr,
    BLOCK_J: tl.constexpr,
):
    """One program takes BLOCK_I atoms of one copy past all atoms."""
    i_block = tl.program_id(0) % blocks
    i_copy = (tl.program_id(0) // blocks).to(tl.int64)
    o_i = i_block * BLOCK_I + tl.arange(0, BLOCK_I)
    m_i = o_i < atoms
    p_x += i_copy * atoms * 3
    t_x, t_y, t_z = coordinates(p_true, o_i, atoms)
    x_x, x_y, x_z = coordinates(p_x, o_i, atoms)
    there_i = tl.load(p_resolved + o_i, mask=m_i, other=0) != 0
    radius_i = tl.load(p_radius + o_i, mask=m_i, other=0.0)

    b_score = tl.zeros([BLOCK_I, BLOCK_J], tl.float32)
    b_pairs = tl.zeros([BLOCK_I, BLOCK_J], tl.float32)
    b_gx = tl.zeros([BLOCK_I, BLOCK_J], tl.float32)
    b_gy = tl.zeros([BLOCK_I, BLOCK_J], tl.float32)
    b_gz = tl.zeros([BLOCK_I, BLOCK_J], tl.float32)
    for start in range(0, atoms, BLOCK_J):
        o_j = start + tl.arange(0, BLOCK_J)
        m_j = o_j < atoms
        u_x, u_y, u_z = coordinates(p_true, o_j, atoms)
        there_j = tl.load(p_resolved + o_j, mask=m_j, other=0) != 0
        radius_j = tl.load(p_radius + o_j, mask=m_j, other=0.0)
        b_true, _x, _y, _z = distances(t_x, t_y, t_z, u_x, u_y, u_z)
        b_both = there_i[:, None] & there_j[None, :] & (o_i[:, None] != o_j[None, :])
        b_near = ((b_true < radius_i[:, None]) & b_both).to(tl.float32)
        # A pair counts once for each of its atoms that looks at the other.
        b_count = b_near + ((b_true < radius_j[None, :]) & b_both).to(tl.float32)
        if tl.max(tl.max(b_count, 1), 0) > 0:
            v_x, v_y, v_z = coordinates(p_x, o_j, atoms)
            b_d, b_x, b_y, b_z = distances(x_x, x_y, x_z, v_x, v_y, v_z)
            b_error = b_d - b_true
            b_closeness = tl.zeros([BLOCK_I, BLOCK_J], tl.float32)
            b_slope = tl.zeros([BLOCK_I, BLOCK_J], tl.float32)
            for i in tl.static_range(4):
                b_part = tl.sigmoid(0.5 * 2**i - tl.abs(b_error))  # THRESHOLDS
                b_closeness += b_part
                b_slope += b_part * (b_part - 1.0)
            b_score += b_closeness * b_near
            b_pairs += b_near
            if p_gradient is not None:
                b_sign = tl.where(b_error > 0, 1.0, tl.where(b_error < 0, -1.0, 0.0))
                b_slope = b_slope * b_count * (b_sign / b_d)
                b_gx += b_slope * b_x
                b_gy += b_slope * b_y
                b_gz += b_slope * b_z

    share: tl.constexpr = 0.25  # of one threshold
    tl.store(p_score + i_copy * blocks + i_block, tl.sum(tl.sum(b_score, 1), 0) * share)
    if i_copy == 0:
        tl.store(p_pairs + i_block, tl.sum(tl.sum(b_pairs, 1), 0))
    if p_gradient is not None:
        p_own = p_gradient + i_copy * atoms * 3 + 3 * o_i
        tl.store(p_own, tl.sum(b_gx, 1) * share, mask=m_i)
        tl.store(p_own + 1, tl.sum(b_gy, 1) * share, mask=m_i)
        tl.store(p_own + 2, tl.sum(b_gz, 1) * share, mask=m_i)


def sums(
    x: torch.Tensor,
    true: torch.Tensor,
    resolved: torch.Tensor,
    radius: torch.Tensor,
    wants_gradient: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Sums of scores ``[S]`` over near ordered pairs, their number, and the gradient of the sums.

    Args:
        x: fp32 ``[S, A, 3]``, at least one copy and one atom; ``true``, ``resolved`` and
            ``radius`` as for :func:`megafold.model.smooth_lddt.smooth_lddt`, in fp32.
    """
    samples, atoms, _ = x.shape
    blocks = cdiv(atoms, BLOCK_I)
    score = x.new_empty(samples, blocks)
    pairs = x.new_empty(blocks)
    gradient = torch.empty_like(x, memory_format=torch.contiguous_format)
    with on(x.device):
        smooth_lddt_kernel[(samples * blocks,)](
            x.contiguous(), true.contiguous(), resolved.contiguous(), radius.contiguous(),
            score, pairs, gradient if wants_gradient else None, atoms, blocks,
            BLOCK_I=BLOCK_I, BLOCK_J=BLOCK_J, num_warps=WARPS, num_stages=1,
        )  # fmt: skip
    return score.sum(1), pairs.sum(), gradient if wants_gradient else None

"""Solvent accessibility against biotite's, and disorder."""

from __future__ import annotations

import dataclasses
import math

import biotite.structure as structure
import numpy as np
import pytest
import torch

from megafold.model.accessibility import _windowed_mean, accessible_area, fraction_disordered


def test_a_lone_atom_shows_its_whole_sphere():
    area = accessible_area(torch.zeros(1, 3), torch.tensor([1.6]))
    torch.testing.assert_close(area, torch.tensor([4 * math.pi * 9.0]))


def test_two_atoms_hide_a_cap_of_each_other():
    x = torch.tensor([[0.0, 0, 0], [3.0, 0, 0]])
    area = accessible_area(x, torch.tensor([1.6, 1.6]))
    # A sphere of radius 3 cut by a plane at 1.5 keeps three quarters of its surface.
    torch.testing.assert_close(area, torch.full((2,), 0.75 * 36 * math.pi), rtol=0.02, atol=0)


def test_it_is_biotites_accessible_surface(batch):
    rows = batch.resolved.nonzero().squeeze(1)
    atoms = structure.AtomArray(len(rows))
    atoms.coord = batch.positions[rows].numpy()
    atoms.element[:] = "C"
    radius = np.full(len(rows), 1.8)
    expected = structure.sasa(atoms, probe_radius=1.4, vdw_radii=radius, point_number=2000)
    area = accessible_area(batch.positions[rows], torch.tensor(radius, dtype=torch.float32))
    assert np.corrcoef(area, expected)[0, 1] > 0.99
    assert float(area.sum()) == pytest.approx(expected.sum(), rel=0.02)


def test_a_stretched_chain_is_disordered_and_a_folded_protein_is_not(crambin):
    assert fraction_disordered(crambin, crambin.positions) < 0.1
    far = crambin.residue_index[crambin.atom_to_token].float()[:, None]
    stretched = crambin.positions + 20.0 * far * torch.tensor([1.0, 0, 0])
    assert fraction_disordered(crambin, stretched) == 1.0


def test_without_protein_nothing_is_disordered(crambin):
    none = torch.zeros_like(crambin.is_protein)
    rna = dataclasses.replace(crambin, is_protein=none, is_rna=~none)
    assert fraction_disordered(rna, rna.positions) == 0.0


def test_the_window_mirrors_the_ends():
    values = torch.arange(40.0)
    mirrored = np.pad(values.numpy(), 12, mode="reflect")
    expected = np.convolve(mirrored, np.ones(25) / 25, mode="valid")
    np.testing.assert_allclose(_windowed_mean(values), expected, rtol=1e-5)
    assert torch.equal(_windowed_mean(torch.tensor([3.0])), torch.tensor([3.0]))

"""Clashing chains: which of two goes."""

from __future__ import annotations

import numpy as np
import pytest

from megafold.data import AtomLayout, read_structure, write_mmcif
from megafold.data.clashes import clashing_chains
from megafold.data.structure import Structure


def _line(count: int, offset: float = 0.0) -> np.ndarray:
    """Atoms 4 angstrom apart on a line."""
    return np.stack([np.arange(count) * 4.0, np.full(count, offset), np.zeros(count)], axis=-1)


def _removed(chains: list[np.ndarray], ids: str, bonded=None) -> str:
    bonded = bonded or [np.zeros(len(chain), dtype=bool) for chain in chains]
    found = clashing_chains([c.astype(np.float32) for c in chains], bonded, list(ids))
    return "".join(sorted(ids[i] for i in found))


def test_chains_apart_stay() -> None:
    assert _removed([_line(10), _line(10, offset=1.8)], "AB") == ""


def test_of_two_on_top_of_each_other_the_larger_id_goes() -> None:
    assert _removed([_line(10), _line(10, offset=1.6)], "AB") == "B"
    assert _removed([_line(10), _line(10, offset=1.6)], "BA") == "B"


def test_the_larger_share_goes_first() -> None:
    long_chain, short_chain = _line(20), _line(8, offset=1.0)
    assert _removed([short_chain, long_chain], "AB") == "A"


def test_the_smaller_goes_where_shares_are_equal() -> None:
    """Four of eight atoms near four of eight, and one more atom each far away."""
    left, right = _line(8), _line(8, offset=1.0)
    right[4:] += 100
    above, away = left[:4] + np.array([0, 0.5, 0]), left[4:] - 200
    bigger = np.concatenate([left, above, away])  # 8 of 16 near
    assert _removed([bigger, right], "AB") == "B"


@pytest.mark.parametrize(("near", "gone"), [(3, ""), (4, "B")])
def test_thirty_percent_is_the_limit(near, gone) -> None:
    other = _line(10, offset=1.0)
    other[near:] += 50
    assert _removed([_line(100), other], "AB") == gone


def test_bonded_atoms_are_near_by_nature() -> None:
    ion, chain = _line(1, offset=1.5), _line(10)
    ends = [np.array([True]), np.arange(10) == 0]
    assert _removed([ion, chain], "AB") == "A"
    assert _removed([ion, chain], "AB", ends) == ""


def test_what_is_gone_clashes_no_more() -> None:
    """B lies on A and on C, which are apart from each other."""
    chains = [_line(10), _line(10, offset=1.5), _line(10, offset=3.0)]
    assert _removed(chains, "ACB") == "C"


def test_a_structure_is_read_without_them(structure_of, tmp_path) -> None:
    one = structure_of("1CRN")
    both = AtomLayout(
        **{
            name: np.concatenate([getattr(one.layout, name)] * 2)
            for name in AtomLayout.__dataclass_fields__
        }
    )
    both.chain_id[len(one.layout) :] = "B"
    for shift, chains in ((0.0, ["A"]), (50.0, ["A", "B"])):
        positions = np.concatenate([one.positions, one.positions + shift]).astype(np.float32)
        resolved = np.concatenate([one.resolved] * 2)
        double = Structure("TWO", both, positions, resolved, one.bonds)
        structure = read_structure(write_mmcif(double, tmp_path / "TWO.cif"))
        assert [chain.chain_id for chain in structure.chains] == chains
        clashing = structure.removed.get("chains: clashing with another", 0)
        assert clashing == 2 - len(chains)

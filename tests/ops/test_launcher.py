"""Repeated launches: the first through Triton, the others straight to what it compiled."""

from __future__ import annotations

import pytest
import torch

from megafold.ops import hopper
from megafold.ops.launcher import Launcher, layout, on


class Compiled:
    """Stands in for a compiled kernel: takes every argument by position."""

    def __init__(self) -> None:
        self.launches: list[tuple] = []

    def __getitem__(self, grid):
        return lambda *arguments: self.launches.append((grid, arguments))


class Kernel:
    """Stands in for a ``@triton.jit`` function; ``compiled`` is None in the interpreter."""

    arg_names = ("p_x", "p_y", "size", "BLOCK", "EVEN")

    def __init__(self, compiled: Compiled | None) -> None:
        self.compiled, self.launches = compiled, []

    def __getitem__(self, grid):
        def launch(*arguments, **named):
            self.launches.append((grid, arguments, named))
            return self.compiled

        return launch


def launcher(kernel: Kernel) -> Launcher:
    constants = {"EVEN": True, "BLOCK": 64}  # not in the kernel's order
    return Launcher(kernel, 7, (5,), constants, {"num_warps": 4})


def test_only_the_first_launch_goes_through_triton():
    compiled = Compiled()
    kernel = Kernel(compiled)
    launch = launcher(kernel)
    x, y, z = torch.ones(5), torch.ones(5), torch.ones(5)
    assert launch(x, y) is compiled
    assert launch(x, z) is compiled
    first = ((7, 1, 1), (x, y, 5), {"EVEN": True, "BLOCK": 64, "num_warps": 4})
    assert kernel.launches == [first]
    # The compiled kernel takes constants too, in the order of its signature.
    assert compiled.launches == [((7, 1, 1), (x, z, 5, 64, True))]


def test_every_launch_goes_through_the_interpreter():
    kernel = Kernel(None)
    launch = launcher(kernel)
    for _ in range(3):
        assert launch(torch.ones(1), None) is None
    assert len(kernel.launches) == 3


def test_layout_tells_apart_what_is_compiled_apart():
    storage = torch.zeros(64)
    assert layout(None) is None
    assert layout(storage[:32]) == layout(storage[32:])
    assert layout(storage[:32]) != layout(storage[1:33])  # less aligned
    assert layout(storage[:32]) != layout(storage[:32].half())
    assert layout(storage[:32].view(4, 8)) != layout(storage[:32].view(8, 4).t())


def test_nothing_is_switched_for_a_cpu():
    with on(torch.device("cpu")):
        pass
    assert on(torch.device("cpu")) is on(torch.device("meta"))


def test_descriptions_of_tensors_for_tma_do_not_pile_up(monkeypatch):
    """A training run sees as many sizes as it has crops, where these are not padded."""
    gl = pytest.importorskip("triton.experimental.gluon.language")
    monkeypatch.setattr(hopper, "_MOST_KEPT", 2)
    monkeypatch.setattr(hopper, "_described_before", {})
    boxes = hopper.box((16, 64), gl.float16)
    for rows in (32, 48, 32, 64, 80, 32):
        tensor = torch.empty((rows, 64), dtype=torch.float16)
        found = hopper.described(tensor, boxes)
        assert found.base is tensor
        assert found.shape == [rows, 64]
        assert len(hopper._described_before) <= 2

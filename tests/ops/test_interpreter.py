"""Triton's interpreter puts its functions in place once a kernel, and takes them out again."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl

from megafold.ops.launcher import Launcher

pytestmark = pytest.mark.skipif(
    torch.cuda.is_available(), reason="kernels are not interpreted beside a GPU"
)


@triton.jit
def twice(x):
    return x + x


@triton.jit
def four_times_kernel(x_ptr, out_ptr, N: tl.constexpr):
    i = tl.arange(0, N)
    tl.store(out_ptr + i, twice(twice(tl.load(x_ptr + i))))


@triton.jit
def wrong_kernel(x_ptr, out_ptr, N: tl.constexpr):
    tl.store(out_ptr + tl.arange(0, N), twice(x_ptr.there_is_no_such_thing))


def test_functions_of_a_kernel_do_not_replace_the_language_again(monkeypatch):
    from triton.runtime import interpreter

    looked_through = []
    replace = interpreter._patch_builtin

    def counted(package, *rest):
        looked_through.append(package)
        replace(package, *rest)

    monkeypatch.setattr(interpreter, "_patch_builtin", counted)
    x, out = torch.arange(4.0), torch.empty(4)
    launch = Launcher(four_times_kernel, 1, (), {"N": 4}, {})
    for _ in range(2):
        looked_through.clear()
        launch(x, out)
        assert torch.equal(out, 4 * x)
        assert looked_through.count(tl) == 1
        assert tl.core.is_builtin(tl.load)


def test_the_language_is_put_back_after_an_error():
    launch = Launcher(wrong_kernel, 1, (), {"N": 4}, {})
    with pytest.raises(Exception, match="there_is_no_such_thing"):
        launch(torch.arange(4.0), torch.empty(4))
    assert tl.core.is_builtin(tl.load)
    out = torch.empty(4)
    Launcher(four_times_kernel, 1, (), {"N": 4}, {})(torch.ones(4), out)
    assert torch.equal(out, torch.full((4,), 4.0))

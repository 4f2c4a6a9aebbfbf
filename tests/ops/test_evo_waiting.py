"""What waits behind the kernels for Hopper GPUs: the gradients where logits are too large."""

from __future__ import annotations

import pytest
import torch

from megafold.ops.evo_attention import launch
from tests.numerics import DEVICE
from tests.ops.evo import attention, blocks

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter")

SHAPES = (
    "B1 S3 N72 H2 D16",
    "B2 S2 N17 K40 H1 D24 shared",  # rows of two of the batch share the bias
    "B2 S1 N33 K20 H2 D32",  # each row has its own
)


def found(shape: str, beyond: int | None, *, masked: bool = True) -> dict[str, torch.Tensor]:
    """The gradients of one call: of the kernel that waits, or for None of those by themselves."""
    inputs, grad = attention(shape, torch.float16)
    q, k, v, bias = (inputs[name] for name in ("q", "k", "v", "pair_bias"))
    problem = launch.Problem.of(q, k, bias)
    mask = launch.spread(inputs["mask"], problem) if masked else None
    scale = q.shape[-1] ** -0.5
    out, stats = launch.forward(q, k, v, mask, bias, scale)
    delta = stats.new_zeros(stats.shape[1:])
    left = {"q": q, "k": k, "v": v, "pair_bias": bias}
    left = {name: torch.full_like(t, 7.0) for name, t in left.items()}
    of_q, of_k, of_v, of_bias = left.values()
    given = (q, k, v, mask, bias)
    alone = of_bias if problem.rows_per_bias == 1 else None
    # The kernels by themselves leave delta, which is there already for the one that waits.
    unused = None if beyond is None else torch.empty_like(of_q)
    launch.launch_grad_q(
        problem, *given, out, stats, grad, delta, of_q if unused is None else unused,
        alone if unused is None else None, scale,
    )  # fmt: skip
    if beyond is None:
        launch.launch_grad_kv(problem, *given, stats, grad, delta, of_k, of_v, scale)
        if alone is None:
            launch.launch_grad_bias(problem, *given, stats, grad, delta, of_bias, scale)
        return left
    shared = of_bias if alone is None else None
    flag = torch.tensor(beyond, dtype=torch.int32, device=DEVICE)
    launch.launch_waiting(
        problem, flag, *given, out, stats, grad, delta, of_q, of_k, of_v, alone, shared, scale
    )
    return left


@pytest.fixture(autouse=True)
def few_programs(monkeypatch):
    """Four, so that each has several turns."""
    monkeypatch.setattr(launch, "multiprocessors", lambda device: 2)
    launch._waiting.cache_clear()
    yield
    launch._waiting.cache_clear()


@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("shape", SHAPES)
def test_it_does_what_the_three_kernels_do(shape, masked):
    sizes = launch.WAITING
    with blocks(1, sizes["BLOCK_Q"], sizes["BLOCK_K"]):
        expected = found(shape, None, masked=masked)
    for name, gradient in found(shape, 1, masked=masked).items():
        torch.testing.assert_close(gradient, expected[name], atol=1e-3, rtol=2e-3, msg=name)


@pytest.mark.parametrize("shape", SHAPES)
def test_without_the_flag_it_leaves_everything_alone(shape):
    assert all((gradient == 7.0).all() for gradient in found(shape, 0).values())

"""What every test needs before the library is imported."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch

# Triton reads this when a kernel is defined, so it stands here, before anything of ours is
# imported. Without a GPU its interpreter runs the kernels; with one, the GPU does.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.fixture
def fp32_setting() -> Iterator[None]:
    """Torch's own setting for products of fp32 is full precision, and is put back afterwards."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    yield
    torch.set_float32_matmul_precision(before)


@pytest.fixture(autouse=True)
def memory_for_others() -> Iterator[None]:
    """Several processes share a GPU, and PyTorch keeps what a large test has freed."""
    yield
    if torch.cuda.is_available() and torch.cuda.memory_reserved() > 2**30:
        torch.cuda.empty_cache()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what needs a GPU where there is none; put what needs a browser last.

    The browser opens a notebook that uses a model which an earlier notebook's test has trained.
    Where tests run in several processes, those of a file stay together, and files come in their
    order: by the number of tests, as xdist has it, few long ones would come last, and alone.
    """
    items.sort(key=lambda item: item.get_closest_marker("browser") is not None)
    if torch.cuda.is_available():
        return
    no_gpu = pytest.mark.skip(reason="no GPU on this machine")
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(no_gpu)


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    """In continuous integration a run in which nothing passed is not a success."""
    if os.environ.get("CI") != "true" or exitstatus != pytest.ExitCode.OK:
        return
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    if reporter is not None and not reporter.stats.get("passed"):
        session.exitstatus = pytest.ExitCode.NO_TESTS_COLLECTED

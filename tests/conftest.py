"""One thread per process and reproducible random numbers, in every test."""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # also for the processes that tests start

import pytest
import torch
from hypothesis import settings

torch.set_num_threads(1)

# derandomize: the same examples on every machine and run. No deadline: machines differ.
settings.register_profile("suite", derandomize=True, deadline=None, database=None, max_examples=60)
settings.load_profile("suite")


@pytest.fixture(autouse=True)
def seeded() -> None:
    """Every test draws the same random numbers, alone or in the suite."""
    torch.manual_seed(1234)


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "gpu: runs on a CUDA device")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Without a GPU its tests are reported as skipped, with this reason; with one, nothing is skipped."""
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA GPU; this machine has none that torch can use"))

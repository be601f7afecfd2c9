"""What the tests on a GPU share."""

import pytest
import torch


@pytest.fixture
def poisoned():
    """torch.empty is filled with NaN (or the largest integer): what a kernel does not write shows."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)

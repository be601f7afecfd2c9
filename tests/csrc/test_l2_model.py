"""What the fused passes read from memory, by the model of L2 over csrc/schedule (model_l2.cpp) and as measured."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from .host import compile_host

CAPACITY_MB = 30  # of an H100's and H200's 50, whose halves both hold what SMs on both sides read
PRO, FLASH = (7168, 3072, 48, 1024), (4096, 2048, 32, 1536)
AS_BEFORE = 3  # claims ahead, up to f37818f
MEASURED = {  # GB, one H200, EP = 1: docs/performance.md, "Late claims"; backward with the wgrads' order of 7da14f5
    ("fwd", AS_BEFORE): 14.53,
    ("fwd", 0): 10.95,
    ("bwd", 0): 29.83,
}


@pytest.fixture(scope="module")
def binary(tmp_path_factory) -> Path:
    return compile_host("model_l2.cpp", tmp_path_factory.mktemp("l2"))


def gigabytes(binary: Path, which: str, shape: tuple[int, ...], ahead: int) -> tuple[float, float]:
    """(read, least)."""
    command = [binary, which, *map(str, shape), str(ahead), str(CAPACITY_MB)]
    words = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout.split()
    return float(words[1]), float(words[3])


@pytest.mark.parametrize(("which", "ahead"), MEASURED)
def test_the_model_says_what_was_measured(binary, which, ahead):
    read, _ = gigabytes(binary, which, PRO, ahead)
    assert read == pytest.approx(MEASURED[which, ahead], rel=0.15)


@pytest.mark.parametrize("which", ["fwd", "bwd"])
@pytest.mark.parametrize("shape", [PRO, FLASH], ids=["pro", "flash"])
def test_little_is_read_twice(binary, shape, which):
    read, least = gigabytes(binary, which, shape, 0)
    assert read < 1.4 * least
    assert read < gigabytes(binary, which, shape, AS_BEFORE)[0]

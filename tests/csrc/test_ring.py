"""The ring protocol of a cluster (csrc/schedule/ring.cuh), run on the CPU in random orders: no deadlock, no wait on the
wrong phase, no stage overwritten or misread. Mutations of the protocol must be caught."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from .host import CSRC, compile_host

UNITS = 14
MUTATIONS = {
    "stages handed back to the own CTA's count only": (
        "kStageFreeArrivals = kMathWarps * kClusterSize",
        "kStageFreeArrivals = kMathWarps",
    ),
    "one reader of a unit forgotten": (
        "kUnitFreeArrivals = kUnitReaders * kClusterSize",
        "kUnitFreeArrivals = kUnitReaders * kClusterSize - 1",
    ),
    "the spare handed back by one warpgroup": (
        "kSpareFreeArrivals = kMathWarps",
        "kSpareFreeArrivals = kWarpgroupWarps",
    ),
    "a role skips one operand too many": ("index = to % kCount;", "index = (to + 1) % kCount;"),
    "no unit is ever near its end": ("k_blocks - kClaimLead : 0;", "k_blocks + 1 : k_blocks + 1;"),
    "the lap's parity never turns": ("            parity ^= 1;\n", ""),
}


def run(binary: Path, seed: int) -> str:
    return subprocess.run([binary, str(seed), str(UNITS)], capture_output=True, text=True, timeout=60).stdout.strip()


def test_any_order(tmp_path):
    binary = compile_host("walk_ring.cpp", tmp_path)
    for seed in range(150):
        assert run(binary, seed).startswith("ok"), f"seed {seed}: {run(binary, seed)}"


@pytest.mark.parametrize("mutation", MUTATIONS)
def test_mutation_is_caught(mutation, tmp_path):
    before, after = MUTATIONS[mutation]
    shutil.copytree(CSRC / "schedule", tmp_path / "csrc" / "schedule")
    ring = tmp_path / "csrc" / "schedule" / "ring.cuh"
    text = ring.read_text()
    assert before in text, f"{mutation}: the line it changes is not there"
    ring.write_text(text.replace(before, after))
    binary = compile_host("walk_ring.cpp", tmp_path, tmp_path / "csrc")
    assert any(run(binary, seed).startswith("failed") for seed in range(60)), f"{mutation}: nothing noticed it"

"""Two, four and eight processes, one GPU each, over NVLink: exact under skew, progress beside other kernels, failures
by name."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.gpu.processes import RANKS

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs that reach each other's memory"),
]

ROOT = Path(__file__).resolve().parents[2]
LIMIT_S = 100
FAULTS = {
    # what rank 1 does: (the others' message, they must know within seconds, exit status of rank 1)
    "killed": ("gave up waiting for .* of rank 1: deadline passed", 8, -9),
    "never_launches": ("gave up waiting for .* of rank 1: deadline passed", 8, 0),
    "backward": (
        "rank . gave up waiting for the announcement .* of the operation of rank .: "
        "(the peer is in another operation; expected .* dispatch.*|another rank has failed)", 8, 7),
    "out_of_memory": ("of rank 1: another rank has failed", 8, 8),
}  # fmt: skip


def start(tmp_path: Path, ranks: int, *scenarios: str, **environment: str) -> list[subprocess.Popen]:
    tmp_path.mkdir(parents=True, exist_ok=True)
    variables = {**os.environ, "MEGAMOE_RECORD_DIR": str(tmp_path), **environment}
    command = [sys.executable, "-m", "tests.gpu.two_ranks", str(tmp_path / "store"), str(ranks)]
    return [
        subprocess.Popen(
            [*command, str(rank), *scenarios],
            cwd=ROOT,
            env=variables,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        for rank in range(ranks)
    ]


def finish(processes: list[subprocess.Popen]) -> list[tuple[int, str, str]]:
    """Exit status, output and errors of each; one that hangs is killed, and has told where it was (two_ranks.py)."""
    results = []
    try:
        for process in processes:
            try:
                out, err = process.communicate(timeout=LIMIT_S)
            except subprocess.TimeoutExpired:
                process.kill()
                out, err = process.communicate()
                err += f"\nhung: killed after {LIMIT_S} s"
            results.append((process.returncode, out, err))
    finally:
        for process in processes:
            process.kill()
    return results


@pytest.mark.parametrize("ranks", RANKS)
@pytest.mark.parametrize("scenario", ["exact", "staged", "held"])
def test_processes(scenario, ranks, tmp_path):
    for rank, (code, out, err) in enumerate(finish(start(tmp_path, ranks, scenario))):
        assert code == 0 and f"passed {scenario}" in out, f"rank {rank}: exit {code}\n{out}\n{err}"


@pytest.mark.parametrize("ranks", RANKS)
@pytest.mark.parametrize("connections", ["1", "8"])
def test_beside_nccl_in_both_launch_orders(connections, ranks, tmp_path):
    running = start(tmp_path, ranks, "beside_nccl", CUDA_DEVICE_MAX_CONNECTIONS=connections)
    for rank, (code, out, err) in enumerate(finish(running)):
        assert code == 0, f"rank {rank}: exit {code}\n{out}\n{err}"


@pytest.mark.parametrize("ranks", RANKS)
def test_faults_are_named(ranks, tmp_path):
    running = {name: start(tmp_path / name, ranks, name) for name in FAULTS}
    for name, processes in running.items():
        results = finish(processes)
        message, seconds, peer_wanted = FAULTS[name]
        shown = "\n".join(f"{name}: rank {r} exit {code}\n{out}\n{err}" for r, (code, out, err) in enumerate(results))
        assert results[1][0] == peer_wanted, shown
        named = 0
        for rank, (code, out, err) in enumerate(results):
            if rank == 1:
                continue
            assert code == 7, shown
            raised = re.search(r"RAISED after ([\d.]+) s: megamoe: (.*)", out)
            # The first one to give up tells the rest, who name the one that told them.
            assert raised and re.search(f"{message}|another rank has failed", raised[2]), shown
            named += bool(re.search(message, raised[2]))
            assert float(raised[1]) < seconds, shown
            record = (tmp_path / name / f"megamoe-timeout-rank{rank}.txt").read_text()
            assert raised[2].split(" (block")[0] in record and "gave up waiting" in err, shown
        assert named >= 1, shown

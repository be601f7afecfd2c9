"""Are the fused kernels right? `python tests/gpu/smoke_fused.py [--ep N | --virtual R]`, seconds, without pytest.

One line per tensor: relative L2 error of ours and of plain bf16 torch, both against fp64, and the worst part of it
(rank, expert) by the share of the 2x rule it uses. --ep N: N processes, one GPU each (started here, or by torchrun).
--virtual R: R ranks on streams of one GPU, SMs divided. Exit 1 where anything is wrong.
"""

from __future__ import annotations

import argparse
import functools
import sys
import time
import warnings
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch

from megamoe_train.bench import ranks as bench_ranks
from tests.gpu.fused_run import VirtualRanks, one_rank
from tests.gpu.layer_case import Case, Layer, worst_of
from tests.gpu.virtual import Load


def cases(ranks: int) -> dict[str, Case]:
    """Small ones first: where the first is wrong, the others need no reading."""
    each = (1,) * ranks
    return {
        "tile": Case(Load("balanced", tuple(128 * t for t in each), 1, ranks), 256, 128),
        "even": Case(Load("balanced", tuple(512 * t for t in each), 2, 4 * ranks), 512, 256),
        "ragged": Case(Load("zipf", tuple(300 + 77 * r for r in range(ranks)), 4, 8 * ranks), 768, 384, clamp=10.0),
        "clamp": Case(Load("uniform", tuple(500 * t for t in each), 2, 4 * ranks), 512, 384, clamp=1.0, scale=3.0),
        "dropped": Case(Load("some_dropped", (700, *each[1:]), 3, 4 * ranks), 256, 128),
        "flash": Case(Load("uniform", tuple(1024 * t for t in each), 6, 8 * ranks), 4096, 2048, clamp=10.0),
    }


def check(name: str, case: Case, virtual: bool, backward: bool) -> bool:
    """Runs one case and prints its lines; every rank its own."""
    torch.use_deterministic_algorithms(True, warn_only=True)  # torch.empty is filled with NaN
    rank, begin = bench_ranks.rank(), time.monotonic()
    layer = Layer(case)
    run = VirtualRanks(layer).run if virtual else functools.partial(one_rank, rank=rank)
    results = run(layer, backward=backward)
    torch.use_deterministic_algorithms(False)
    found = worst_of(layer, results)
    for line in found:
        print(f"{name:8} {line}", flush=True)
    print(f"{name:8} {case}: {time.monotonic() - begin:.1f} s", flush=True)
    return all(line.used <= 1 for line in found)


def main(ranks: int, virtual: bool, names: list[str], backward: bool) -> None:
    warnings.filterwarnings("ignore", message=".*deterministic.*")
    table = cases(ranks)
    wrong = [name for name in names or table if not check(name, table[name], virtual, backward)]
    if wrong:
        print(f"rank {bench_ranks.rank()}: WRONG: {', '.join(wrong)}", flush=True)
        sys.exit(1)
    print(f"rank {bench_ranks.rank()}: all ok", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ep", type=int, default=1)
    parser.add_argument("--virtual", type=int, default=0, metavar="R")
    parser.add_argument("--cases", nargs="+", choices=cases(1), default=[], help="default: all")
    parser.add_argument("--forward", action="store_true", help="no backward")
    given = parser.parse_args()
    if given.virtual and given.ep > 1:
        parser.error("give one of --ep and --virtual")
    bench_ranks.run(
        main, given.ep, given.virtual or given.ep, bool(given.virtual), given.cases, not given.forward
    )  # fmt: skip

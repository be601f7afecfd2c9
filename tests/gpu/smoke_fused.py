"""Are the fused kernels right? `python tests/gpu/smoke_fused.py [--ep N | --virtual R]`, seconds, without pytest.

One line per tensor: relative L2 error of ours and of plain bf16 torch, both against fp64, and the worst part of it
(rank, expert) by the share of the 2x rule it uses. --ep N: N processes, one GPU each (started here, or by torchrun).
--virtual R: R ranks on streams of one GPU, SMs divided. Exit 1 where anything is wrong.
"""

from __future__ import annotations

import argparse
import sys
import time
import warnings
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch

from megamoe_train import ops, ops_comm, ops_fused
from megamoe_train.bench import ranks as bench_ranks
from megamoe_train.workspace import Shape, Workspace
from tests.gpu.layer_case import Case, Layer, RankResult, worst_of
from tests.gpu.virtual import Load, Ranks


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


def gradients(layer: Layer, rank: int) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Poisoned fp32 gradients of one rank's experts: they are written, not added to."""
    return tuple(
        [torch.full(weight.shape, torch.nan, device="cuda") for weight in weights] for weights in layer.experts_of(rank)
    )


def maps_of(layer: Layer, rank: int) -> ops_fused.WeightMaps:
    return ops_fused.WeightMaps.of(*layer.experts_of(rank))


def one_rank(layer: Layer, rank: int, backward: bool) -> dict[int, RankResult]:
    """This process's rank through the whole calls, high-water sizing."""
    case, load = layer.case, layer.case.load
    shape = Shape(load.ranks, load.experts, load.top_k, case.hidden, max(load.tokens))
    workspace = Workspace.create(shape, group=bench_ranks.group(), deadline_s=5.0)
    maps, x, p = maps_of(layer, rank), layer.xs[rank], layer.ps[rank]

    def forward(plan):
        return plan, *ops_fused.forward(plan, x, p, maps, clamp=case.clamp)

    with workspace.guard.watch():
        plan, y, h = ops_comm.planned(workspace, layer.ids[rank], forward)
        result = RankResult(y, h)
        if backward:
            result.dfc1, result.dfc2 = gradients(layer, rank)
            tables = ops.GradientTable.of(result.dfc1), ops.GradientTable.of(result.dfc2)
            result.dx, result.dweights = ops_fused.backward(
                plan, layer.dys[rank], x, h, p, maps, *tables, clamp=case.clamp, accumulate1=False, accumulate2=False
            )
        torch.cuda.synchronize()
    workspace.close()
    return {rank: result}


def virtual_ranks(layer: Layer, backward: bool) -> dict[int, RankResult]:
    """All ranks in this process, each on its own stream and its share of the SMs."""
    case, load = layer.case, layer.case.load
    ranks = Ranks(load, case.hidden, streams=True)
    everyone = range(load.ranks)
    for workspace in ranks.workspaces:
        workspace.high_water = layer.most_rows
    options = {"clamp": case.clamp, "num_sms": share_of_sms(load.ranks)}
    maps, plans = [maps_of(layer, r) for r in everyone], ranks.plan(layer.ids)
    with ranks.workspaces[0].guard.watch():
        calls = ranks.each(
            lambda *a: ops_fused.ForwardCall(*a, **options), plans, layer.xs, layer.ps, maps
        )  # fmt: skip
        results = [RankResult(call.y, call.h) for call in run(ranks, calls)]
        if backward:
            for rank, result in enumerate(results):
                result.dfc1, result.dfc2 = gradients(layer, rank)
            tables = [[ops.GradientTable.of(d) for d in (result.dfc1, result.dfc2)] for result in results]
            torch.cuda.synchronize()
            calls = ranks.each(
                lambda dy, x, h, p, plan, maps, tables: ops_fused.BackwardCall(
                    plan, dy, x, h, p, maps, *tables, **options, accumulate1=False, accumulate2=False
                ),
                layer.dys, layer.xs, [result.h for result in results], layer.ps, plans, maps, tables,
            )  # fmt: skip
            for result, call in zip(results, run(ranks, calls), strict=True):
                result.dx, result.dweights = call.dx, call.dweights
        torch.cuda.synchronize()
    return dict(enumerate(results))


def share_of_sms(ranks: int) -> int:
    """An even number of SMs for each of several virtual ranks."""
    return torch.cuda.get_device_properties(0).multi_processor_count // ranks // 2 * 2


def run(ranks: Ranks, calls: list) -> list:
    ranks.each(lambda call: call.begin(), calls)
    ranks.each(lambda call: call.launch(), calls)
    return calls


def check(name: str, case: Case, virtual: bool, backward: bool) -> bool:
    """Runs one case and prints its lines; every rank its own."""
    torch.use_deterministic_algorithms(True, warn_only=True)  # torch.empty is filled with NaN
    rank, begin = bench_ranks.rank(), time.monotonic()
    layer = Layer(case)
    results = virtual_ranks(layer, backward) if virtual else one_rank(layer, rank, backward)
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

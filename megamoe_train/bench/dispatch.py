"""`bench dispatch`: plan, dispatch and combine beside the machine's floors and Megatron's alltoall dispatcher.

Floors of the same run: the rows that peers hold, contiguous, moved by the same warps on as many SMs as dispatch and
combine use NVLink from (dispatch takes as many again for the rank's own rows), both ranks at once (pull, push); HBM: a
device copy, bytes read and written. Rates count the rows that are exchanged with peers, though dispatch moves the
rank's own as well, and sends a token to a rank once, however many of its experts are there: "crossing GB/s" counts
that. Each number is the median over iterations, worst rank.
"""

from __future__ import annotations

import statistics
from argparse import Namespace
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist

from .. import ops, ops_plan
from ..ops_comm import Op, Transfer
from ..plan import decode_source
from ..workspace import Shape, Workspace
from . import dispatch_megatron, ranks

LEAD_CYCLES = 6_000_000  # ~3 ms of spinning, so that launches are queued on every rank when the clock starts
DEADLINE_S = 5.0
PIECE = 8192  # bytes of a bulk copy


@dataclass(frozen=True)
class Case:
    tokens: int
    top_k: int
    hidden: int
    experts: int
    sms: int


def milliseconds(steps: dict[str, Callable[[], object]], iterations: int) -> dict[str, float]:
    """Median of each step's time on the stream, in order, launch cost hidden, all ranks aligned first; worst rank."""
    spans: dict[str, list[float]] = {name: [] for name in steps}
    align = torch.zeros(1, device="cuda")
    for iteration in range(iterations + 2):
        torch.cuda.synchronize()
        if ranks.group() is not None:
            dist.barrier()
            torch.cuda.synchronize()
        torch.cuda._sleep(LEAD_CYCLES)
        if ranks.group() is not None:
            dist.all_reduce(align)
        marks = [torch.cuda.Event(enable_timing=True) for _ in range(len(steps) + 1)]
        marks[0].record()
        for mark, step in zip(marks[1:], steps.values(), strict=True):
            step()
            mark.record()
        torch.cuda.synchronize()
        if iteration >= 2:
            for name, start, end in zip(steps, marks, marks[1:], strict=False):
                spans[name].append(start.elapsed_time(end))
    medians = torch.tensor([statistics.median(times) for times in spans.values()], device="cuda")
    if ranks.group() is not None:
        dist.all_reduce(medians, dist.ReduceOp.MAX)
    return dict(zip(steps, medians.tolist(), strict=True))


class Bench:
    """One case on this rank: workspace, uniform random routing, a plan, pools."""

    def __init__(self, case: Case, seed: int = 0):
        self.case, self.rank, self.size = case, ranks.rank(), dist.get_world_size() if ranks.group() else 1
        shape = Shape(self.size, case.experts, case.top_k, case.hidden, case.tokens)
        self.workspace = Workspace.create(shape, group=ranks.group(), deadline_s=DEADLINE_S)
        generator = torch.Generator("cuda").manual_seed(1000 * seed + self.rank)
        scores = torch.rand(case.tokens, case.experts, generator=generator, device="cuda")
        self.ids = scores.topk(case.top_k, dim=1).indices.int()
        self.x = torch.randn(case.tokens, case.hidden, generator=generator, device="cuda").bfloat16()
        self.p = torch.rand(case.tokens, case.top_k, generator=generator, device="cuda")
        self.plan = ops_plan.build_plan(self.workspace, self.ids, sizing="exact")
        self.workspace.high_water = ops_plan.round_capacity(self.plan.settle())
        source, flat = decode_source(self.plan.source_of)
        kept = self.plan.source_of >= 0
        from_peers = kept & (source != self.rank)
        tokens = torch.stack([source, flat // case.top_k], dim=1)[from_peers].unique(dim=0)
        self.crossing_bytes = len(tokens) * case.hidden * 2
        self.kept = int(kept.sum())
        self.remote_bytes = int(from_peers.sum()) * case.hidden * 2
        self.pool = torch.empty(self.plan.settle(), case.hidden, device="cuda", dtype=torch.bfloat16)
        self.y = torch.empty_like(self.x)

    def transfer(self, op: Op) -> Transfer:
        weights = torch.empty(len(self.pool), device="cuda")
        tensors = {"pool": self.pool, "row_weights": weights}
        if op == Op.DISPATCH:
            tensors |= {"tokens_in": self.x, "weights": self.p}
        else:
            tensors |= {"tokens_out": self.y, "dweights": torch.empty_like(self.p)}
        return Transfer(self.plan, op, num_sms=self.case.sms, **tensors)

    def copy(self, pull: bool) -> None:
        """The bytes of one dispatch that cross NVLink, between this rank's pool and the peer's combine slots."""
        peer = int(self.bases[(self.rank + 1) % self.size]) + self.workspace.layout.slots
        mine = self.pool.data_ptr()
        limit = min(self.pool.numel() * 2, self.workspace.layout.tile_flags - self.workspace.layout.slots)
        size = min(self.remote_bytes, limit) // PIECE * PIECE
        self.copied = size
        source, target = (peer, mine) if pull else (mine, peer)
        stream = torch.cuda.current_stream().cuda_stream
        torch.ops.megamoe.bulk_copy(source, target, size, self.case.sms, stream)

    def measure(self, iterations: int) -> dict[str, float]:
        """Milliseconds and GB/s of everything but Megatron."""
        self.bases = self.workspace.bases.tolist()
        out = {}
        pulled, pushed = self.transfer(Op.DISPATCH), self.transfer(Op.COMBINE)
        alone = self.size == 1
        out |= milliseconds({"plan": lambda: ops_plan.build_plan(self.workspace, self.ids)}, iterations)
        steps = {"dispatch begin": pulled.begin, "dispatch pull": pulled.move, "combine begin": pushed.begin}
        steps |= {"combine push": pushed.move, "combine sum": pushed.finish}
        out |= milliseconds(steps, iterations)
        big = (
            torch.empty(1 << 30, dtype=torch.uint8, device="cuda"),
            torch.empty(1 << 30, dtype=torch.uint8, device="cuda"),
        )
        out["hbm GB/s"] = 2 * (1 << 30) / milliseconds({"c": lambda: big[0].copy_(big[1])}, iterations)["c"] / 1e6
        rows = self.case.tokens * self.case.top_k
        summed = (rows + self.case.tokens) * self.case.hidden * 2
        out["sum GB/s"] = summed / out["combine sum"] / 1e6
        if alone:
            moved = 2 * self.kept * self.case.hidden * 2
            out["pull GB/s"] = moved / out["dispatch pull"] / 1e6
            return out
        for name, pull in (("floor pull", True), ("floor push", False)):
            out[name] = milliseconds({"c": lambda pull=pull: self.copy(pull)}, iterations)["c"]
            out[f"{name} GB/s"] = self.copied / out[name] / 1e6
        out["pull GB/s"] = self.remote_bytes / out["dispatch pull"] / 1e6
        out["pull crossing GB/s"] = self.crossing_bytes / out["dispatch pull"] / 1e6
        out["push GB/s"] = self.remote_bytes / out["combine push"] / 1e6
        return out


def shares(row: dict) -> dict[str, float]:
    """Of the floors of the same run."""
    pairs = {"pull": ("pull GB/s", "floor pull GB/s"), "push": ("push GB/s", "floor push GB/s"),
             "sum": ("sum GB/s", "hbm GB/s")}  # fmt: skip
    return {f"{name} share": row[a] / row[b] for name, (a, b) in pairs.items() if a in row and b in row}


def text(row: dict) -> str:
    case = f"T={row['tokens']} K={row['top_k']} H={row['hidden']} E={row['experts']} EP={row['ep']} {row['sms']} SMs"
    return f"{case} (ms where no unit is named)\n{lines(row)}"


def lines(row: dict) -> str:
    return "\n".join(f"  {name:44} {value:9.3f}" for name, value in row.items() if isinstance(value, float))


def one(case: Case, iterations: int, megatron: bool) -> dict:
    ops.load()
    bench = Bench(case)
    row = {**vars(case), "ep": bench.size, **bench.measure(iterations)}
    row |= shares(row)
    if bench.rank == 0:
        print(text(row), flush=True)
    bench.pool = bench.y = None
    if megatron:
        found = dispatch_megatron.measure(bench, iterations)
        row |= found
        if bench.rank == 0:
            print(lines(found), flush=True)
    bench.workspace.close()
    return row


def add_arguments(tables) -> None:
    """The command line of `bench dispatch`."""
    table = tables.add_parser("dispatch", help="plan, dispatch and combine beside floors and Megatron's alltoall")
    table.add_argument("--ep", type=int, default=2, help="ranks, one GPU each")
    table.add_argument("--hidden", nargs="+", type=int, default=[4096, 7168])
    table.add_argument("--tokens", type=int, default=8192)
    table.add_argument("--top-k", type=int, default=6)
    table.add_argument("--experts", type=int, default=256)
    table.add_argument("--sms", type=int, default=24, help="of the kernels that use NVLink; 0: all")
    table.add_argument("--iterations", type=int, default=30)
    table.add_argument("--no-megatron", action="store_true", help="leave out Megatron's dispatcher")
    table.add_argument("--json", type=Path, help="also write the rows here")


def run(args: Namespace) -> list[dict]:
    """One row per hidden size."""
    results = torch.multiprocessing.get_context("spawn").SimpleQueue()
    cases = [Case(args.tokens, args.top_k, hidden, args.experts, args.sms) for hidden in args.hidden]
    ranks.run(each, args.ep, cases, args.iterations, not args.no_megatron, results)
    return [] if results.empty() else results.get()


def each(cases: list[Case], iterations: int, megatron: bool, results) -> None:
    """On each rank; rank 0 prints every row as it comes and puts them into `results`."""
    rows = [one(case, iterations, megatron) for case in cases]
    if ranks.rank() == 0:
        results.put(rows)

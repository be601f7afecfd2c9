"""R virtual ranks of one GPU in one process: every step on all ranks before the next one.

tests/csrc/emulator runs the same on the CPU; nothing here but `Ranks` names a device.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from megamoe_train import ops_comm, ops_plan
from megamoe_train.plan import RoutingPlan, decode_source, plans_of
from megamoe_train.workspace import Shape, Workspace
from tests.workloads import route

DELAY = 20_000_000  # cycles, ~10 ms
Given = TypeVar("Given")


@dataclass(frozen=True)
class Load:
    """One routing: what it looks like, tokens of each rank, K, E."""

    kind: str
    tokens: tuple[int, ...]
    top_k: int
    experts: int

    @property
    def ranks(self) -> int:
        return len(self.tokens)

    def ids(self, seed: int = 0) -> list[Tensor]:
        generator = torch.Generator().manual_seed(seed)
        return [route(self.kind, t, self.top_k, self.experts, self.ranks, generator) for t in self.tokens]

    def __str__(self) -> str:
        return f"{self.kind}-T{'.'.join(map(str, self.tokens))}-K{self.top_k}-E{self.experts}"


class Ranks:
    """Workspaces of all ranks. `streams`: each rank on its own stream, so that they really wait for each other."""

    device = "cuda"

    def __init__(self, load: Load, hidden: int = 256, *, streams: bool = False, deadline_s: float = 4.0):
        shape = Shape(load.ranks, load.experts, load.top_k, hidden, max(load.tokens))
        self.workspaces = Workspace.virtual_ranks(shape, device=self.device, deadline_s=deadline_s)
        self.streams = [self.new_stream() for _ in load.tokens] if streams else None

    def new_stream(self):
        return torch.cuda.Stream()

    def synchronize(self) -> None:
        """Waits for what the ranks were given, not for other streams of the GPU."""
        for stream in [torch.cuda.current_stream(), *(self.streams or [])]:
            stream.synchronize()

    def delay(self, rank: int) -> None:
        """What this rank is given next starts late."""
        with self.on(rank):
            torch.cuda._sleep(DELAY)

    def on(self, rank: int):
        return torch.cuda.stream(self.streams[rank]) if self.streams else contextlib.nullcontext()

    def each(self, call, *lists) -> list:
        results = []
        for rank, items in enumerate(zip(*lists, strict=True)):
            with self.on(rank):
                results.append(call(*items))
        return results

    def plan(
        self, ids: list[Tensor], sizing: str = "high_water", capacity: int = 0, late: int | None = None
    ) -> list[ops_plan.DevicePlan]:
        """As ops_plan.build_plan, by steps; rank `late` starts late."""
        sizes = [capacity if sizing == "fixed" else w.high_water or ops_plan.first_capacity(w) for w in self.workspaces]
        if sizing == "exact":
            sizes = [ops_plan.MAX_ROWS] * len(ids)
        for workspace, size in zip(self.workspaces, sizes, strict=True):
            workspace.high_water = size if sizing == "high_water" else workspace.high_water
        self.synchronize()
        if late is not None:
            self.delay(late)
        return self.give_plans(ids, sizes)

    def give_plans(self, ids: list[Tensor], sizes: list[int]) -> list[ops_plan.DevicePlan]:
        """The steps of a plan with room for `sizes` rows; MAX_ROWS: the host waits for the verdicts."""
        plans = self.each(ops_plan.plan_count, self.workspaces, ids, sizes)
        self.each(ops_plan.plan_place, plans)
        rows = [plan.settle() if size == ops_plan.MAX_ROWS else None for plan, size in zip(plans, sizes, strict=True)]
        return self.each(ops_plan.plan_sources, plans, rows)

    def in_one_launch(self, give: Callable[[], Given]) -> tuple[torch.cuda.CUDAGraph, Given]:
        """A graph of all that `give` gives the ranks, each rank a branch, and what `give` returns. Not replayed yet."""
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            whole = torch.cuda.current_stream()
            for stream in self.streams:
                stream.wait_stream(whole)
            given = give()
            for stream in self.streams:
                whole.wait_stream(stream)
        return graph, given

    def run(self, transfers: list[ops_comm.Transfer]) -> None:
        for step in ("begin", "move", "finish"):
            self.each(lambda transfer, step=step: getattr(transfer, step)(), transfers)

    def dispatch(self, plans, xs, weights=None, **options) -> list[tuple[Tensor, Tensor | None]]:
        weights = weights or [None] * len(plans)
        started = self.each(lambda *a: ops_comm.start_dispatch(*a, **options), plans, xs, weights)
        self.run([transfer for transfer, _, _ in started])
        return [(pool, row_weights) for _, pool, row_weights in started]

    def combine(self, plans, pools, row_dweights=None, **options) -> list[tuple[Tensor, Tensor | None]]:
        row_dweights = row_dweights or [None] * len(plans)
        started = self.each(lambda *a: ops_comm.start_combine(*a, **options), plans, pools, row_dweights)
        self.run([transfer for transfer, _, _ in started])
        return [(y, dweights) for _, y, dweights in started]


def expected_rows(twins: list[RoutingPlan], rank: int, values: list[Tensor], top_k: int, per_slot: bool) -> Tensor:
    """What rank's pool holds: each row's token (or slot value), zero for padding. By indexing only."""
    source_rank, flat = decode_source(twins[rank].source_of)
    out = torch.zeros((twins[rank].num_rows, *values[0].shape[1:]), dtype=values[0].dtype, device=values[0].device)
    for r, value in enumerate(values):
        rows = ((twins[rank].source_of >= 0) & (source_rank == r)).nonzero().flatten()
        index = flat[rows] if per_slot else flat[rows] // top_k
        out[rows.to(out.device)] = value[index.to(out.device)]
    return out


def expected_slots(twins: list[RoutingPlan], rank: int, pools: list[Tensor]) -> Tensor:
    """`[T, K, ...]`: the row of every slot of rank's tokens, zeros for dropped ones. By indexing only."""
    twin, device = twins[rank], pools[0].device
    slots = torch.zeros((twin.num_tokens, twin.top_k, *pools[0].shape[1:]), dtype=pools[0].dtype, device=device)
    for owner, pool in enumerate(pools):
        mine = (twin.slot_of >= 0) & (twin.topk_ids // twin.num_local_experts == owner)
        slots[mine.to(device)] = pool[twin.slot_of[mine].to(device)]
    return slots


def sum_slots(slots_TKH: Tensor) -> Tensor:
    """fp32, k ascending, rounded once."""
    y = slots_TKH[:, 0].float()
    for k in range(1, slots_TKH.shape[1]):
        y = y + slots_TKH[:, k].float()
    return y.to(slots_TKH.dtype)


def twins_of(ids: list[Tensor], experts: int) -> list[RoutingPlan]:
    return plans_of(ids, experts)


class Data:
    """Random inputs of one load on every rank, and the plans they must give."""

    def __init__(self, load: Load, hidden: int, seed: int = 0, device: str = "cuda"):
        torch.manual_seed(seed)
        self.load, self.device = load, device
        self.ids = load.ids(seed)
        self.twins = twins_of(self.ids, load.experts)
        self.xs = [torch.randn(t, hidden, device=device).bfloat16() for t in load.tokens]
        self.ps = [torch.rand(t, load.top_k, device=device) for t in load.tokens]
        self.rows = [torch.randn(twin.num_rows, hidden, device=device).bfloat16() for twin in self.twins]
        self.row_dps = [torch.randn(twin.num_rows, device=device) for twin in self.twins]

    def plans(self, ranks: Ranks) -> list[ops_plan.DevicePlan]:
        for workspace in ranks.workspaces:
            workspace.high_water = max(twin.num_rows for twin in self.twins)
        return ranks.plan([ids.to(self.device) for ids in self.ids])

    def padded(self, rows: int) -> tuple[list, list]:
        """rows and row_dps in pools of `rows` rows, NaN in padding: it must reach nothing."""
        pools, values = [], []
        for twin, pool, value in zip(self.twins, self.rows, self.row_dps, strict=True):
            padding = (twin.source_of < 0).to(self.device)
            pools.append(torch.full((rows, pool.shape[1]), torch.nan, device=self.device).bfloat16())
            values.append(torch.full((rows,), torch.nan, device=self.device))
            pools[-1][: len(pool)] = pool.masked_fill(padding[:, None], torch.nan)
            values[-1][: len(pool)] = value.masked_fill(padding, torch.nan)
        return pools, values

    def check_rows(self, dispatched) -> None:
        """Rows and their weights, exactly. dispatched: of every rank, or a dict of some."""
        for rank, (pool, weights) in _items(dispatched):
            rows = self.twins[rank].num_rows
            assert torch.equal(pool[:rows], self._at_rows(rank, self.xs, per_slot=False)), f"rows of rank {rank}"
            flat = [p.flatten() for p in self.ps]
            assert torch.equal(weights[:rows], self._at_rows(rank, flat, per_slot=True)), f"weights of rank {rank}"

    def _at_rows(self, rank: int, values: list[Tensor], per_slot: bool) -> Tensor:
        return expected_rows(self.twins, rank, values, self.load.top_k, per_slot)

    def check_sums(self, combined) -> None:
        """Sums and dp, exactly."""
        for rank, (y, dps) in _items(combined):
            assert torch.equal(y, sum_slots(expected_slots(self.twins, rank, self.rows))), f"y of rank {rank}"
            assert torch.equal(dps, expected_slots(self.twins, rank, self.row_dps)), f"dp of rank {rank}"

    def check(self, dispatched, combined) -> None:
        self.check_rows(dispatched)
        self.check_sums(combined)


def _items(results):
    return results.items() if isinstance(results, dict) else enumerate(results)


def assert_same(plan: ops_plan.DevicePlan, twin: RoutingPlan) -> None:
    """The kernels' plan is the twin's, bit for bit."""
    ours = plan.to_routing_plan()
    for name in ("counts", "expert_rows", "expert_offset", "slot_of", "topk_ids", "source_of"):
        got, want = getattr(ours, name).cpu(), getattr(twin, name)
        assert got.dtype == want.dtype and torch.equal(got, want), f"{name} of rank {twin.rank}"


def run_layer(ranks: Ranks, data: Data, late: int, **options) -> None:
    """Plan, forward and backward of one layer with one rank late: every result exact."""
    check_layer(data, *move_layer(ranks, data, late, **options))


def move_layer(ranks: Ranks, data: Data, late: int | None = None, **options) -> tuple:
    """As run_layer, without the comparison: the plans and all that was moved, for check_layer."""
    plans = data.plans(ranks)
    pools, values = data.padded(plans[0].capacity)
    ranks.synchronize()
    if late is not None:
        ranks.delay(late)
    moved = give_layer(ranks, plans, data.xs, data.ps, pools, values, **options)
    ranks.synchronize()
    return plans, *moved


def give_layer(ranks: Ranks, plans, xs, ps, pools, values, **options) -> tuple:
    """The operations of a layer, forward and backward: y, what was dispatched, what was combined last."""
    first = ranks.dispatch(plans, xs, ps, **options)
    y = ranks.combine(plans, pools, **options)
    second = ranks.dispatch(plans, xs, ps, buffer=1, backward=True, **options)
    third = ranks.dispatch(plans, xs, ps, buffer=0, backward=True, **options)
    last = ranks.combine(plans, pools, values, backward=True, **options)
    return y, (first, second, third), last


def check_layer(data: Data, plans, y, dispatches, last) -> None:
    """Every result of move_layer, exactly."""
    for plan, twin in zip(plans, data.twins, strict=True):
        assert_same(plan, twin)
    for dispatched in dispatches:
        data.check(dispatched, last)
    assert all(torch.equal(a, b) for (a, _), (b, _) in zip(y, last, strict=True))

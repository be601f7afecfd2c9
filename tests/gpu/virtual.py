"""R virtual ranks of one GPU in one process: every step on all ranks before the next one."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass

import torch
from torch import Tensor

from megamoe_train import ops_comm
from megamoe_train.plan import RoutingPlan, decode_source, plans_of
from megamoe_train.workspace import Shape, Workspace
from tests.workloads import route


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

    def __init__(self, load: Load, hidden: int = 256, *, streams: bool = False, deadline_s: float = 4.0):
        shape = Shape(load.ranks, load.experts, load.top_k, hidden, max(load.tokens))
        self.workspaces = Workspace.virtual_ranks(shape, deadline_s=deadline_s)
        self.streams = [torch.cuda.Stream() for _ in load.tokens] if streams else None

    def on(self, rank: int):
        return torch.cuda.stream(self.streams[rank]) if self.streams else contextlib.nullcontext()

    def each(self, call, *lists) -> list:
        results = []
        for rank, items in enumerate(zip(*lists, strict=True)):
            with self.on(rank):
                results.append(call(*items))
        return results

    def plan(self, ids: list[Tensor], sizing: str = "high_water", capacity: int = 0) -> list[ops_comm.DevicePlan]:
        """As ops_comm.build_plan, by steps."""
        sizes = [capacity if sizing == "fixed" else w.high_water or ops_comm.first_capacity(w) for w in self.workspaces]
        if sizing == "exact":
            sizes = [ops_comm.MAX_ROWS] * len(ids)
        for workspace, size in zip(self.workspaces, sizes, strict=True):
            workspace.high_water = size if sizing == "high_water" else workspace.high_water
        torch.cuda.synchronize()
        plans = self.each(ops_comm.plan_count, self.workspaces, ids, sizes)
        self.each(ops_comm.plan_place, plans)
        rows = [plan.settle() if sizing == "exact" else None for plan in plans]
        return self.each(ops_comm.plan_sources, plans, rows)

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

"""The routing plan as an operator on a Workspace: built on the device, judged there, read by the host where it must.

Cut where ranks wait for each other: one Python thread that drives several virtual ranks calls one step for all of them
before the next; a rank that is a process calls `build_plan`. Letters as in plan.py.
"""

from __future__ import annotations

import itertools
import time
from dataclasses import dataclass
from enum import IntEnum
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from .ops import ask, raw_stream
from .plan import ROW_TILE, RoutingPlan
from .workspace import Shape, Workspace

MAX_ROWS = 2**31 - 1
POLLS_PER_QUERY = 256
TOO_MANY_EXPERTS = -(2**31)  # csrc/kernels/routing.cuh: kTooManyExperts


class PlanCode(IntEnum):
    """csrc/kernels/plan.cuh: enum class PlanCode."""

    GOOD = 0
    BAD_ID = 1
    OVERFLOW = 2


class RowOverflow(RuntimeError):
    """The routing needs more rows than a rank has room for. Decided alike on every rank; nothing was written."""


class TableLayout(NamedTuple):
    """First byte of each table of a plan: csrc/layout/plan.cuh."""

    control: int
    counts: int
    expert_rows: int
    expert_offset: int
    block_counts: int
    topk_ids: int
    slot_of: int
    source_of: int  # the last one: its size may not be known when the others are allocated


@lru_cache(1024)
def table_layout(ranks: int, experts: int, slots: int) -> TableLayout:
    return TableLayout(*ask(torch.ops.megamoe.plan_layout, ranks, experts, slots, answers=len(TableLayout._fields)))


@dataclass(eq=False)
class DevicePlan:
    """RoutingPlan on the device, as the kernels write and read it. Its tables are cut out only where somebody asks."""

    workspace: Workspace
    ids: Tensor  # [T, K] the caller's, int64 or int32; read until place() is done
    capacity: int  # rows that source_of has room for; MAX_ROWS: it is not allocated yet
    status: Tensor  # int64 [8] pinned: PlanStatus of csrc/kernels/plan.cuh
    tables: Tensor  # int32: all of TableLayout; without source_of where the capacity is not known yet
    home: int = 0  # raw stream on which they were allocated
    row_tile: int = ROW_TILE  # every expert's segment starts at a multiple: ROW_TILE, or 1 where nothing is padded
    own_source_of: Tensor | None = None  # where it is not in `tables`
    rows: int | None = None  # M, once `settle` has read the verdict

    @property
    def tokens(self) -> int:
        return self.ids.shape[0]

    @property
    def arguments(self) -> tuple[int, Tensor, Tensor | None]:
        """What operators take: capacity, tables, source_of where it has memory of its own. For a launch on the current
        stream: what was allocated on another one is given out again only after it."""
        if self.tables.is_cuda and self.home != stream_of(self.workspace):
            self._used_here()
        return self.capacity, self.tables, self.own_source_of

    def _used_here(self) -> None:
        if torch.cuda.is_current_stream_capturing():
            return
        for tensor in (self.tables, self.own_source_of):
            if tensor is not None:
                tensor.record_stream(torch.cuda.current_stream(tensor.device))

    def _table(self, name: str, *size: int, dtype: torch.dtype = torch.int32) -> Tensor:
        shape = self.workspace.shape
        begin = getattr(table_layout(shape.ranks, shape.experts, self.ids.numel()), name)
        return self.tables[begin // 4 :].view(dtype)[: torch.Size(size).numel()].view(size)

    @property
    def slot_of(self) -> Tensor:
        """[T, K] int64"""
        return self._table("slot_of", *self.ids.shape, dtype=torch.int64)

    @property
    def topk_ids(self) -> Tensor:
        """[T, K] int32, the plan's own copy"""
        return self._table("topk_ids", *self.ids.shape)

    @property
    def counts(self) -> Tensor:
        """[R, E] int32"""
        return self._table("counts", self.workspace.shape.ranks, self.workspace.shape.experts)

    @property
    def expert_rows(self) -> Tensor:
        """[L] int32"""
        return self._table("expert_rows", self.workspace.shape.experts // self.workspace.shape.ranks)

    @property
    def expert_offset(self) -> Tensor:
        """[L+1] int32"""
        return self._table("expert_offset", self.workspace.shape.experts // self.workspace.shape.ranks + 1)

    @property
    def source_of(self) -> Tensor:
        """[capacity] int64; rows from M on are not written"""
        if self.own_source_of is None:
            return self._table("source_of", self.capacity, dtype=torch.int64)
        return self.own_source_of[: self.capacity]

    def wait(self) -> None:
        """Polls until the device has judged the plan. Raises MegaMoETimeout if a wait of the kernels failed."""
        status = self.status.numpy()
        with self.workspace.guard.watch():
            for polls in itertools.count(1):
                if status[0]:
                    return
                if self.ids.is_cuda and polls % POLLS_PER_QUERY == 0:
                    torch.cuda.current_stream(self.ids.device).query()  # raises what ended the kernels
                self.workspace.guard.check()
                time.sleep(2e-6)

    def settle(self) -> int:
        """M of this rank, after `wait`. Raises ValueError for a bad id and RowOverflow, alike on every rank."""
        if self.rows is None:  # read once: the workspace uses the pinned words again
            if not self.status.tolist()[0]:
                self.wait()
            self.rows = read_verdict(self.status, self.workspace.shape)
        return self.rows

    def to_routing_plan(self) -> RoutingPlan:
        """The same plan as plan.py's, from what the kernels wrote. Synchronises."""
        rows, shape = self.settle(), self.workspace.shape
        return RoutingPlan(
            rank=self.workspace.rank,
            ep_size=shape.ranks,
            num_experts=shape.experts,
            top_k=shape.top_k,
            num_tokens=self.tokens,
            counts=self.counts.cpu().long(),
            slot_of=self.slot_of,
            topk_ids=self.topk_ids.long(),
            expert_rows=self.expert_rows.cpu().long(),
            expert_offset=self.expert_offset.cpu().long(),
            source_of=self.source_of[:rows],
        )


def read_verdict(status: Tensor, shape: Shape) -> int:
    """M of this rank from a verdict that the device has written. Raises what `settle` raises."""
    _, code, rank, position, value, rows, most, _ = status.tolist()
    if code == PlanCode.BAD_ID and value == TOO_MANY_EXPERTS:
        who = f"token {position // shape.top_k} of rank {rank}"
        raise ValueError(f"routing_map: {who} is routed to more than top_k = {shape.top_k} experts; allowed: no more")
    if code == PlanCode.BAD_ID:
        where = f"rank {rank}, token {position // shape.top_k}, k = {position % shape.top_k}"
        raise ValueError(f"topk_ids: got expert {value} at {where}; allowed: -1 (dropped) and 0..{shape.experts - 1}")
    if code == PlanCode.OVERFLOW:
        raise RowOverflow(f"row capacity: rank {rank} has room for {value} rows; this routing needs up to {most}")
    return rows


def round_capacity(rows: int) -> int:
    """Rows to allocate for `rows`: up to an eighth more, so that varying loads ask for few different sizes."""
    step = max(ROW_TILE, 1 << max(0, rows.bit_length() - 4))
    return -(-max(rows, 1) // step) * step


def first_capacity(workspace: Workspace) -> int:
    """High-water capacity before anything was seen: an even load and a quarter more, every expert padded."""
    shape = workspace.shape
    return round_capacity(shape.tokens * shape.top_k * 5 // 4 + shape.experts // shape.ranks * ROW_TILE)


def stream_of(workspace: Workspace) -> int:
    return raw_stream(workspace.memory.device)


def _new_plan(workspace: Workspace, ids: Tensor, capacity: int, row_tile: int) -> DevicePlan:
    """Raises ValueError for ids that will not do."""
    shape, size = workspace.shape, ids.shape
    if len(size) != 2 or size[1] != shape.top_k or size[0] > shape.tokens:
        raise ValueError(f"topk_ids: got shape {tuple(size)}; allowed: [T <= {shape.tokens}, {shape.top_k}]")
    if ids.dtype not in (torch.int64, torch.int32):
        raise ValueError(f"topk_ids: got dtype {ids.dtype}; allowed: torch.int32, torch.int64")
    before = table_layout(shape.ranks, shape.experts, size[0] * size[1]).source_of
    source_of = 0 if capacity == MAX_ROWS else 8 * capacity
    # One allocation: each costs host time, and the kernels wait for the host at the start of a layer.
    tables = torch.empty((before + source_of) // 4, dtype=torch.int32, device=ids.device)
    captured = workspace.memory.is_cuda and torch.cuda.is_current_stream_capturing()
    status, home = workspace.verdicts.next(captured=captured), stream_of(workspace)
    return DevicePlan(workspace, ids.contiguous(), capacity, status, tables, home, row_tile)


def plan_count(workspace: Workspace, ids: Tensor, capacity: int, row_tile: int = ROW_TILE) -> DevicePlan:
    """Step 1: counts this rank's slots and sends them. ids `[T, K]` int64 or int32, -1 = dropped.

    capacity: rows this rank has room for; MAX_ROWS where they are allocated after the verdict. row_tile: ROW_TILE, or 1
    for segments without padding; the same on every rank.
    """
    plan = _new_plan(workspace, ids, capacity, row_tile)
    _plan_step(plan, 0)
    return plan


def plan_place(plan: DevicePlan) -> None:
    """Step 2: row offsets, slot_of and the verdict, once every rank has counted. With one rank, source_of too."""
    _plan_step(plan, 1)


def plan_sources(plan: DevicePlan, rows: int | None = None) -> DevicePlan:
    """Step 3: source_of, once every rank has placed. rows: room to allocate, where no capacity was told before."""
    if plan.capacity == MAX_ROWS:
        plan.own_source_of = torch.empty(rows, dtype=torch.int64, device=plan.ids.device)
        plan.capacity = rows
    elif plan.workspace.shape.ranks == 1:
        return plan
    _plan_step(plan, 2)
    return plan


def _plan_step(plan: DevicePlan, phase: int) -> None:
    workspace = plan.workspace
    torch.ops.megamoe.plan(
        phase, workspace.handle, plan.ids, plan.row_tile, *plan.arguments, plan.status.data_ptr(), stream_of(workspace)
    )


def build_plan(
    workspace: Workspace, ids: Tensor, *, sizing: str = "high_water", capacity: int = 0, row_tile: int = ROW_TILE
) -> DevicePlan:
    """The whole plan. Collective: every rank calls it with the same `sizing` and `row_tile`.

    "high_water": capacity of the largest load seen, the host reads nothing; `settle()` tells of an overflow, after
    which `grow` and another call. "fixed": `capacity` rows, for good. "exact": the host waits for M and allocates it.
    """
    with workspace.guard.watch():
        if sizing == "exact":
            plan = plan_count(workspace, ids, MAX_ROWS, row_tile)
            plan_place(plan)
            return plan_sources(plan, max(plan.settle(), ROW_TILE))  # tensor maps describe no empty pool
        if sizing == "high_water":
            workspace.high_water = capacity = workspace.high_water or first_capacity(workspace)
        elif sizing != "fixed":
            raise ValueError(f"sizing: got {sizing!r}; allowed: 'high_water', 'fixed', 'exact'")
        plan = _new_plan(workspace, ids, capacity, row_tile)
        _plan_step(plan, 3)
        return plan


def grow(plan: DevicePlan) -> None:
    """After RowOverflow in the high-water mode: room for the largest load of any rank, the same on every rank."""
    most = int(plan.status[6])
    plan.workspace.high_water = max(plan.workspace.high_water, round_capacity(most))


def planned(workspace: Workspace, ids: Tensor, launch):
    """High-water mode in full: launch(plan) at once, then the verdict; after an overflow, grown, once more.

    Returns what launch returned. On an overflow every rank's kernels have skipped their work.
    """
    for _ in range(2):
        plan = build_plan(workspace, ids)
        result = launch(plan)
        try:
            plan.settle()
            return result
        except RowOverflow:
            grow(plan)
    raise RowOverflow("row capacity: a plan of the same ids needs more rows than its counts said")

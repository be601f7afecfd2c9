"""The fused backend's plan: built on the device, launched before the host knows its size, built again where too small.

How many rows a rank's pools have room for is the workspace's `sizing` (Workspace.create). Letters as in plan.py.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from . import comm, ops_plan
from .launch_order import in_order
from .plan import ROW_TILE, RoutingPlan
from .workspace import Shape, Workspace

Result = TypeVar("Result")
MARGIN = 32  # the high-water mode leaves a 32nd of the largest load so far as room to grow


@dataclass(eq=False)
class FusedPlan:
    """One routing on the device. Forward and backward use the same; several layers may."""

    workspace: Workspace
    topk_ids: Tensor  # [T, K] int64 or int32, the caller's; must not change before forward is done
    device_plan: ops_plan.DevicePlan

    @classmethod
    def build(cls, workspace: Workspace, topk_ids: Tensor) -> FusedPlan:
        """Collective. Reads nothing on the host, except in the exact mode."""
        ids = topk_ids if topk_ids.dtype in (torch.int32, torch.int64) else topk_ids.int()
        with in_order(ids.device):
            return cls(workspace, topk_ids, _device_plan(workspace, ids))

    @property
    def rank(self) -> int:
        return self.workspace.rank

    @property
    def ep_size(self) -> int:
        return self.workspace.shape.ranks

    @property
    def num_experts(self) -> int:
        return self.workspace.shape.experts

    @property
    def top_k(self) -> int:
        return self.workspace.shape.top_k

    @property
    def num_tokens(self) -> int:
        return self.topk_ids.shape[0]

    def run(self, launch: Callable[[ops_plan.DevicePlan], Result]) -> Result:
        """`launch(device plan)`, then the verdict; where the rows did not fit, all ranks launch once more with room.

        Raises ValueError for a bad id, alike on every rank. In the fixed mode the verdict is read by later calls.
        """
        return self.judged(launch(self.device_plan), launch)

    def judged(self, result: Result, launch: Callable[[ops_plan.DevicePlan], Result]) -> Result:
        """The same after a first launch, which has returned `result`."""
        if self.workspace.sizing == "fixed" or self.device_plan.rows is not None:
            return result
        try:
            self.device_plan.settle()
        except ops_plan.RowOverflow:
            ops_plan.grow(self.device_plan)
            self.device_plan = _device_plan(self.workspace, self.device_plan.ids)
            result = launch(self.device_plan)
            self.device_plan.settle()
        self.workspace.most_rows = max(self.workspace.most_rows, self.device_plan.settle())
        self.workspace.high_water = room_for(self.workspace.most_rows)
        return result

    def to_routing_plan(self) -> RoutingPlan:
        """The same as plan.py's, for the reference. Synchronises."""
        return self.device_plan.to_routing_plan()


def room_for(rows: int) -> int:
    """Rows to allocate where `rows` was the largest load so far: a 32nd more, in steps of at most a 32nd."""
    wanted = max(1, rows + rows // MARGIN)
    step = max(ROW_TILE, 1 << max(0, wanted.bit_length() - 6))
    return -(-wanted // step) * step


def most_rows_alone(slots: int, experts: int) -> int:
    """M at most, for one rank with `slots` = T * K: every expert that has a row may need a tile of padding."""
    return -(-(slots + min(slots, experts) * (ROW_TILE - 1)) // ROW_TILE) * ROW_TILE


def _device_plan(workspace: Workspace, ids: Tensor) -> ops_plan.DevicePlan:
    """What follows the first signal to the peers must not fail in silence: out of memory ends their waits, by name."""
    try:
        return _sized_plan(workspace, ids)
    except torch.OutOfMemoryError:
        if workspace.shape.ranks > 1:
            workspace.abort()
        raise


def _sized_plan(workspace: Workspace, ids: Tensor) -> ops_plan.DevicePlan:
    if workspace.sizing == "exact":
        return ops_plan.build_plan(workspace, ids, sizing="exact")
    if workspace.sizing == "high_water" and torch.cuda.is_current_stream_capturing():
        raise ValueError(
            'sizing: got "high_water" while a CUDA graph is captured; allowed: '
            'Workspace.create(..., sizing="fixed", capacity=ROWS), where the host reads nothing'
        )
    plan = ops_plan.build_plan(workspace, ids, sizing="fixed", capacity=capacity_for(workspace, ids.numel()))
    note_launch(plan)
    return plan


def note_launch(plan: ops_plan.DevicePlan) -> None:
    """In the fixed mode a plan's verdict is read by later calls."""
    if plan.workspace.sizing == "fixed":
        plan.workspace.verdicts.unread.append((plan.status, torch.cuda.is_current_stream_capturing()))


def capacity_for(workspace: Workspace, slots: int) -> int:
    """Rows to allocate for a call of T * K = slots, in the fixed mode (whose earlier verdicts are read first, and may
    raise) and in the high-water mode."""
    if workspace.sizing == "fixed":
        check_workspace(workspace)
        return workspace.capacity
    if workspace.shape.ranks == 1:  # nobody else's tokens arrive: the bound is known, and nothing overflows
        return max(most_rows_alone(slots, workspace.shape.experts), ROW_TILE)
    return max(workspace.high_water or ops_plan.first_capacity(workspace), ROW_TILE)


def check_workspace(workspace: Workspace, *, wait: bool = False) -> None:
    """Raises what the device has found in calls of the fixed mode: ValueError (bad id), RowOverflow, MegaMoETimeout.

    Such a call has written nothing. wait: synchronises first, so that every call up to here is judged; of a captured
    graph, its last replay.
    """
    if wait:
        with workspace.guard.watch():
            torch.cuda.synchronize(workspace.memory.device)
    workspace.guard.check()
    verdicts = workspace.verdicts
    waiting, verdicts.unread = verdicts.unread, []
    for number, (status, captured) in enumerate(waiting):
        judged = bool(status[0])
        if captured or not judged:
            verdicts.unread.append((status, captured))
        if judged:
            try:
                ops_plan.read_verdict(status, workspace.shape)
            except (ValueError, ops_plan.RowOverflow):
                status[0] = 0  # a captured plan's next verdict is its next replay's
                verdicts.unread += waiting[number + 1 :]
                raise


# ---- workspaces that nobody made -------------------------------------------------------------------------------------

_shared: dict[tuple[torch.device, int, int, int], Workspace] = {}


def workspace_for(
    given: Workspace | None, topk_ids: Tensor, num_experts: int, hidden_size: int, group: dist.ProcessGroup | None
) -> Workspace:
    """The given workspace if it takes this call; without one and with one rank, that which all such calls share.

    Raises ValueError naming field, value and what is allowed.
    """
    ranks, (tokens, top_k) = comm.size_of(group), topk_ids.shape
    if given is None:
        if ranks > 1:
            raise ValueError(
                f"workspace: got None with a group of {ranks} ranks; allowed: one made before, by all ranks together: "
                f"megamoe_train.Workspace.create(megamoe_train.WorkspaceShape(ranks={ranks}, experts={num_experts}, "
                f"top_k={top_k}, hidden={hidden_size}, tokens=MOST_PER_RANK), group=group)"
            )
        return _shared_workspace(topk_ids.device, num_experts, top_k, hidden_size, tokens)
    if not isinstance(given, Workspace):
        raise ValueError(f"workspace: got {type(given).__name__}; allowed: None or a megamoe_train.Workspace")
    if given.closed:
        raise ValueError("workspace: got one that is closed; allowed: an open one")
    shape = given.shape
    for name, got, value in (
        ("ranks", shape.ranks, ranks),
        ("experts", shape.experts, num_experts),
        ("top_k", shape.top_k, top_k),
        ("hidden", shape.hidden, hidden_size),
    ):
        if got != value:
            raise ValueError(f"workspace: got {name} = {got}; allowed: {value}, as in this call")
    if tokens > shape.tokens:
        raise ValueError(f"x: got {tokens} tokens; allowed: at most {shape.tokens}, the tokens of the workspace")
    if given.memory.device != topk_ids.device:
        raise ValueError(f"workspace: got device {given.memory.device}; allowed: {topk_ids.device}, where x is")
    return given


def _shared_workspace(device: torch.device, experts: int, top_k: int, hidden: int, tokens: int) -> Workspace:
    """One per device, E, K and H. Where it is too small a larger one follows; plans in flight keep theirs."""
    key = (device, experts, top_k, hidden)
    found = _shared.get(key)
    if found is None or found.shape.tokens < tokens:
        if torch.cuda.is_current_stream_capturing():
            raise ValueError("workspace: got None while a CUDA graph is captured; allowed: one made before")
        found = Workspace.create(Shape(1, experts, top_k, hidden, ops_plan.round_capacity(tokens)), device=device)
        _shared[key] = found
    return found


def is_shared(workspace: Workspace) -> bool:
    """Whether it is one that calls without a workspace share."""
    return any(workspace is shared for shared in _shared.values())


def shared_bytes() -> int:
    """Bytes of the workspaces that calls without one share."""
    return sum(workspace.layout.bytes for workspace in _shared.values())

"""The fused forward and backward as operators on a Workspace and a DevicePlan. No policy.

Each call is cut where ranks wait for each other, so that one thread can drive several virtual ranks: `begin` on all of
them, then `launch`. A rank that is a process calls `forward` and `backward`. Letters: T tokens of this rank, K experts
per token, L local experts, H hidden size, I expert intermediate size; `capacity`: rows that the plan has room for.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from . import ops
from .ops_comm import dispatch
from .ops_plan import DevicePlan

_BEGIN, _LAUNCH, _BOTH = 0, 1, 2
DP_TILE = 256  # columns of I that one partial sum of dp covers


@dataclass(frozen=True)
class WeightMaps:
    """Tensor maps of one layer's weights, wherever each expert lies. Valid while the weights stay where they are."""

    inter: int  # I
    table: Tensor  # uint8 [4, L, 128] on the device, in the order of the properties

    @classmethod
    def of(cls, fc1: Sequence[Tensor], fc2: Sequence[Tensor]) -> WeightMaps:
        """fc1: L bf16 CUDA tensors [2I, H]; fc2: L of [H, I]. Raises ValueError naming an expert that will not do."""
        table = ops.pinned_bytes(4, len(fc1), ops.MAP_BYTES)
        for number, kind in enumerate((ops.MapKind.WEIGHT, ops.MapKind.WEIGHT_MN)):
            ops.encode_maps(fc1, kind, table[2 * number])
            ops.encode_maps(fc2, kind, table[2 * number + 1])
        return cls(fc2[0].shape[1], table.to(fc1[0].device))

    @property
    def fc1(self) -> Tensor:
        """uint8 [L, 128], and so on."""
        return self.table[0]

    @property
    def fc2(self) -> Tensor:
        return self.table[1]

    @property
    def fc1_mn(self) -> Tensor:
        """For dgrad1."""
        return self.table[2]

    @property
    def fc2_mn(self) -> Tensor:
        """For dgrad2."""
        return self.table[3]


class Scratch(NamedTuple):
    """First byte of each part of the two scratch allocations, and their bytes: csrc/layout/scratch.cuh."""

    pool: int
    act: int
    row_weights: int
    counters: int
    bytes: int
    dp_partials: int
    second_pool: int  # a backward without the gradient of fc1 ends before it
    more_bytes: int


class Schedule(NamedTuple):
    """How a launch works on its products: csrc/schedule/order.cuh. Lags in experts."""

    fc2_lag: int  # behind fc1
    dgrad1_lag: int  # behind dgrad2
    wgrads_lag: int  # behind dgrad2
    forward_waves: int  # of units, one for each cluster
    backward_waves: int

    @classmethod
    def of(cls, local_experts: int, rows: int, inter: int, hidden: int, clusters: int) -> Schedule:
        """rows: of each local expert. clusters: of two SMs each."""
        operator = torch.ops.megamoe.schedule
        return cls(*ops.ask(operator, local_experts, rows, inter, hidden, clusters, answers=len(cls._fields)))


@lru_cache(1024)
def scratch_layout(capacity: int, tokens: int, hidden: int, inter: int) -> Scratch:
    answers = len(Scratch._fields)
    return Scratch(*ops.ask(torch.ops.megamoe.scratch_layout, capacity, tokens, hidden, inter, answers=answers))


def limit_of(clamp: float | None) -> float:
    """The clamp as operators take it."""
    return float("inf") if clamp is None else float(clamp)


class _Call:
    """What the two passes share: the plan, the scratch of both and the launch."""

    def __init__(self, plan: DevicePlan, x_TH: Tensor, weights_TK: Tensor, maps: WeightMaps, clamp, num_sms: int):
        if plan.row_tile != ops.ROW_TILE:
            raise ValueError(
                f"plan: got row_tile {plan.row_tile}; allowed: {ops.ROW_TILE}, experts padded to row tiles"
            )
        if x_TH.shape[0] != plan.tokens:
            raise ValueError(f"x: got {x_TH.shape[0]} tokens; allowed: {plan.tokens}, those of the plan")
        self.plan, self.maps, self.limit, self.num_sms = plan, maps, limit_of(clamp), num_sms
        self.x, self.weights, self.device = x_TH.contiguous(), weights_TK.contiguous(), x_TH.device
        self.hidden = x_TH.shape[1]
        self.layout = scratch_layout(plan.capacity, plan.tokens, self.hidden, maps.inter)
        self.scratch = self._new(self.layout.bytes, dtype=torch.uint8)

    def _new(self, *size: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        return torch.empty(*size, dtype=dtype, device=self.device)  # a tuple takes twice as long to be read

    def _part(self, scratch: Tensor, begin: int, columns: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        """[capacity, columns] of a scratch allocation: for those who look into it. The operators take it whole."""
        rows = self.plan.capacity
        return scratch[begin:].view(dtype)[: rows * columns].view(rows, columns)

    @property
    def pool(self) -> Tensor:
        return self._part(self.scratch, self.layout.pool, self.hidden)

    @property
    def act(self) -> Tensor:
        return self._part(self.scratch, self.layout.act, self.maps.inter)

    @property
    def row_weights(self) -> Tensor:
        return self._part(self.scratch, self.layout.row_weights, 1, torch.float32).flatten()

    def step(self, step: int) -> None:
        raise NotImplementedError

    def begin(self) -> None:
        """Stages what peers pull, and announces."""
        self.step(_BEGIN)

    def launch(self) -> None:
        """The fused kernel."""
        self.step(_LAUNCH)


class ForwardCall(_Call):
    """y [T, H] and h [capacity, 2I] bf16 of x [T, H] bf16 and p [T, K] fp32. Rows of h from M on are unwritten."""

    def __init__(
        self, plan: DevicePlan, x_TH: Tensor, weights_TK: Tensor, maps: WeightMaps, *, clamp: float | None = None,
        num_sms: int = 0,
    ):  # fmt: skip
        super().__init__(plan, x_TH, weights_TK, maps, clamp, num_sms)
        self.y = self._new(plan.tokens, self.hidden)
        self.h = self._new(plan.capacity, 2 * maps.inter)

    def step(self, step: int) -> None:
        torch.ops.megamoe.fused_forward(
            step, self.plan.workspace.handle, *self.plan.arguments, self.x, self.weights, self.maps.table, self.h,
            self.y, self.scratch, self.limit, self.num_sms, ops.raw_stream(self.device),
        )  # fmt: skip


class BackwardCall(_Call):
    """dx [T, H] bf16 and dweights [T, K] fp32 for dy [T, H] bf16; the experts' gradients go where the tables say.

    h, forward's, is spent: its gradient dh takes its place, tile by tile.
    dfc1, dfc2: None computes no gradient of that weight; both in fp32, or both in bf16, which can only be written.
    accumulate1 (of fc1), accumulate2 (of fc2): add or write. ValueError: dtypes differ.
    """

    def __init__(
        self, plan: DevicePlan, dy_TH: Tensor, x_TH: Tensor, h: Tensor, weights_TK: Tensor, maps: WeightMaps,
        dfc1: ops.GradientTable | None, dfc2: ops.GradientTable | None, *, clamp: float | None = None,
        accumulate1: bool = True, accumulate2: bool = True, num_sms: int = 0,
    ):  # fmt: skip
        super().__init__(plan, x_TH, weights_TK, maps, clamp, num_sms)
        self.dy, self.h = dy_TH.contiguous(), h
        self.dfc1, self.dfc2 = (None if table is None else table.table for table in (dfc1, dfc2))
        self.accumulate = accumulate1, accumulate2
        self.in_bf16 = _in_bf16(dfc1, dfc2)
        self.dx = self._new(plan.tokens, self.hidden)
        self.dweights = self._new(plan.tokens, weights_TK.shape[1], dtype=torch.float32)
        more = self.layout.second_pool if dfc1 is None else self.layout.more_bytes
        self.more = self._new(more, dtype=torch.uint8)

    @property
    def dh(self) -> Tensor:
        return self.h

    @property
    def dp_partials(self) -> Tensor:
        return self._part(self.more, self.layout.dp_partials, -(-self.maps.inter // DP_TILE), torch.float32)

    @property
    def second_pool(self) -> Tensor:
        """Only with dfc1."""
        return self._part(self.more, self.layout.second_pool, self.hidden)

    def step(self, step: int) -> None:
        torch.ops.megamoe.fused_backward(
            step, self.plan.workspace.handle, *self.plan.arguments, self.dy, self.x, self.weights, self.h,
            self.maps.table, self.dfc1, self.dfc2, *self.accumulate, self.in_bf16, self.dx, self.dweights,
            self.scratch, self.more, self.limit, self.num_sms, ops.raw_stream(self.device),
        )  # fmt: skip


def _in_bf16(*tables: ops.GradientTable | None) -> bool:
    kinds = {table.in_bf16 for table in tables if table is not None}
    if len(kinds) == 2:
        raise ValueError("gradients: got fp32 of one weight and bf16 of the other; allowed: one dtype")
    return True in kinds


def forward(
    plan: DevicePlan, x_TH: Tensor, weights_TK: Tensor, maps: WeightMaps, *, clamp: float | None = None,
    num_sms: int = 0,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """y [T, H], h [capacity, 2I]: see ForwardCall. Collective. An overflowed plan leaves both unwritten."""
    with plan.workspace.launching():  # the allocations too: peers wait for what follows them
        call = ForwardCall(plan, x_TH, weights_TK, maps, clamp=clamp, num_sms=num_sms)
        call.step(_BOTH)
    return call.y, call.h


def backward(plan: DevicePlan, *tensors, **options) -> tuple[Tensor, Tensor]:
    """dx [T, H], dweights [T, K]: arguments and results of BackwardCall. Collective."""
    with plan.workspace.launching():
        call = BackwardCall(plan, *tensors, **options)
        call.step(_BOTH)
    return call.dx, call.dweights


def fc1_again(plan: DevicePlan, x_TH: Tensor, weights_TK: Tensor, maps: WeightMaps) -> Tensor:
    """h [capacity, 2I] once more, with forward's bits: dispatch of x, then fc1. Collective."""
    with plan.workspace.launching():
        pool, row_weights = dispatch(plan, x_TH, weights_TK, backward=True)
        h = pool.new_empty(plan.capacity, 2 * maps.inter)
        act = pool.new_empty(plan.capacity, maps.inter)
        ops.fc1(pool, maps.fc1, ops.Groups(plan.expert_rows, plan.expert_offset), row_weights, h, act)
    return h

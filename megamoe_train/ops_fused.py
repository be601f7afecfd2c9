"""The fused forward and backward as operators on a Workspace and a DevicePlan. No policy.

Each call is cut where ranks wait for each other, so that one thread can drive several virtual ranks: `begin` on all of
them, then `launch`. A rank that is a process calls `forward` and `backward`. Letters: T tokens of this rank, K experts
per token, L local experts, H hidden size, I expert intermediate size; `capacity`: rows that the plan has room for.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from . import ops
from .experts import StackedExperts
from .ops_comm import dispatch
from .ops_plan import DevicePlan

_BEGIN, _LAUNCH, _BOTH = 0, 1, 2
DP_TILE = 256  # columns of I that one partial sum of dp covers


@dataclass(frozen=True)
class WeightMaps:
    """Tensor maps of one layer's weights, wherever each expert lies. Valid while the weights stay where they are."""

    inter: int  # I
    pointers: tuple[int, ...]  # of fc1, then of fc2
    fc1: Tensor  # uint8 [L, 128] on the device, and so on
    fc2: Tensor
    fc1_mn: Tensor  # for dgrad1
    fc2_mn: Tensor  # for dgrad2

    @classmethod
    def of(cls, fc1: Sequence[Tensor], fc2: Sequence[Tensor]) -> WeightMaps:
        """fc1: L bf16 CUDA tensors [2I, H]; fc2: L of [H, I]. Raises ValueError naming an expert that will not do."""
        kinds = ops.MapKind
        return cls(
            fc2[0].shape[1],
            _pointers(fc1, fc2),
            ops.expert_maps(fc1, kinds.WEIGHT),
            ops.expert_maps(fc2, kinds.WEIGHT),
            ops.expert_maps(fc1, kinds.WEIGHT_MN),
            ops.expert_maps(fc2, kinds.WEIGHT_MN),
        )

    def matches(self, fc1: Sequence[Tensor], fc2: Sequence[Tensor]) -> bool:
        """Whether these weights still lie where the maps say."""
        return self.pointers == _pointers(fc1, fc2)


def _pointers(fc1: Sequence[Tensor], fc2: Sequence[Tensor]) -> tuple[int, ...]:
    return tuple(address for weights in (fc1, fc2) for address in _addresses(weights))


def _addresses(weights: Sequence[Tensor]) -> Iterable[int]:
    if isinstance(weights, StackedExperts):  # by arithmetic: views cost microseconds each, in every call
        return weights.addresses()
    return (weight.data_ptr() for weight in weights)


def _limit(clamp: float | None) -> float:
    return float("inf") if clamp is None else float(clamp)


class _Call:
    """What the two passes share: the plan's tensors and the launch."""

    def __init__(self, plan: DevicePlan, num_sms: int):
        if plan.row_tile != ops.ROW_TILE:
            raise ValueError(
                f"plan: got row_tile {plan.row_tile}; allowed: {ops.ROW_TILE}, experts padded to row tiles"
            )
        self.plan, self.num_sms = plan, num_sms
        self.device = plan.source_of.device
        size = torch.ops.megamoe.fused_counters(plan.capacity, plan.tokens)
        self.counters = self.rows(size, dtype=torch.int32)

    def rows(self, *size: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        return torch.empty(size, dtype=dtype, device=self.device)

    def routing(self) -> tuple[Tensor, ...]:
        plan = self.plan
        return (
            plan.workspace.handle, plan.control, plan.source_of, plan.slot_of, plan.topk_ids, plan.expert_rows,
            plan.expert_offset,
        )  # fmt: skip

    def launch_arguments(self) -> tuple[Tensor, int, int]:
        return self.counters, self.num_sms, ops.raw_stream(self.device)

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
        super().__init__(plan, num_sms)
        hidden, capacity = x_TH.shape[1], plan.capacity
        self.x, self.weights, self.maps, self.limit = x_TH.contiguous(), weights_TK.contiguous(), maps, _limit(clamp)
        self.y = self.rows(plan.tokens, hidden)
        self.h = self.rows(capacity, 2 * maps.inter)
        self.pool = self.rows(capacity, hidden)
        self.act = self.rows(capacity, maps.inter)
        self.row_weights = self.rows(capacity, dtype=torch.float32)

    def step(self, step: int) -> None:
        torch.ops.megamoe.fused_forward(
            step, *self.routing(), self.x, self.weights, self.maps.fc1, self.maps.fc2, self.pool, self.h, self.act,
            self.row_weights, self.y, self.limit, *self.launch_arguments(),
        )  # fmt: skip


class BackwardCall(_Call):
    """dx [T, H] bf16 and dweights [T, K] fp32 for dy [T, H] bf16; the experts' gradients go where the tables say.

    dfc1, dfc2: None computes no gradient of that weight. accumulate1 (of fc1), accumulate2 (of fc2): add or write.
    """

    def __init__(
        self, plan: DevicePlan, dy_TH: Tensor, x_TH: Tensor, h: Tensor, weights_TK: Tensor, maps: WeightMaps,
        dfc1: ops.GradientTable | None, dfc2: ops.GradientTable | None, *, clamp: float | None = None,
        accumulate1: bool = True, accumulate2: bool = True, num_sms: int = 0,
    ):  # fmt: skip
        super().__init__(plan, num_sms)
        hidden, capacity = x_TH.shape[1], plan.capacity
        self.dy, self.x, self.h = dy_TH.contiguous(), x_TH.contiguous(), h
        self.weights, self.maps, self.limit = weights_TK.contiguous(), maps, _limit(clamp)
        self.dfc1, self.dfc2, self.accumulate = dfc1, dfc2, (accumulate1, accumulate2)
        self.dx = self.rows(plan.tokens, hidden)
        self.dweights = self.rows(plan.tokens, weights_TK.shape[1], dtype=torch.float32)
        self.pool = self.rows(capacity, hidden)
        self.second_pool = None if dfc1 is None else self.rows(capacity, hidden)
        self.act = self.rows(capacity, maps.inter)
        self.dh = self.rows(capacity, 2 * maps.inter)
        self.row_weights = self.rows(capacity, dtype=torch.float32)
        self.dp_partials = self.rows(capacity, -(-maps.inter // DP_TILE), dtype=torch.float32)

    def step(self, step: int) -> None:
        gradients = [
            tensor
            for table in (self.dfc1, self.dfc2)
            for tensor in ((None, None) if table is None else (table.maps, table.addresses))
        ]
        torch.ops.megamoe.fused_backward(
            step, *self.routing(), self.dy, self.x, self.weights, self.h, self.maps.fc1_mn, self.maps.fc2_mn,
            *gradients, *self.accumulate, self.pool, self.second_pool, self.act, self.dh, self.row_weights,
            self.dp_partials, self.dx, self.dweights, self.limit, *self.launch_arguments(),
        )  # fmt: skip


def _run(call: _Call) -> None:
    with call.plan.workspace.launching():
        call.step(_BOTH)


def forward(
    plan: DevicePlan, x_TH: Tensor, weights_TK: Tensor, maps: WeightMaps, *, clamp: float | None = None,
    num_sms: int = 0,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """y [T, H], h [capacity, 2I]: see ForwardCall. Collective. An overflowed plan leaves both unwritten."""
    call = ForwardCall(plan, x_TH, weights_TK, maps, clamp=clamp, num_sms=num_sms)
    _run(call)
    return call.y, call.h


def backward(plan: DevicePlan, *tensors, **options) -> tuple[Tensor, Tensor]:
    """dx [T, H], dweights [T, K]: arguments and results of BackwardCall. Collective."""
    call = BackwardCall(plan, *tensors, **options)
    _run(call)
    return call.dx, call.dweights


def fc1_again(plan: DevicePlan, x_TH: Tensor, weights_TK: Tensor, maps: WeightMaps) -> Tensor:
    """h [capacity, 2I] once more, with forward's bits: dispatch of x, then fc1. Collective."""
    pool, row_weights = dispatch(plan, x_TH, weights_TK, backward=True)
    h = pool.new_empty(plan.capacity, 2 * maps.inter)
    act = pool.new_empty(plan.capacity, maps.inter)
    ops.fc1(pool, maps.fc1, ops.Groups(plan.expert_rows, plan.expert_offset), row_weights, h, act)
    return h

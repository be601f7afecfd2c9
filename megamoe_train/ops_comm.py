"""Dispatch and combine as operators on a Workspace and a DevicePlan. Each is cut where ranks wait for each other.

One Python thread that drives several virtual ranks calls one step for all of them before the next step; a rank that is
a process calls the whole (`dispatch`, `combine`). Letters as in plan.py.
"""

from __future__ import annotations

from enum import IntEnum

import torch
from torch import Tensor

from . import ops_plan
from .ops_plan import DevicePlan


class Op(IntEnum):
    """csrc/comm/peers.cuh: enum class Op."""

    DISPATCH = 1
    COMBINE = 2
    DISPATCH_BACKWARD = 3
    COMBINE_BACKWARD = 4
    FORWARD = 5
    BACKWARD = 6


_STAGE, _ANNOUNCE_STAGED, _ANNOUNCE, _PULL, _PUSH, _SUM = range(6)


class Transfer:
    """One dispatch or combine of one rank, step by step: `begin` on every rank, then `move`, then `finish`."""

    def __init__(self, plan: DevicePlan, op: Op, *, buffer: int = 0, num_sms: int = 0, **tensors: Tensor | None):
        self.plan, self.op, self.buffer, self.num_sms, self.tensors = plan, op, buffer, num_sms, tensors
        self.control = torch.empty(4 + self._more_control, dtype=torch.int32, device=plan.ids.device)

    def _step(self, phase: int) -> None:
        plan, get = self.plan, self.tensors.get
        torch.ops.megamoe.rows(
            phase, plan.workspace.handle, int(self.op), self.buffer, plan.tokens, *plan.arguments, get("pool"),
            get("tokens_in"), get("tokens_out"), get("weights"), get("row_weights"), get("dweights"), self.control,
            self.num_sms, ops_plan.stream_of(plan.workspace),
        )  # fmt: skip

    @property
    def _more_control(self) -> int:
        """Ints beside the control block: where a dispatch notes which rows hold the same token of a peer."""
        shape = self.plan.workspace.shape
        return shape.ranks * shape.tokens * shape.top_k if self._dispatches and not self._alone else 0

    @property
    def _alone(self) -> bool:
        return self.plan.workspace.shape.ranks == 1

    @property
    def _dispatches(self) -> bool:
        return self.op in (Op.DISPATCH, Op.DISPATCH_BACKWARD)

    def begin(self) -> None:
        """Stages (dispatch) and announces."""
        if self._dispatches and not self._alone:
            self._step(_STAGE)
        self._step(_ANNOUNCE_STAGED if self._dispatches else _ANNOUNCE)

    def move(self) -> None:
        """Pulls (dispatch) or pushes (combine)."""
        if self._dispatches:
            self._step(_PULL)
        elif not self._alone:
            self._step(_PUSH)

    def finish(self) -> None:
        """Sums (combine)."""
        if not self._dispatches:
            self._step(_SUM)

    def run(self) -> None:
        with self.plan.workspace.guard.watch():
            self.begin()
            self.move()
            self.finish()


def start_dispatch(plan: DevicePlan, x_TH: Tensor, weights_TK: Tensor | None = None, *, buffer: int = 0,
                   backward: bool = False, num_sms: int = 0) -> tuple[Transfer, Tensor, Tensor | None]:  # fmt: skip
    """A dispatch not yet begun, its pool `[capacity, H]` bf16 and row weights `[capacity]` fp32."""
    pool = x_TH.new_empty((plan.capacity, x_TH.shape[1]))
    row_weights = None if weights_TK is None else weights_TK.new_empty(plan.capacity)
    weights = None if weights_TK is None else weights_TK.contiguous()
    op = Op.DISPATCH_BACKWARD if backward else Op.DISPATCH
    tensors = {"pool": pool, "tokens_in": x_TH.contiguous(), "weights": weights, "row_weights": row_weights}
    transfer = Transfer(plan, op, buffer=buffer, num_sms=num_sms, **tensors)
    return transfer, pool, row_weights


def start_combine(plan: DevicePlan, rows_MH: Tensor, row_dweights_M: Tensor | None = None, *, backward: bool = False,
                  num_sms: int = 0) -> tuple[Transfer, Tensor, Tensor | None]:  # fmt: skip
    """A combine not yet begun, its result `[T, H]` bf16 and dp `[T, K]` fp32."""
    y_TH = rows_MH.new_empty((plan.tokens, rows_MH.shape[1]))
    dweights = None
    if row_dweights_M is not None:
        dweights = row_dweights_M.new_empty((plan.tokens, plan.workspace.shape.top_k))
    op = Op.COMBINE_BACKWARD if backward else Op.COMBINE
    tensors = {"pool": rows_MH.contiguous(), "tokens_out": y_TH, "row_weights": row_dweights_M, "dweights": dweights}
    transfer = Transfer(plan, op, num_sms=num_sms, **tensors)
    return transfer, y_TH, dweights


def dispatch(plan: DevicePlan, x_TH: Tensor, weights_TK: Tensor | None = None, **options):
    """Rows of the experts of this rank: `[T,H]` bf16 -> `[capacity,H]`, of which M are written, padding zero.

    With weights `[T,K]` fp32 also each row's own, `[capacity]`. The dual of `combine`. Collective.
    """
    with plan.workspace.launching():
        transfer, pool, row_weights = start_dispatch(plan, x_TH, weights_TK, **options)
        transfer.run()
    return pool, row_weights


def combine(plan: DevicePlan, rows_MH: Tensor, row_dweights_M: Tensor | None = None, **options):
    """The sum of each token's rows, fp32 and k ascending: `[capacity,H]` bf16 -> `[T,H]`. The dual of `dispatch`.

    With a value per row (dp) also `[T,K]` of them, dropped slots zero. Collective.
    """
    with plan.workspace.launching():
        transfer, y_TH, dweights = start_combine(plan, rows_MH, row_dweights_M, **options)
        transfer.run()
    return y_TH, dweights

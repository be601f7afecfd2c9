"""Dispatch and combine around any experts, on the kernels: differentiable in tokens and routing weights.

`Staged` is what a token dispatcher needs of one expert-parallel group on CUDA. Rows reach the experts sorted by expert
and without padding, expert by expert in the order (source rank, token, k). Letters: T tokens of this rank, K top-k, E
experts in all, L local ones, H hidden, M rows of this rank's experts.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import ops, ops_comm, ops_plan
from .fused_plan import room_for
from .launch_order import in_order
from .ops_plan import DevicePlan
from .workspace import Workspace

NO_PADDING = 1  # row tile: experts that somebody else wrote take rows without gaps


class Routing(torch.autograd.Function):
    """`[T,E]` map and probs -> ids `[T,K]` int32 (ascending, then -1), weights `[T,K]`; differentiable in probs."""

    @staticmethod
    def forward(ctx, routing_map_TE: Tensor, probs_TE: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
        ids = torch.empty((len(probs_TE), top_k), dtype=torch.int32, device=probs_TE.device)
        weights = torch.empty((len(probs_TE), top_k), device=probs_TE.device)
        stream = torch.cuda.current_stream(probs_TE.device).cuda_stream
        torch.ops.megamoe.routing(routing_map_TE.contiguous(), probs_TE.contiguous(), ids, weights, stream)
        ctx.save_for_backward(ids)
        ctx.num_experts = probs_TE.shape[1]
        ctx.mark_non_differentiable(ids)
        return ids, weights

    @staticmethod
    @once_differentiable
    def backward(ctx, _, dweights_TK: Tensor):
        (ids,) = ctx.saved_tensors
        dprobs = dweights_TK.new_zeros((len(ids), ctx.num_experts))
        # Dropped slots bring zeros, and a token's experts are distinct: each element gets at most one number.
        return None, dprobs.scatter_add_(1, ids.clamp(min=0).long(), dweights_TK), None


class Dispatch(torch.autograd.Function):
    """x `[T,H]`, weights `[T,K]` -> rows `[M,H]` and their weights `[M]`, already on the way when this is called."""

    @staticmethod
    def forward(ctx, flight: Flight, x_TH: Tensor, weights_TK: Tensor) -> tuple[Tensor, Tensor]:
        ctx.plan, ctx.options = flight.plan, flight.options
        return flight.rows, flight.weights

    @staticmethod
    @once_differentiable
    def backward(ctx, drows_MH: Tensor, dweights_M: Tensor):
        with in_order(drows_MH.device):
            dx, dweights = ops_comm.combine(ctx.plan, drows_MH, dweights_M.contiguous(), backward=True, **ctx.options)
        return None, dx, dweights


class Combine(torch.autograd.Function):
    """Rows `[M,H]` -> y `[T,H]`, each token's plain sum over k ascending, in fp32, rounded once."""

    @staticmethod
    def forward(ctx, flight: Flight, rows_MH: Tensor) -> Tensor:
        ctx.plan, ctx.options = flight.plan, flight.options
        with in_order(rows_MH.device):
            return ops_comm.combine(ctx.plan, rows_MH, **ctx.options)[0]

    @staticmethod
    @once_differentiable
    def backward(ctx, dy_TH: Tensor):
        with in_order(dy_TH.device):
            return None, ops_comm.dispatch(ctx.plan, dy_TH, buffer=1, backward=True, **ctx.options)[0]


@dataclass
class Flight:
    """A dispatch that was launched: its plan, cut to M rows, and what it fills."""

    plan: DevicePlan
    rows: Tensor  # [M, H]
    weights: Tensor  # [M]
    expert_rows: Tensor  # [L] int64 on the host
    options: dict[str, int]  # of every move of rows


class Staged:
    """Dispatch and combine of one group on its workspace. Collective, in backward too."""

    def __init__(self, workspace: Workspace, num_sms: int = 0):
        """num_sms: that move rows over NVLink, 0: all; a dispatch takes as many again for the rank's own rows."""
        ops.load()
        self.workspace, self.options = workspace, {"num_sms": num_sms}

    def route(self, routing_map_TE: Tensor, probs_TE: Tensor) -> tuple[Tensor, Tensor]:
        """Bool map and probs `[T,E]` -> ids `[T,K]` int32, -1 where fewer are kept; weights `[T,K]` fp32, 0 there.

        A token with more than K experts is an error of the plan, on every rank alike.
        """
        return Routing.apply(routing_map_TE, probs_TE.float(), self.workspace.shape.top_k)

    def dispatch(self, x_TH: Tensor, ids_TK: Tensor, weights_TK: Tensor) -> tuple[Flight, Tensor, Tensor]:
        """bf16 x `[T,H]` -> the plan and what else is known of it, rows `[M,H]`, their weights `[M]` fp32.

        The host waits for the plan while the rows travel. Raises ValueError for another dtype or too many tokens, and
        on every rank alike for a bad id.
        """
        if x_TH.dtype != torch.bfloat16:
            allowed = 'torch.bfloat16 on CUDA (any dtype with backend="reference")'
            raise ValueError(f"hidden states: got dtype {x_TH.dtype}; allowed: {allowed}")
        with in_order(x_TH.device):
            flight = self._launch(x_TH.detach(), ids_TK, weights_TK.detach())
        return flight, *Dispatch.apply(flight, x_TH, weights_TK)

    def combine(self, flight: Flight, rows_MH: Tensor) -> Tensor:
        """bf16 rows `[M,H]` of the experts -> y `[T,H]`."""
        return Combine.apply(flight, rows_MH)

    def _launch(self, x_TH: Tensor, ids_TK: Tensor, weights_TK: Tensor) -> Flight:
        workspace = self.workspace
        for attempt in range(2):
            plan = self._plan(ids_TK)
            on_device = plan.expert_rows
            expert_rows = torch.empty(len(on_device), dtype=torch.int32, pin_memory=True)
            expert_rows.copy_(on_device, non_blocking=True)
            counted = torch.cuda.Event()
            counted.record()
            with workspace.launching():
                transfer, rows, weights = ops_comm.start_dispatch(plan, x_TH, weights_TK, **self.options)
                transfer.run()
            try:
                taken = plan.settle()
            except ops_plan.RowOverflow:  # alike on every rank: all have skipped the rows
                if attempt or workspace.sizing == "fixed":
                    raise
                ops_plan.grow(plan)
                continue
            with workspace.guard.watch():
                counted.synchronize()
            workspace.most_rows = max(workspace.most_rows, taken)
            workspace.high_water = room_for(workspace.most_rows)
            plan.capacity = taken
            # Shrunk in place: as views, an experts module could not write into them.
            return Flight(
                plan, rows.resize_(taken, rows.shape[1]), weights.resize_(taken), expert_rows.long(), self.options
            )
        raise AssertionError("a plan of the same ids needs more rows than its counts said")

    def _plan(self, ids_TK: Tensor) -> DevicePlan:
        workspace = self.workspace
        if workspace.sizing == "exact":
            return ops_plan.build_plan(workspace, ids_TK, sizing="exact", row_tile=NO_PADDING)
        workspace.high_water = workspace.high_water or ops_plan.first_capacity(workspace)
        capacity = workspace.capacity if workspace.sizing == "fixed" else workspace.high_water
        return ops_plan.build_plan(workspace, ids_TK, sizing="fixed", capacity=capacity, row_tile=NO_PADDING)

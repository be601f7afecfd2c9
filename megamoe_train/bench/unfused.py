"""The honest unfused layer: grouped GEMMs of torch, NCCL all-to-all, index operations, one pass per elementwise step.

dW is bf16, written once, or (`accumulate`) added to fp32 buffers as training does. Kept for backward: the dispatched x,
h, a, p and the permutation. No dropped slots.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from . import unfused_kernels as kernels
from .layer_load import Routing, Shape, Weights


@dataclass
class Route:
    """Where rows go. N = T*K slots here, M rows at this rank's experts."""

    order: Tensor  # [N] slots by expert
    token_of: Tensor  # [N] token of each, in that order
    row_of: Tensor  # [T, K] place of each slot in that order
    ends: Tensor  # [L] int32, last row + 1 of each local expert
    send: list[int] | None = None  # rows to and from each rank; None with one rank
    receive: list[int] | None = None
    by_expert: Tensor | None = None  # [M] arrived rows (by source, then expert) in the order of experts
    by_source: Tensor | None = None  # the way back


def route(ids: Tensor, shape: Shape, group: dist.ProcessGroup | None) -> Route:
    """With several ranks the host waits once for the counts, as a dispatcher without fused kernels must."""
    flat = ids.flatten()
    order = torch.argsort(flat, stable=True)
    row_of = torch.empty_like(order)
    row_of[order] = torch.arange(order.numel(), device=order.device)
    counts = torch.zeros(shape.experts, dtype=torch.int64, device=ids.device)
    counts.scatter_add_(0, flat, torch.ones_like(flat))
    found = Route(order, order // shape.top_k, row_of.view_as(ids), counts.cumsum(0).int())
    if group is None:
        return found
    arriving = torch.empty_like(counts)
    dist.all_to_all_single(arriving, counts, group=group)
    arriving = arriving.view(shape.ranks, shape.experts_local)  # [source, local expert]
    send, receive = torch.stack([counts.view(shape.ranks, -1).sum(1), arriving.sum(1)]).tolist()
    total = sum(receive)
    # Rows of (source r, expert e) begin, in the order of arrival, where all before them end.
    begins = (arriving.flatten().cumsum(0) - arriving.flatten()).view_as(arriving)
    lengths = arriving.t().flatten()
    before = lengths.cumsum(0) - lengths
    shift = torch.repeat_interleave(begins.t().flatten() - before, lengths, output_size=total)
    found.by_expert = shift + torch.arange(total, device=ids.device)
    found.by_source = torch.empty_like(found.by_expert)
    found.by_source[found.by_expert] = torch.arange(total, device=ids.device)
    found.send, found.receive, found.ends = send, receive, arriving.sum(0).cumsum(0).int()
    return found


@dataclass
class Kept:
    """What backward needs."""

    route: Route
    x: Tensor  # [M, H]
    p: Tensor  # [M] fp32
    h: Tensor  # [M, 2I]
    a: Tensor  # [M, I]


@dataclass
class Unfused:
    """The layer on one rank. grouped_mm: torch._grouped_mm, or another of its signature in tests."""

    shape: Shape
    weights: Weights
    group: dist.ProcessGroup | None
    accumulate: bool = False
    routes: dict[int, Route] | None = None  # given: routes by routing, made before (routing and host sync excluded)
    grouped_mm: Callable[..., Tensor] = torch._grouped_mm

    def to_experts(self, values: Tensor, at: Route) -> Tensor:
        """Rows by expert here -> rows of this rank's experts."""
        if self.group is None:
            return values
        arrived = values.new_empty((sum(at.receive), *values.shape[1:]))
        dist.all_to_all_single(arrived, values, at.receive, at.send, group=self.group)
        return arrived.index_select(0, at.by_expert)

    def to_sources(self, values: Tensor, at: Route) -> Tensor:
        """The way back."""
        if self.group is None:
            return values
        returned = values.new_empty((sum(at.send), *values.shape[1:]))
        leaving = values.index_select(0, at.by_source)
        dist.all_to_all_single(returned, leaving, at.send, at.receive, group=self.group)
        return returned

    def forward(self, inputs: Routing) -> tuple[Tensor, Kept]:
        at = self.routes[id(inputs)] if self.routes else route(inputs.ids, self.shape, self.group)
        x = self.to_experts(inputs.x.index_select(0, at.token_of), at)
        p = self.to_experts(inputs.weights.flatten().index_select(0, at.order), at)
        h = self.grouped_mm(x, self.weights.fc1.mT, offs=at.ends)
        a = kernels.swiglu(h, p, self.shape.clamp)
        y = self.to_sources(self.grouped_mm(a, self.weights.fc2.mT, offs=at.ends), at)
        return kernels.gather_sum(y, at.row_of), Kept(at, x, p, h, a)

    def backward(self, dy: Tensor, kept: Kept) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        """dx `[T, H]`, dp `[T, K]`, dfc1, dfc2 in bf16 (None where they were added to the fp32 gradients)."""
        at = kept.route
        dy_rows = self.to_experts(dy.index_select(0, at.token_of), at)
        da_bar = self.grouped_mm(dy_rows, self.weights.fc2, offs=at.ends)
        dfc2 = self._weight_gradient(dy_rows, kept.a, self.weights.grad2, at)
        dh, dp = kernels.swiglu_backward(da_bar, kept.h, kept.p, self.shape.clamp)
        dx_rows = self.grouped_mm(dh, self.weights.fc1, offs=at.ends)
        dfc1 = self._weight_gradient(dh, kept.x, self.weights.grad1, at)
        dx = kernels.gather_sum(self.to_sources(dx_rows, at), at.row_of)
        return dx, self.to_sources(dp, at)[at.row_of], dfc1, dfc2

    def _weight_gradient(self, out: Tensor, into: Tensor, gradient: Tensor, at: Route) -> Tensor | None:
        found = self.grouped_mm(out.t(), into, offs=at.ends)
        if not self.accumulate:
            return found
        gradient.add_(found)
        return None

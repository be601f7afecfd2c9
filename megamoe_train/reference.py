"""The layer in plain torch, forward and backward written out by hand: the oracle, and the backend without GPUs.

DESIGN section 2 gives the mathematics. Works in any float dtype and over any process group (`None`: one rank).
Matrix products run in the dtype of x; what lies between them (SwiGLU, its derivative, dp, the sum over k) in fp32, or
fp64 for fp64; weight gradients are summed in that same wider type. h, a, [dg;du] and the rows of y and dx are rounded
to the dtype of x, where a fused kernel also has to round them.

Shape suffixes: T tokens, K top-k, H hidden, I expert intermediate, M rows of this rank's experts (see plan.py).
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from . import comm
from .plan import RoutingPlan

Group = dist.ProcessGroup | None


def wide(dtype: torch.dtype) -> torch.dtype:
    """The type in which elementwise work and sums are done for tensors of `dtype`."""
    return torch.float64 if dtype == torch.float64 else torch.float32


# ---- movement of rows ------------------------------------------------------------------------------------------------


def to_owners(values: Tensor, plan: RoutingPlan, group: Group) -> Tensor:
    """`values [N, ...]` of the kept slots, in `plan.send_slots` order -> `[M, ...]` at the experts; padding zero."""
    arrived = comm.exchange(values, plan.send_splits, plan.receive_splits, group)
    rows = values.new_empty((plan.num_rows, *values.shape[1:])).index_copy_(0, plan.receive_rows, arrived)
    return zero_padding(rows, plan)


def to_sources(rows_M: Tensor, plan: RoutingPlan, group: Group) -> Tensor:
    """The way back: `[M, ...]` at the experts -> `[T*K, ...]` at the tokens' ranks; dropped slots zero."""
    leaving = rows_M.index_select(0, plan.receive_rows)
    returned = comm.exchange(leaving, plan.receive_splits, plan.send_splits, group)
    slots = rows_M.new_empty((plan.num_tokens * plan.top_k, *rows_M.shape[1:]))
    if len(plan.send_slots) < len(slots):
        slots.zero_()
    return slots.index_copy_(0, plan.send_slots, returned)


def zero_padding(rows_M: Tensor, plan: RoutingPlan) -> Tensor:
    """Sets the rows that hold no token to zero, in place: `[M, ...]`."""
    for (_, end), next_start in zip(plan.segments, plan.expert_offset[1:].tolist(), strict=True):
        rows_M[end:next_start] = 0
    return rows_M


def dispatch(x_TH: Tensor, plan: RoutingPlan, group: Group) -> Tensor:
    """Every kept slot's token row, at its expert: `[T,H]` -> `[M,H]`, same dtype, padding rows zero. Collective."""
    return to_owners(x_TH.index_select(0, plan.send_slots // plan.top_k), plan, group)


def combine(rows_MH: Tensor, plan: RoutingPlan, group: Group) -> Tensor:
    """The dual of `dispatch`: `[M,H]` -> `[T,H]`, a sum over k ascending in fp32 (fp64), rounded once. Collective."""
    slots_TKH = to_sources(rows_MH, plan, group).view(plan.num_tokens, plan.top_k, rows_MH.shape[1])
    y_TH = slots_TKH[:, 0].to(wide(rows_MH.dtype), copy=True)
    for k in range(1, plan.top_k):
        y_TH += slots_TKH[:, k]
    return y_TH.to(rows_MH.dtype)


def dispatch_weights(weights_TK: Tensor, plan: RoutingPlan, group: Group) -> Tensor:
    """Each kept slot's own value at its expert: `[T,K]` -> `[M]`, same dtype, padding zero. Collective."""
    return to_owners(weights_TK.reshape(-1).index_select(0, plan.send_slots), plan, group)


def combine_weights(values_M: Tensor, plan: RoutingPlan, group: Group) -> Tensor:
    """The dual of `dispatch_weights`: `[M]` -> `[T,K]`, dropped slots zero. Collective."""
    return to_sources(values_M, plan, group).view(plan.num_tokens, plan.top_k)


# ---- arithmetic of one expert ----------------------------------------------------------------------------------------


def clamp_gate(g: Tensor, clamp: float | None) -> Tensor:
    """min(g, clamp); NaN stays NaN."""
    return g if clamp is None else g.clamp(max=clamp)


def clamp_up(u: Tensor, clamp: float | None) -> Tensor:
    """u limited to [-clamp, clamp]; NaN stays NaN."""
    return u if clamp is None else u.clamp(-clamp, clamp)


def swiglu(h_2I: Tensor, clamp: float | None) -> Tensor:
    """silu(g') * u' of the rounded h, in the wide type: `[n, 2I]` -> `[n, I]`."""
    g, u = h_2I.to(wide(h_2I.dtype)).chunk(2, dim=-1)
    return F.silu(clamp_gate(g, clamp)) * clamp_up(u, clamp)


def weigh(act_I: Tensor, p: Tensor, dtype: torch.dtype) -> Tensor:
    """a = p * silu(g') * u', rounded: the routing weight goes on before fc2. `[n, I]`, `[n]` -> `[n, I]`."""
    return (act_I * p[:, None]).to(dtype)


def swiglu_backward(da_I: Tensor, h_2I: Tensor, clamp: float | None) -> Tensor:
    """[dg;du] from da = p * da_bar (wide): `[n, I]`, `[n, 2I]` -> `[n, 2I]`, rounded to the dtype of h.

    The masks [g <= c] and [|u| <= c] are written as "not beyond", so that a NaN in h shows in its gradient.
    """
    g, u = h_2I.to(da_I.dtype).chunk(2, dim=-1)
    gate = clamp_gate(g, clamp)
    sigmoid = torch.sigmoid(gate)
    dg = da_I * clamp_up(u, clamp) * (sigmoid * (1 + gate * (1 - sigmoid)))
    du = da_I * F.silu(gate)
    if clamp is not None:
        dg.masked_fill_(g > clamp, 0)
        du.masked_fill_(u.abs() > clamp, 0)
    return torch.cat([dg, du], dim=-1).to(h_2I.dtype)


def fc1_forward(x_MH: Tensor, plan: RoutingPlan, fc1: list[Tensor]) -> Tensor:
    """h = x fc1^T, rounded: `[M,H]` -> `[M,2I]`, padding zero."""
    h_M2I = zero_padding(x_MH.new_empty((plan.num_rows, fc1[0].shape[0])), plan)
    for (start, end), weight in zip(plan.segments, fc1, strict=True):
        if end > start:
            torch.mm(x_MH[start:end], weight.t(), out=h_M2I[start:end])
    return h_M2I


# ---- the layer -------------------------------------------------------------------------------------------------------


class Need(NamedTuple):
    """Which gradients backward computes. The same on every rank of the group: it decides which rows travel."""

    x: bool = True
    weights: bool = True
    fc1: bool = True
    fc2: bool = True


EVERY_GRADIENT = Need()


class Grads(NamedTuple):
    """What backward returns; None where `Need` said no. Weight gradients are per local expert, in the
    dtype of the buffers given, else fp32 (fp64 for fp64)."""

    dx: Tensor | None  # [T, H], dtype of x
    dweights: Tensor | None  # [T, K], fp32 (fp64 for fp64); dropped slots zero
    dfc1: list[Tensor | None] | None  # L of [2I, H]
    dfc2: list[Tensor | None] | None  # L of [H, I]


def _plain(function):
    """Runs without autograd and outside autocast: the dtypes are the arguments' own."""

    @functools.wraps(function)
    def call(x: Tensor, *args, **kwargs):
        with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
            return function(x, *args, **kwargs)

    return call


@_plain
def forward(
    x: Tensor,
    plan: RoutingPlan,
    weights: Tensor,
    fc1: list[Tensor],
    fc2: list[Tensor],
    *,
    clamp: float | None,
    group: Group,
) -> tuple[Tensor, Tensor]:
    """x `[T,H]`, weights `[T,K]`, fc1 L of `[2I,H]`, fc2 L of `[H,I]` -> y `[T,H]`, h `[M,2I]`. Collective."""
    p_M = dispatch_weights(weights.to(wide(x.dtype)), plan, group)
    h_M2I = fc1_forward(dispatch(x, plan, group), plan, fc1)
    y_MH = x.new_empty((plan.num_rows, x.shape[1]))  # combine reads the rows that hold a token only
    for (start, end), weight in zip(plan.segments, fc2, strict=True):
        if end > start:
            a = weigh(swiglu(h_M2I[start:end], clamp), p_M[start:end], x.dtype)
            torch.mm(a, weight.t(), out=y_MH[start:end])
    return combine(y_MH, plan, group), h_M2I


@_plain
def backward(
    dy: Tensor,
    x: Tensor,
    h: Tensor | None,
    plan: RoutingPlan,
    weights: Tensor,
    fc1: list[Tensor],
    fc2: list[Tensor],
    *,
    clamp: float | None,
    group: Group,
    need: Need = EVERY_GRADIENT,
    dfc1: list[Tensor | None] | None = None,
    dfc2: list[Tensor | None] | None = None,
    overwrite: tuple[bool, bool] = (False, False),
) -> Grads:
    """Gradients for dy `[T,H]`. Collective: every rank calls it once for every forward, with the same `need`.

    h: what forward returned, or None to compute it again (the same bits). dfc1, dfc2: buffers of the wide type, one
    per local expert, that are added to (None in a list: no gradient for that expert); else fresh ones are returned.
    overwrite: the buffers of dfc1, of dfc2 hold nothing yet and are written instead.
    """
    for buffers, nothing_yet in zip((dfc1, dfc2), overwrite, strict=True):
        for buffer in buffers if nothing_yet and buffers else ():
            if buffer is not None:
                buffer.zero_()
    if need.fc1:
        dfc1 = _zeros_like(fc1) if dfc1 is None else dfc1
    if need.fc2:
        dfc2 = _zeros_like(fc2) if dfc2 is None else dfc2
    p_M = dispatch_weights(weights.to(wide(x.dtype)), plan, group)
    dy_MH = dispatch(dy.to(x.dtype), plan, group)
    x_MH = dispatch(x, plan, group) if need.fc1 or h is None else None
    h = fc1_forward(x_MH, plan, fc1) if h is None else h
    dp_M = torch.empty_like(p_M)
    dx_MH = torch.empty_like(dy_MH) if need.x else None
    for e, (start, end) in enumerate(plan.segments):
        if start == end:
            continue
        rows = slice(start, end)
        act = swiglu(h[rows], clamp)
        da_bar = torch.mm(dy_MH[rows], fc2[e]).to(act.dtype)
        dp_M[rows] = (da_bar * act).sum(-1)
        if need.fc2:
            add_outer(dfc2[e], dy_MH[rows], weigh(act, p_M[rows], x.dtype))
        if need.x or need.fc1:
            dh = swiglu_backward(da_bar * p_M[rows, None], h[rows], clamp)
        if need.x:
            torch.mm(dh, fc1[e], out=dx_MH[rows])
        if need.fc1:
            add_outer(dfc1[e], dh, x_MH[rows])
    return Grads(
        dx=combine(dx_MH, plan, group) if need.x else None,
        dweights=combine_weights(dp_M, plan, group) if need.weights else None,
        dfc1=dfc1 if need.fc1 else None,
        dfc2=dfc2 if need.fc2 else None,
    )


def add_outer(buffer: Tensor | None, left: Tensor, right: Tensor) -> None:
    """buffer += left^T right over the rows, in the buffer's (wide) type: `[n, a]`, `[n, b]` -> `[a, b]`."""
    if buffer is not None:
        buffer.addmm_(left.t().to(buffer.dtype), right.to(buffer.dtype))


def _zeros_like(weights: list[Tensor]) -> list[Tensor]:
    return [torch.zeros_like(weight, dtype=wide(weight.dtype)) for weight in weights]

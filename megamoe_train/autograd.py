"""What autograd keeps and what it runs: the one Function of the fused call, and the two halves of the staged one.

Kept for backward: x, the weights p, h (unless it is recomputed), the experts' weights and the plan. Never the
dispatched x, never a, never fc2's output. Every rank of the group must call backward once for every forward.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import plain, reference
from .backends import Backend, Plan
from .experts import StackedExperts, per_expert
from .plan import RoutingPlan


class WeightGradSink(Protocol):
    """Who receives the gradient of an expert weight (a `[2I,H]` or `[H,I]` tensor, or a whole `[L,...]` stack)."""

    def buffer(self, weight: Tensor) -> Tensor | None:
        """A buffer of weight's shape, fp32 (fp64 for fp64), that backward adds to; None: compute a fresh gradient."""

    def finish(self, weight: Tensor, grad: Tensor | None) -> Tensor | None:
        """What backward returns to autograd for `weight`; `grad` is the fresh gradient in its dtype or wider, None if
        a buffer took it."""


class ReturnGrads:
    """The default sink: gradients go back to autograd in the weight's dtype."""

    def buffer(self, weight: Tensor) -> Tensor | None:
        return None

    def finish(self, weight: Tensor, grad: Tensor | None) -> Tensor | None:
        return None if grad is None else grad.to(weight.dtype)


@dataclass(slots=True)
class Call:
    """Everything of one call that is no differentiable input."""

    backend: Backend
    plan: Plan
    group: dist.ProcessGroup | None
    clamp: float | None
    recompute: str | None  # None | "fc1"
    sink: WeightGradSink
    need: reference.Need
    num_fc1: int  # tensors that hold fc1: 1 (a stack [L,2I,H]) or L; the rest hold fc2
    layer: plain.Layer | None = None  # of a forward that was launched by one operator


def apply(call: Call, x: Tensor, weights: Tensor, fc1: tuple[Tensor, ...], fc2: tuple[Tensor, ...]) -> Tensor:
    """y, differentiable where gradients are recorded. The launch comes first: peers and the GPU wait for it, and
    nobody waits for autograd's part."""
    with torch.no_grad():
        experts = per_expert(fc1), per_expert(fc2)
        done = call.backend.forward(x, call.plan, weights, *experts, clamp=call.clamp, group=call.group)
    return record(call, done, x, weights, fc1, fc2)


def record(
    call: Call, done: tuple[Tensor, Tensor], x: Tensor, weights: Tensor, fc1: tuple[Tensor, ...],
    fc2: tuple[Tensor, ...],
) -> Tensor:  # fmt: skip
    """y of `done`, (y, h), differentiable where gradients are recorded."""
    return MoE.apply(call, done, x, weights, *fc1, *fc2) if torch.is_grad_enabled() else done[0]


class MoE(torch.autograd.Function):
    """y = sum over k of fc2[e] (p * swiglu(fc1[e] x)). Inputs: Call, (y, h) of its forward, x, weights, fc1 tensors,
    fc2 tensors."""

    @staticmethod
    def forward(ctx, call: Call, done: tuple[Tensor, Tensor], x: Tensor, weights: Tensor, *experts: Tensor) -> Tensor:
        y, h = done
        ctx.call, ctx.spent = call, False
        # The sink knows a parameter by identity (main_grad hangs on it); saved-tensor hooks may hand back a copy.
        ctx.experts = experts
        ctx.save_for_backward(x, weights, None if call.recompute else h, *experts)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy: Tensor):
        call: Call = ctx.call
        if ctx.spent and call.backend.backward_once:
            raise RuntimeError(
                f"megamoe: backward of this forward has run already, and the {call.backend.name} backend runs it once: "
                "every rank of the group must call it as often. Call forward again"
            )
        ctx.spent = True
        x, weights, h, *experts = ctx.saved_tensors
        _, _, wants_x, wants_weights, *wanted = ctx.needs_input_grad
        given = [call.sink.buffer(w) if want else None for w, want in zip(ctx.experts, wanted, strict=True)]
        if call.layer is not None:
            done = plain.backward(call.layer, call.plan, dy, x, h, weights, experts, given)
            if done is not None:
                dx, dweights = done[0] if wants_x else None, done[1] if wants_weights else None
                return None, None, dx, dweights, *[call.sink.finish(weight, None) for weight in ctx.experts]
        n = call.num_fc1
        narrow = call.backend.writes_bf16 and all(buffer is None for buffer in given)
        first, overwrite1 = _buffers(call.sink, ctx.experts[:n], wanted[:n], given[:n], narrow)
        second, overwrite2 = _buffers(call.sink, ctx.experts[n:], wanted[n:], given[n:], narrow)
        grads = call.backend.backward(
            dy, x, h, call.plan, weights, per_expert(experts[:n]), per_expert(experts[n:]),
            clamp=call.clamp, group=call.group, need=call.need,
            dfc1=_targets(ctx.experts[:n], first), dfc2=_targets(ctx.experts[n:], second),
            overwrite=(overwrite1, overwrite2),
        )  # fmt: skip
        dx = grads.dx if wants_x else None
        dweights = grads.dweights if wants_weights else None
        if dweights is not None and dweights.dtype != weights.dtype:
            dweights = dweights.to(weights.dtype)
        return None, None, dx, dweights, *[None if b is None else b.finish() for b in first + second]


class _Buffer:
    """The tensor one weight's gradient goes to: the sink's, which is added to, or a fresh one."""

    def __init__(self, sink: WeightGradSink, weight: Tensor, given: Tensor | None):
        self.sink, self.weight, self.given = sink, weight, given
        self.fresh: Tensor | None = None

    def make(self, fill: Callable[..., Tensor], narrow: bool) -> None:
        if self.given is None:
            dtype = self.weight.dtype if narrow else reference.wide(self.weight.dtype)
            self.fresh = fill(self.weight, dtype=dtype, memory_format=torch.contiguous_format)

    @property
    def tensor(self) -> Tensor:
        return self.fresh if self.given is None else self.given

    def finish(self) -> Tensor | None:
        return self.sink.finish(self.weight, self.fresh)


def _buffers(
    sink: WeightGradSink, weights: tuple[Tensor, ...], wanted: list[bool], given: list[Tensor | None], narrow: bool
) -> tuple[list[_Buffer | None], bool]:
    """Buffers of fc1 or of fc2, None where no gradient is wanted; and whether none of them is the sink's.

    Then backward writes instead of adding. Else fresh ones are zero. `narrow`: fresh ones in the weights' dtype.
    """
    buffers = [
        _Buffer(sink, weight, place) if want else None
        for weight, want, place in zip(weights, wanted, given, strict=True)
    ]
    nothing_yet = all(buffer is None or buffer.given is None for buffer in buffers)
    fill = torch.empty_like if nothing_yet else torch.zeros_like
    for buffer in buffers:
        if buffer is not None:
            buffer.make(fill, narrow)
    return buffers, nothing_yet


def _targets(weights: tuple[Tensor, ...], buffers: list[_Buffer | None]) -> Sequence[Tensor | None]:
    """One buffer (or None) per local expert, for weights given as one stack or one tensor an expert."""
    if weights[0].dim() == 2:
        return [None if buffer is None else buffer.tensor for buffer in buffers]
    (buffer,) = buffers
    return [None] * weights[0].shape[0] if buffer is None else StackedExperts(buffer.tensor)


class _Move(torch.autograd.Function):
    """A linear move of rows whose gradient is its dual move."""

    @staticmethod
    def forward(ctx, move, dual, values: Tensor, plan: RoutingPlan, group) -> Tensor:
        ctx.dual, ctx.plan, ctx.group = dual, plan, group
        return move(values, plan, group)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        return None, None, ctx.dual(grad, ctx.plan, ctx.group), None, None


def dispatch(x_TH: Tensor, plan: RoutingPlan, group: dist.ProcessGroup | None) -> Tensor:
    """`[T,H]` -> `[M,H]`, differentiable; padding rows zero. Collective, in backward too."""
    return _Move.apply(reference.dispatch, reference.combine, x_TH, plan, group)


def combine(rows_MH: Tensor, plan: RoutingPlan, group: dist.ProcessGroup | None) -> Tensor:
    """`[M,H]` -> `[T,H]`, the plain sum over k, differentiable. Collective, in backward too."""
    return _Move.apply(reference.combine, reference.dispatch, rows_MH, plan, group)


def dispatch_weights(weights_TK: Tensor, plan: RoutingPlan, group: dist.ProcessGroup | None) -> Tensor:
    """`[T,K]` -> `[M]`, differentiable; padding zero. Collective, in backward too."""
    return _Move.apply(reference.dispatch_weights, reference.combine_weights, weights_TK, plan, group)

"""The public function: one MoE layer's experts, from routed ids to the combined output."""

from __future__ import annotations

from collections.abc import Sequence

import torch.distributed as dist
from torch import Tensor

from . import autograd, backends, checks, comm, plain
from .config import RECOMPUTE, check_choice, check_clamp


def moe(
    x: Tensor,
    topk_ids: Tensor,
    topk_weights: Tensor,
    fc1: Tensor | Sequence[Tensor],
    fc2: Tensor | Sequence[Tensor],
    *,
    clamp: float | None = None,
    group: dist.ProcessGroup | None = None,
    workspace: object | None = None,
    backend: str = "auto",
    plan: backends.Plan | None = None,
    recompute: str | None = None,
    wgrad_sink: autograd.WeightGradSink | None = None,
) -> Tensor:
    """y_t = sum over k of fc2[e] (p * silu(min(g, c)) * clamp(u, -c, c)), [g;u] = fc1[e] x_t, for e = topk_ids[t,k].

    Args:
        x: `[T, H]` bf16, fp16, fp32 or fp64. T may differ between ranks, and may be 0.
        topk_ids: `[T, K]` int, global expert numbers; -1 = dropped. Expert e lives on rank e // L.
        topk_weights: `[T, K]` p, in fp32 (fp64 for fp64) or the dtype of x.
        fc1: `[L, 2I, H]` or L tensors `[2I, H]` of this rank's experts (gate rows first), dtype of x, any strides.
        fc2: `[L, H, I]` or L tensors `[H, I]`.
        clamp: SwiGLU clamp c (DeepSeek-V4: 10); None = off.
        group: the expert-parallel group; None = one rank.
        workspace: the group's `Workspace` for the fused backend, made once by all ranks together; None with one rank:
            one that such calls share. The reference takes none.
        backend: "auto" | "fused" | "reference" (see backends.py).
        plan: the plan of these topk_ids (and this workspace) if the caller has it already, of either backend.
        recompute: "fc1" keeps no h for backward but dispatches x and runs fc1 again, with the same bits.
        wgrad_sink: takes the experts' weight gradients instead of autograd (see autograd.WeightGradSink).

    Returns:
        y `[T, H]`, dtype of x. Differentiable once in x, topk_weights, fc1, fc2.

    Collective over `group`, in backward too: every rank calls moe in the same order, and backward for every forward.

    Raises:
        ValueError: an argument is not allowed, or differs between ranks where it may not (then on every rank).
        backends.BackendUnavailable: the backend cannot run on these tensors here.
        watchdog.MegaMoETimeout: a rank has not come, or has failed (fused). The process has to be restarted.
    """
    if recompute in RECOMPUTE and backend in ("auto", "fused"):
        # All that follows in one step, where it is what this layer did before.
        found = plain.forward(x, topk_ids, topk_weights, fc1, fc2, clamp, group, workspace, plan)
        layer, plan, done = (None, plan, None) if found is None else found
        if done is not None:
            chosen = backends.get("fused")
            fc1, fc2 = checks.as_tuple("fc1", fc1), checks.as_tuple("fc2", fc2)
            need, sink = chosen.need(x, topk_weights, fc1, fc2), _sink(wgrad_sink)
            call = autograd.Call(chosen, plan, group, clamp, recompute, sink, need, len(fc1), layer)
            return autograd.record(call, done, x, topk_weights, fc1, fc2)
    check_clamp(clamp)
    check_choice("recompute", recompute, RECOMPUTE)
    fc1, fc2 = checks.as_tuple("fc1", fc1), checks.as_tuple("fc2", fc2)
    checks.check_call(x, topk_ids, topk_weights, fc1, fc2)
    chosen = backends.get(backends.resolve(backend, x))
    chosen.check(x, topk_ids, topk_weights, fc1, fc2, clamp=clamp)
    num_experts = checks.num_experts_of(fc1) * comm.size_of(group)
    where = topk_ids, num_experts, group, workspace
    if plan is None:
        plan = chosen.plan(*where, hidden_size=x.shape[1])
    else:
        _check_plan(plan, topk_ids, num_experts, group)
        plan = chosen.accept(plan, *where, hidden_size=x.shape[1])
    need = chosen.need(x, topk_weights, fc1, fc2, clamp=clamp, recompute=recompute, group=group)
    call = autograd.Call(chosen, plan, group, clamp, recompute, _sink(wgrad_sink), need, num_fc1=len(fc1))
    return autograd.apply(call, x, topk_weights, fc1, fc2)


def _sink(given: autograd.WeightGradSink | None) -> autograd.WeightGradSink:
    return autograd.ReturnGrads() if given is None else given


def _check_plan(plan: backends.Plan, topk_ids: Tensor, num_experts: int, group: dist.ProcessGroup | None) -> None:
    """A given plan must be one of this call's shape; whose routing it is, the caller knows."""
    got = (plan.rank, plan.ep_size, plan.num_experts, plan.num_tokens, plan.top_k)
    want = (comm.rank_in(group), comm.size_of(group), num_experts, *topk_ids.shape)
    for field, mine, theirs in zip(("rank", "ep_size", "num_experts", "num_tokens", "top_k"), got, want, strict=True):
        if mine != theirs:
            raise ValueError(f"plan: got {field} = {mine}; allowed: {theirs}, that of this call")
    if plan.topk_ids.device != topk_ids.device:
        raise ValueError(f"plan: got device {plan.topk_ids.device}; allowed: {topk_ids.device}, where topk_ids is")

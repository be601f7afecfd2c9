"""The same hooks with the same routing: Megatron's alltoall dispatcher (fused permute) beside ours, staged.

Experts are the identity; the gradients of tokens and probs are asked for, as training does. Host waits count.
"""

from __future__ import annotations

import statistics

import torch
import torch.distributed as dist

from . import ranks

OURS, THEIRS, PLAIN = "ours, {} SMs", "alltoall, fused permute", "alltoall"
BLOCK = 5  # calls back to back


def dispatchers(bench) -> dict:
    """Name -> dispatcher. Without TransformerEngine the alltoall column has no fused permute, and is named so."""
    from megatron.core import parallel_state
    from megatron.core.transformer.moe.moe_utils import get_default_pg_collection
    from megatron.core.transformer.moe.token_dispatcher import MoEAlltoAllTokenDispatcher

    from ..megatron.dispatcher import MegaMoETokenDispatcher
    from ..staged import Staged

    ranks.join_alone()
    if not parallel_state.model_parallel_is_initialized():
        parallel_state.initialize_model_parallel(expert_model_parallel_size=bench.size)
    groups = get_default_pg_collection()
    local = bench.case.experts // bench.size
    indices = [bench.rank * local + i for i in range(local)]
    fused = _has_fused_permute()
    config = _config(bench, fused)
    found = {THEIRS if fused else PLAIN: MoEAlltoAllTokenDispatcher(local, indices, config, groups)}
    for sms in sorted({bench.case.sms, 0}, reverse=True):
        ours = found[OURS.format(sms or "all")] = MegaMoETokenDispatcher(local, indices, config, groups)
        ours.staged = Staged(bench.workspace, num_sms=sms)
    bench.workspace.high_water = 0
    return found


def _has_fused_permute() -> bool:
    try:
        from megatron.core.extensions.transformer_engine import fused_permute
    except ImportError:
        return False
    return fused_permute is not None


def _config(bench, fused: bool):
    from megatron.core.transformer.transformer_config import TransformerConfig

    case = bench.case
    return TransformerConfig(
        num_layers=1, hidden_size=case.hidden, num_attention_heads=case.hidden // 128, num_moe_experts=case.experts,
        moe_router_topk=case.top_k, moe_token_dispatcher_type="alltoall", moe_permute_fusion=fused,
        expert_model_parallel_size=bench.size, add_bias_linear=False, bf16=True, params_dtype=torch.bfloat16,
        moe_router_dtype="fp32",
    )  # fmt: skip


def forward(dispatcher, x, routing_map, probs):
    rows, weights = dispatcher.token_dispatch(*dispatcher.dispatch_preprocess(x, routing_map, probs))
    rows, _, weights = dispatcher.dispatch_postprocess(rows, weights)
    y = dispatcher.combine_postprocess(dispatcher.token_combine(dispatcher.combine_preprocess(rows)))
    return y, weights


class Inputs:
    """Fresh leaves of the same tokens, routing and gradients for every call."""

    def __init__(self, bench):
        case = bench.case
        self.routing_map = torch.zeros(case.tokens, case.experts, dtype=torch.bool, device="cuda")
        self.routing_map.scatter_(1, bench.ids.long(), True)
        self.probs = torch.rand(case.tokens, case.experts, device="cuda") * self.routing_map
        self.x = bench.x.view(case.tokens, 1, case.hidden)
        self.dy = torch.randn_like(self.x)

    def step(self, dispatcher, between=None) -> list[torch.Tensor]:
        """Forward and backward: y, dx, dprobs. between: called after forward."""
        x, probs = self.x.detach().requires_grad_(), self.probs.detach().requires_grad_()
        y, weights = forward(dispatcher, x, self.routing_map, probs)
        if between is not None:
            between()
        torch.autograd.backward([y, weights], [self.dy, weights.detach()])
        return [y.detach(), x.grad, probs.grad]


def align(bench) -> None:
    torch.cuda.synchronize()
    if bench.size > 1:
        dist.barrier()
        torch.cuda.synchronize()


def paced(bench, found: dict, inputs: Inputs, iterations: int) -> dict[str, list[float]]:
    """Each call from an idle GPU: launches and host waits show in full."""
    spans = {f"{name}, {way}, paced": [] for name in found for way in ("forward", "backward")}
    for iteration in range(iterations + 3):
        for name in list(found)[:: 1 if iteration % 2 else -1]:
            marks = [torch.cuda.Event(enable_timing=True) for _ in range(3)]
            align(bench)
            marks[0].record()
            inputs.step(found[name], marks[1].record)
            marks[2].record()
            torch.cuda.synchronize()
            if iteration >= 3:
                spans[f"{name}, forward, paced"].append(marks[0].elapsed_time(marks[1]))
                spans[f"{name}, backward, paced"].append(marks[1].elapsed_time(marks[2]))
    return spans


def sustained(bench, found: dict, inputs: Inputs, iterations: int) -> dict[str, list[float]]:
    """Blocks of calls back to back: launches hide behind the work before."""
    spans = {f"{name}, both, sustained": [] for name in found}
    for block in range(max(4, iterations // BLOCK)):
        for name in list(found)[:: 1 if block % 2 else -1]:
            align(bench)
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            for _ in range(BLOCK):
                inputs.step(found[name])
            end.record()
            torch.cuda.synchronize()
            spans[f"{name}, both, sustained"].append(start.elapsed_time(end) / BLOCK)
    return spans


def measure(bench, iterations: int) -> dict[str, float]:
    """Milliseconds of dispatch + combine, forward and backward, alternating. AssertionError where results differ."""
    found, inputs = dispatchers(bench), Inputs(bench)
    results = [inputs.step(dispatcher) for dispatcher in found.values()]
    for other in results[1:]:
        for got, want in zip(other, results[0], strict=True):
            torch.testing.assert_close(got.float(), want.float(), rtol=2e-2, atol=2e-2)
    spans = paced(bench, found, inputs, iterations) | sustained(bench, found, inputs, iterations)
    medians = torch.tensor([statistics.median(times) for times in spans.values()], device="cuda")
    if ranks.group() is not None:
        dist.all_reduce(medians, dist.ReduceOp.MAX)
    out = dict(zip(spans, medians.tolist(), strict=True))
    theirs, *ours = found
    for name in ours:
        both = [sum(out[f"{who}, {way}, paced"] for way in ("forward", "backward")) for who in (theirs, name)]
        out[f"{name}: times faster, paced"] = both[0] / both[1]
        out[f"{name}: times faster, sustained"] = out[f"{theirs}, both, sustained"] / out[f"{name}, both, sustained"]
    return out

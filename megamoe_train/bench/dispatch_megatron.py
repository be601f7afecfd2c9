"""The same hooks with the same routing: Megatron's alltoall dispatcher (fused permute) beside ours, staged.

Experts are the identity; the gradients of tokens and probs are asked for, as training does. Host waits count.
"""

from __future__ import annotations

import statistics
import time

import torch
import torch.distributed as dist

from . import ranks

OURS, THEIRS, PLAIN = "ours", "alltoall, fused permute", "alltoall"


def dispatchers(bench) -> dict:
    """Name -> dispatcher. Without TransformerEngine the alltoall column has no fused permute, and is named so."""
    from megatron.core import parallel_state
    from megatron.core.transformer.moe.moe_utils import get_default_pg_collection
    from megatron.core.transformer.moe.token_dispatcher import MoEAlltoAllTokenDispatcher

    from ..megatron.dispatcher import MegaMoETokenDispatcher
    from ..staged import Staged

    if not parallel_state.model_parallel_is_initialized():
        parallel_state.initialize_model_parallel(expert_model_parallel_size=bench.size)
    groups = get_default_pg_collection()
    local = bench.case.experts // bench.size
    indices = [bench.rank * local + i for i in range(local)]
    fused = _has_fused_permute()
    found = {
        THEIRS if fused else PLAIN: MoEAlltoAllTokenDispatcher(local, indices, _config(bench, fused), groups),
        OURS: MegaMoETokenDispatcher(local, indices, _config(bench, fused), groups),
    }
    bench.workspace.high_water = 0
    found[OURS].staged = Staged(bench.workspace, num_sms=bench.case.sms)
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


def measure(bench, iterations: int) -> dict[str, float]:
    """Milliseconds of dispatch + combine, forward and backward, alternating; and whether both agree."""
    case = bench.case
    routing_map = torch.zeros(case.tokens, case.experts, dtype=torch.bool, device="cuda")
    routing_map.scatter_(1, bench.ids.long(), True)
    probs = torch.rand(case.tokens, case.experts, device="cuda") * routing_map
    x = bench.x.view(case.tokens, 1, case.hidden)
    dy = torch.randn_like(x)
    found = dispatchers(bench)
    spans = {(name, way): [] for name in found for way in ("forward", "backward")}
    seen = {}
    for iteration in range(iterations + 3):
        names = list(found) if iteration % 2 else list(found)[::-1]
        for name in names:
            a, b = x.detach().clone().requires_grad_(), probs.clone().requires_grad_()
            marks = [torch.cuda.Event(enable_timing=True) for _ in range(3)]
            torch.cuda.synchronize()
            time.sleep(0.002)
            if bench.size > 1:
                dist.barrier()
                torch.cuda.synchronize()
            marks[0].record()
            y, weights = forward(found[name], a, routing_map, b)
            marks[1].record()
            torch.autograd.backward([y, weights], [dy, weights.detach()])
            marks[2].record()
            torch.cuda.synchronize()
            seen[name] = [y.detach(), a.grad, b.grad]
            del y, weights
            if iteration >= 3:
                spans[name, "forward"].append(marks[0].elapsed_time(marks[1]))
                spans[name, "backward"].append(marks[1].elapsed_time(marks[2]))
    theirs, ours = seen.values()
    for got, want in zip(ours, theirs, strict=True):
        torch.testing.assert_close(got.float(), want.float(), rtol=2e-2, atol=2e-2)
    medians = torch.tensor([statistics.median(times) for times in spans.values()], device="cuda")
    if ranks.group() is not None:
        dist.all_reduce(medians, dist.ReduceOp.MAX)
    out = {f"{name}, {way}": ms for (name, way), ms in zip(spans, medians.tolist(), strict=True)}
    first, second = (sum(out[f"{name}, {way}"] for way in ("forward", "backward")) for name in found)
    return out | {"times faster than alltoall": first / second}

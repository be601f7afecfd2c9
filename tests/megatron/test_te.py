"""TransformerEngine's grouped experts (TEGroupedMLP) paired with the fused call, on one GPU, against alltoall.

Needs TransformerEngine and a GPU; everywhere else each test is reported as skipped, with that reason.
"""

import importlib.util

import pytest
import torch

from tests.distributed import run_ranks
from tests.megatron import layers

HAS_TE = importlib.util.find_spec("transformer_engine") is not None
pytestmark = pytest.mark.skipif(
    not (HAS_TE and torch.cuda.is_available()), reason="needs TransformerEngine and a GPU: TEGroupedMLP"
)
TOKENS = 96


def te_layer(dispatcher: str):
    """A bf16 MoELayer on TransformerEngine's grouped linear layers, under DDP with fp32 main_grad."""
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
    from megatron.core.models.gpt.moe_module_specs import get_moe_module_spec

    fields = dict(moe_grouped_gemm=True, bf16=True, params_dtype=torch.bfloat16, moe_router_dtype="fp32")
    cfg = layers.config(dispatcher, gradient_accumulation_fusion=True, **fields)
    layer = get_moe_module_spec(use_te=True, num_experts=cfg.num_moe_experts, moe_grouped_gemm=True)(config=cfg)
    layer.set_layer_number(1)
    ddp = DistributedDataParallelConfig(grad_reduce_in_fp32=True, use_distributed_optimizer=False)
    return DistributedDataParallel(cfg, ddp, layer)


def start():
    from megamoe_train import install

    torch.cuda.set_device(0)
    layers.start(1)
    install(backend="reference")


def pair_of_layers():
    theirs, ours = te_layer("alltoall"), te_layer("megamoe")
    ours.module.load_state_dict(theirs.module.state_dict())
    return theirs, ours


def step(wrapped, x):
    """Output, input gradient, and main_grad of the experts, after two micro-batches."""
    wrapped.zero_grad_buffer()
    for _ in range(2):
        x = x.detach().requires_grad_()
        y = wrapped(x)[0]
        y.float().sum().backward()
    wrapped.finish_grad_sync()
    grads = {name: p.main_grad.clone() for name, p in wrapped.module.experts.named_parameters()}
    return {"y": y.detach(), "dx": x.grad}, grads


def exact(layer, x):
    """y and the experts' gradients in fp64, with the routing of `layer`."""
    from megamoe_train import moe
    from megamoe_train.megatron.dispatcher import topk_ids_of, topk_weights_of

    with torch.no_grad():
        probs, routing_map = layer.route(x)
    ids = topk_ids_of(routing_map, layers.TOP_K)
    weights = topk_weights_of(probs, ids).double()
    names = [[f"linear_fc{n}.weight{i}" for i in range(layers.EXPERTS)] for n in (1, 2)]
    values = dict(layer.experts.named_parameters())
    fc1, fc2 = ([values[name].detach().double().requires_grad_() for name in part] for part in names)
    y = moe(x.reshape(-1, layers.HIDDEN).double(), ids, weights, fc1, fc2, backend="reference")
    (2 * y.sum()).backward()
    return y.detach(), {name: w.grad for name, w in zip(names[0] + names[1], fc1 + fc2, strict=True)}


def against_alltoall(rank, world_size):
    from megamoe_train.megatron.experts import MegaMoETEGroupedMLP

    start()
    theirs, ours = pair_of_layers()
    assert type(ours.module.experts) is MegaMoETEGroupedMLP and ours.module.token_dispatcher.paired
    x = torch.randn(TOKENS, 1, layers.HIDDEN, device="cuda", dtype=torch.bfloat16)
    y, grads = exact(ours.module, x)
    seen = [step(wrapped, x) for wrapped in (theirs, ours)]
    (t, theirs_grads), (o, ours_grads) = seen
    torch.testing.assert_close(o["dx"], t["dx"], rtol=2e-2, atol=2e-2 * t["dx"].abs().max().item())
    errors = [(part["y"].reshape(TOKENS, -1).double() - y).norm().item() for part in (o, t)]
    assert 0 < errors[0] <= 2 * errors[1], errors
    assert grads.keys() == ours_grads.keys() == theirs_grads.keys()
    for name, grad in grads.items():  # the 2x rule, per expert
        errors = [(part[name].double() - grad).norm().item() for part in (ours_grads, theirs_grads)]
        assert errors[0] <= 2 * errors[1], (name, errors)
    assert all(p.grad is None and p.grad_added_to_main_grad for p in ours.module.experts.parameters())


def same_checkpoint(rank, world_size):
    """The same parameters, flags and shards: what one saves the other loads, and SequentialMLP does too."""
    start()
    theirs, ours = (wrapped.module for wrapped in pair_of_layers())
    flags = [
        [(n, p.shape, p.dtype, p.allreduce) for n, p in layer.experts.named_parameters()] for layer in (theirs, ours)
    ]
    assert flags[0] == flags[1]
    shards = [layer.sharded_state_dict(prefix="mlp.") for layer in (theirs, ours)]
    assert shards[0].keys() == shards[1].keys()
    for key, shard in shards[0].items():
        mine = shards[1][key]
        assert (type(mine), mine.key, mine.replica_id) == (type(shard), shard.key, shard.replica_id)
    assert ours.backward_dw() is None


def test_paired_te_experts_are_as_exact_as_alltoall():
    run_ranks(against_alltoall, 1)


def test_paired_te_experts_have_the_same_checkpoint():
    run_ranks(same_checkpoint, 1)

"""TransformerEngine's grouped experts (TEGroupedMLP) paired with the fused call.

Where TransformerEngine is missing, or a GPU for its own kernels, a test is reported as skipped with that reason.
"""

import importlib.util
import re

import pytest
import torch

from tests.distributed import run_ranks
from tests.megatron import layers

HAS_TE = importlib.util.find_spec("transformer_engine") is not None
HAS_GPU = torch.cuda.is_available()
needs_te = pytest.mark.skipif(not HAS_TE, reason="needs TransformerEngine: TEGroupedMLP")
needs_gpu = pytest.mark.skipif(not HAS_GPU, reason="needs a GPU: TransformerEngine's kernels are the other side")
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


def against_sequential(rank, world_size):
    """The paired TEGroupedMLP calls no kernel of TransformerEngine: in fp64 it equals SequentialMLP, with alltoall."""
    from megatron.core.models.gpt.moe_module_specs import get_moe_module_spec

    from megamoe_train.megatron.experts import MegaMoETEGroupedMLP

    layers.start(world_size, backend="reference")
    theirs = layers.new_layer(layers.config("alltoall"))
    truth, torch.cuda.is_available = torch.cuda.is_available, lambda: True  # TransformerEngine asks when it is built
    cfg = layers.config(moe_grouped_gemm=True)
    ours = get_moe_module_spec(use_te=True, num_experts=layers.EXPERTS, moe_grouped_gemm=True)(config=cfg).double()
    torch.cuda.is_available = truth
    assert type(ours.experts) is MegaMoETEGroupedMLP
    weights = {grouped_name(name): p for name, p in theirs.named_parameters()}
    ours.load_state_dict(weights, strict=False)
    ours.set_layer_number(1)
    assert [(n, p.shape, getattr(p, "allreduce", True)) for n, p in sorted(ours.named_parameters())] == [
        (n, p.shape, getattr(p, "allreduce", True)) for n, p in sorted(weights.items())
    ]
    x = layers.hidden(12)
    expected = {grouped_name(name): tensor for name, tensor in layers.run(theirs, x).items()}
    layers.assert_equal(layers.run(ours, x), expected)
    keys = [{shard.key for shard in layer.sharded_state_dict(prefix="mlp.").values()} for layer in (theirs, ours)]
    assert keys[0] == keys[1] and ours.backward_dw() is None


def grouped_name(name: str) -> str:
    """SequentialMLP's name of a parameter -> TEGroupedMLP's."""
    return re.sub(r"local_experts\.(\d+)\.(linear_fc[12])\.weight", r"\2.weight\1", name)


@needs_te
@pytest.mark.skipif(HAS_GPU, reason="needs a machine without a GPU: fp64 on gloo")
def test_paired_te_experts_equal_sequential_experts():
    run_ranks(against_sequential, 2)


@needs_te
@needs_gpu
def test_paired_te_experts_are_as_exact_as_alltoall():
    run_ranks(against_alltoall, 1, backend="cpu:gloo,cuda:nccl")


@needs_te
@needs_gpu
def test_paired_te_experts_have_the_same_checkpoint():
    run_ranks(same_checkpoint, 1, backend="cpu:gloo,cuda:nccl")

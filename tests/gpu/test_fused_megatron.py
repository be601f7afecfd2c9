"""Megatron's MoELayer with paired experts on the fused kernels, against the same layer on the reference backend."""

import pytest
import torch
import torch.distributed as dist

from megamoe_train.bench import ranks as processes
from tests.numerics import relative_error

pytestmark = pytest.mark.gpu
HIDDEN, INNER, EXPERTS, TOP_K, TOKENS = 512, 256, 8, 2, 384


def layer_on(backend: str, ep_size: int):
    """A bf16 MoELayer under DDP with fp32 main_grad."""
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig

    from megamoe_train import install
    from tests.megatron import layers

    install(backend=backend, experts="paired", recompute=None, tokens=TOKENS, deadline_s=10.0)
    fields = {"hidden_size": HIDDEN, "ffn_hidden_size": INNER, "moe_ffn_hidden_size": INNER, "num_moe_experts": EXPERTS}
    fields |= {"moe_router_topk": TOP_K, "moe_router_dtype": "fp32", "bf16": True, "params_dtype": torch.bfloat16}
    config = layers.config(**fields, expert_model_parallel_size=ep_size)
    layer = layers.new_layer(config).bfloat16().cuda()
    ddp = DistributedDataParallelConfig(grad_reduce_in_fp32=True, use_distributed_optimizer=False)
    return DistributedDataParallel(config, ddp, layer)


def steps(wrapped, count: int) -> dict[str, torch.Tensor]:
    """Output, dx and main_grad after `count` micro-batches."""
    wrapped.zero_grad_buffer()
    generator = torch.Generator("cuda").manual_seed(dist.get_rank())
    found = {}
    for number in range(count):
        tokens = TOKENS - 100 * number
        x = torch.randn(tokens, 1, HIDDEN, device="cuda", generator=generator).bfloat16().requires_grad_()
        y = wrapped(x)[0]
        y.backward(torch.randn(y.shape, device="cuda", generator=generator).bfloat16())
        found |= {f"y{number}": y.detach(), f"dx{number}": x.grad}
    wrapped.finish_grad_sync()
    return found | {name: p.main_grad.clone() for name, p in wrapped.module.named_parameters()}


def compare() -> None:
    from megamoe_train import fused_plan
    from megamoe_train.megatron import workspaces
    from tests.megatron import layers

    ep_size = dist.get_world_size()
    layers.start(ep_size)
    theirs, ours = layer_on("reference", ep_size), layer_on("auto", ep_size)
    ours.module.load_state_dict(theirs.module.state_dict())
    second = layer_on("auto", ep_size)
    (space,) = workspaces.made()  # of both layers
    assert space.shape.tokens == TOKENS and space.verdicts.plans == 0
    others = len(fused_plan._shared)
    found, expected = steps(ours, 3), steps(theirs, 3)
    assert space.verdicts.plans >= 3 and len(fused_plan._shared) == others
    for name, value in expected.items():
        assert found[name].dtype == value.dtype
        error = relative_error(found[name], value)
        assert error < 0.03, f"{name}: {error:.2e}"
    experts = dict(ours.module.experts.named_parameters())
    assert all(p.grad_added_to_main_grad and p.main_grad.abs().max() > 0 for p in experts.values())
    again = steps(ours, 3)
    assert all(torch.equal(again[name], found[name]) for name in found), "not repeatable"
    steps(second, 1)
    assert space.verdicts.plans >= 7
    space.close()


def one_process() -> None:
    """Megatron wants process groups also for one rank."""
    dist.init_process_group("nccl", store=dist.HashStore(), rank=0, world_size=1, device_id=torch.device("cuda", 0))
    try:
        compare()
    finally:
        from megatron.core import parallel_state

        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()


def test_one_rank():
    one_process()


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs in one machine")
def test_two_ranks():
    processes.run(compare, 2)

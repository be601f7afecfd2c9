"""The reference and the plan on CUDA tensors: what the GPU checks take as their oracle is the CPU's."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor

from megamoe_train import MegaMoE, MegaMoEConfig
from megamoe_train.functional import moe
from megamoe_train.plan import RoutingPlan, build_plan, plans_of
from tests.numerics import assert_close
from tests.workloads import ROUTINGS, make_layer

pytestmark = pytest.mark.gpu
DEVICE = "cuda"
HOST_FIELDS = {"counts", "expert_rows", "expert_offset"}


def run(parts: tuple[Tensor, ...], **options) -> dict[str, Tensor]:
    x, ids, weights, dy, fc1, fc2 = parts
    leaves = {"dx": x, "dweights": weights, "dfc1": fc1, "dfc2": fc2}
    leaves = {name: leaf.detach().requires_grad_() for name, leaf in leaves.items()}
    y = moe(leaves["dx"], ids, leaves["dweights"], leaves["dfc1"], leaves["dfc2"], backend="reference", **options)
    y.backward(dy)
    return {"y": y.detach(), **{name: leaf.grad for name, leaf in leaves.items()}}


@pytest.mark.parametrize("recompute", [None, "fc1"])
@pytest.mark.parametrize("routing", ROUTINGS)
def test_fp64_equals_the_cpu(routing, recompute):
    parts = make_layer([150], top_k=3, hidden=64, inner=48, routing=routing, seed=5).merged()
    expected = run(parts, clamp=0.6)
    found = run(tuple(part.to(DEVICE) for part in parts), clamp=0.6, recompute=recompute)
    for name, value in expected.items():
        assert found[name].device.type == DEVICE
        assert_close(found[name].cpu(), value, 1e-12, name)


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_the_plan_has_the_cpus_bits(ranks):
    layer = make_layer([211 * rank for rank in range(ranks)], top_k=4, num_experts=16, routing="zipf", seed=ranks)
    for one, other in zip(plans_of(layer.ids, 16), plans_of([ids.to(DEVICE) for ids in layer.ids], 16), strict=True):
        for field in dataclasses.fields(RoutingPlan):
            mine, theirs = getattr(one, field.name), getattr(other, field.name)
            if isinstance(mine, Tensor):
                assert theirs.device.type == ("cpu" if field.name in HOST_FIELDS else DEVICE), field.name
                assert torch.equal(mine, theirs.cpu()), field.name
            else:
                assert mine == theirs, field.name


def test_bits_repeat_from_run_to_run():
    parts = tuple(
        part.to(DEVICE) for part in make_layer([1000], top_k=4, hidden=256, inner=128, dtype=torch.bfloat16).merged()
    )
    first, second = run(parts, clamp=1.0), run(parts, clamp=1.0, recompute="fc1")
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_empty_calls():
    for layer in (make_layer([0]), make_layer([9], routing="all_dropped")):
        found = run(tuple(part.to(DEVICE) for part in layer.merged()))
        assert all((value == 0).all() for value in found.values())


def test_the_module_trains_on_the_gpu():
    layer = MegaMoE(MegaMoEConfig(256, 128, 8, 2, clamp=10.0, backend="reference"), device=DEVICE, dtype=torch.bfloat16)
    x, ids, weights, dy, _, _ = make_layer([64], hidden=256, dtype=torch.bfloat16).merged()
    layer(x.to(DEVICE), ids.to(DEVICE), weights.to(DEVICE)).backward(dy.to(DEVICE))
    assert layer.fc1.grad.isfinite().all() and (layer.fc1.grad != 0).any()


def test_a_plan_on_the_other_device_is_refused():
    x, ids, weights, _, fc1, fc2 = (part.to(DEVICE) for part in make_layer([5]).merged())
    with pytest.raises(ValueError, match="plan: got device cpu; allowed: cuda:0, where topk_ids is"):
        moe(x, ids, weights, fc1, fc2, backend="reference", plan=build_plan(ids.cpu(), 8))

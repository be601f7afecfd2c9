"""MegaMoE: weights, initialisation that does not depend on the number of ranks, and the call."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from megamoe_train import MegaMoE, MegaMoEConfig
from megamoe_train.functional import moe
from tests.distributed import run_ranks
from tests.workloads import make_layer

CONFIG = MegaMoEConfig(32, 16, num_experts=8, top_k=2, clamp=0.6, backend="reference")


def test_parameters_and_state_dict():
    layer = MegaMoE(CONFIG)
    assert {name: tuple(p.shape) for name, p in layer.named_parameters()} == {"fc1": (8, 32, 32), "fc2": (8, 32, 16)}
    other = MegaMoE(CONFIG)
    assert not torch.equal(layer.fc1, other.fc1)
    other.load_state_dict(layer.state_dict())
    assert torch.equal(layer.fc1, other.fc1) and torch.equal(layer.fc2, other.fc2)
    assert "num_experts=8" in repr(layer)


def test_initialisation():
    torch.manual_seed(7)
    layer = MegaMoE(MegaMoEConfig(256, 128, num_experts=4, top_k=2))
    for weight, fan_in in ((layer.fc1, 256), (layer.fc2, 128)):
        assert abs(weight.std().item() * fan_in**0.5 - 1) < 0.01 and abs(weight.mean().item()) < 1e-3
        assert not torch.equal(weight[0], weight[1])
    torch.manual_seed(7)
    again = MegaMoE(MegaMoEConfig(256, 128, num_experts=4, top_k=2), dtype=torch.bfloat16)
    assert torch.equal(again.fc1, layer.fc1.bfloat16())
    next_one = MegaMoE(MegaMoEConfig(256, 128, num_experts=4, top_k=2))
    assert not torch.equal(next_one.fc1, layer.fc1)


@pytest.mark.parametrize("recompute", [None, "fc1"])
def test_forward_is_moe_with_the_configs_knobs(recompute):
    layer = MegaMoE(MegaMoEConfig(32, 16, 8, 2, clamp=0.6, backend="reference", recompute=recompute))
    x, ids, weights, dy, _, _ = make_layer([30], dtype=torch.float32).merged()
    y = layer(x, ids, weights)
    fc1, fc2 = (p.detach().clone().requires_grad_() for p in (layer.fc1, layer.fc2))
    expected = moe(x, ids, weights, fc1, fc2, clamp=0.6)
    assert torch.equal(y, expected) and not torch.equal(y, moe(x, ids, weights, fc1, fc2))
    y.backward(dy)
    expected.backward(dy)
    assert torch.equal(layer.fc1.grad, fc1.grad) and torch.equal(layer.fc2.grad, fc2.grad)


def test_it_trains():
    """A layer fits another one's output: gradients point the right way through an optimizer."""
    torch.manual_seed(0)
    teacher, layer = MegaMoE(CONFIG), MegaMoE(CONFIG)
    x, ids, weights, _, _, _ = make_layer([200], dtype=torch.float32).merged()
    target = teacher(x, ids, weights).detach()
    optimizer = torch.optim.Adam(layer.parameters(), lr=3e-2)
    losses = []
    for _ in range(60):
        optimizer.zero_grad()
        loss = (layer(x, ids, weights) - target).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.2 * losses[0]


def test_refusals():
    with pytest.raises(ValueError, match="hidden_size: got 100; allowed: a multiple of 256"):
        MegaMoE(MegaMoEConfig(100, 128, 8, 2))
    with pytest.raises(ValueError, match=r"ep_size: got 2; allowed: 1, the size of the given group \(None: 1\)"):
        MegaMoE(MegaMoEConfig(32, 16, 8, 2, ep_size=2, backend="reference"))
    layer = MegaMoE(CONFIG)
    with pytest.raises(ValueError, match=r"x: got shape \(3, 48\); allowed: \[T, 32\], as in the config"):
        layer(torch.zeros(3, 48), torch.zeros(3, 2, dtype=torch.int64), torch.zeros(3, 2))
    with pytest.raises(ValueError, match=r"topk_ids: got shape \(3, 4\); allowed: \[T, 2\], as in the config"):
        layer(torch.zeros(3, 32), torch.zeros(3, 4, dtype=torch.int64), torch.zeros(3, 4))


def _split_over_ranks(rank: int, world_size: int) -> None:
    config = MegaMoEConfig(32, 16, 8, 2, ep_size=world_size, clamp=0.6, backend="reference")
    torch.manual_seed(3)
    whole = MegaMoE(CONFIG)
    torch.manual_seed(3)
    part = MegaMoE(config, dist.group.WORLD)
    local = 8 // world_size
    mine = slice(rank * local, (rank + 1) * local)
    assert torch.equal(part.fc1, whole.fc1[mine]) and torch.equal(part.fc2, whole.fc2[mine])
    layer = make_layer([10 + rank_ for rank_ in range(world_size)], dtype=torch.float32)
    x, ids, weights, dy, _, _ = layer.merged()
    y = whole(x, ids, weights)
    y.backward(dy)
    x, ids, weights, dy, _, _ = layer.rank(rank)
    y_part = part(x, ids, weights)
    y_part.backward(dy)
    assert torch.equal(y_part, y[layer.tokens_of(rank)]) and torch.equal(part.fc1.grad, whole.fc1.grad[mine])
    with pytest.raises(ValueError, match=f"ep_size: got 1; allowed: {world_size}"):
        MegaMoE(CONFIG, dist.group.WORLD)


@pytest.mark.parametrize("world_size", [2, 4])
def test_experts_do_not_depend_on_the_number_of_ranks(world_size):
    run_ranks(_split_over_ranks, world_size)

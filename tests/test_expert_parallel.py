"""The layer over real gloo groups of 1, 2 and 4 ranks against one rank that holds all tokens and all experts."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from megamoe_train import autograd
from megamoe_train.functional import moe
from megamoe_train.plan import build_plan
from tests.distributed import run_ranks
from tests.workloads import ROUTINGS, Layer, make_layer

NAMES = ("y", "x", "weights", "fc1", "fc2")


def run_layer(parts: tuple[Tensor, ...], group, frozen: tuple[str, ...] = (), **options) -> dict[str, Tensor | None]:
    x, ids, weights, dy, fc1, fc2 = parts
    leaves = {"x": x, "weights": weights, "fc1": fc1, "fc2": fc2}
    for name, leaf in leaves.items():
        leaf.requires_grad_(name not in frozen)
    y = moe(x, ids, weights, fc1, fc2, group=group, **options)
    y.backward(dy)
    return {"y": y.detach(), **{name: leaf.grad for name, leaf in leaves.items()}}


def share_of(whole: dict[str, Tensor], layer: Layer, rank: int) -> dict[str, Tensor]:
    """The part of a one-rank result that belongs to `rank`."""
    local = layer.fc1.shape[0] // len(layer.xs)
    tokens, experts = layer.tokens_of(rank), slice(rank * local, (rank + 1) * local)
    return {name: value[experts if name.startswith("fc") else tokens] for name, value in whole.items()}


def layers(world_size: int, dtype: torch.dtype) -> list[tuple[str, Layer]]:
    found = []
    for number, routing in enumerate(ROUTINGS):
        ragged = [(29 * rank + 17 * number) % 140 for rank in range(world_size)]  # a rank with T = 0 among them
        top_k = 1 if number == 1 else 3
        layer = make_layer(ragged, top_k=top_k, num_experts=8, routing=routing, dtype=dtype, seed=number)
        found.append((routing, layer))
    return found


def _matches_one_rank(rank: int, world_size: int) -> int:
    group = dist.group.WORLD if world_size > 1 else None
    checked = 0
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        for routing, layer in layers(world_size, dtype):
            options = {"clamp": 0.8, "recompute": "fc1" if checked % 3 == 0 else None}
            expected = share_of(run_layer(layer.merged(), None, clamp=0.8), layer, rank)
            found = run_layer(layer.rank(rank), group, **options)
            for name in NAMES:  # the same rows in the same order in every product: the same bits
                assert torch.equal(found[name], expected[name]), (routing, dtype, name)
            checked += 1
    return checked


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_bits_are_those_of_one_rank(world_size):
    assert run_ranks(_matches_one_rank, world_size) == [3 * len(ROUTINGS)] * world_size


def _uneven_needs(rank: int, world_size: int) -> None:
    """Ranks may freeze different things; rows still travel for whoever needs them."""
    group = dist.group.WORLD
    layer = make_layer([20 + 5 * r for r in range(world_size)], seed=21)
    expected = share_of(run_layer(layer.merged(), None), layer, rank)
    for frozen_by_rank in (
        [("x",), ()], [(), ("weights", "fc1")], [("fc1",), ("fc2", "x")],
        [("x", "weights", "fc1"), ("x", "fc2", "fc1")],
    ):  # fmt: skip
        frozen = frozen_by_rank[rank]
        for recompute in (None, "fc1"):
            found = run_layer(layer.rank(rank), group, frozen, recompute=recompute)
            for name in NAMES:
                assert found[name] is None if name in frozen else torch.equal(found[name], expected[name]), name


def _disagreements(rank: int, world_size: int) -> None:
    """A difference between ranks is the same error on all of them, and the group works afterwards."""
    group = dist.group.WORLD
    layer = make_layer([6, 6], seed=22)

    def refused(message: str, parts=None, **options) -> None:
        with pytest.raises(ValueError, match=message):
            run_layer(parts or layer.rank(rank), group, **options)

    refused("clamp: rank 1 of the EP group has None, rank 0 has 2.0; they must agree", clamp=None if rank else 2.0)
    refused("recompute: rank 1 of the EP group has fc1, rank 0 has None", recompute="fc1" if rank else None)
    narrow = make_layer([6, 6], hidden=32 + 16 * rank, seed=22)
    refused("hidden size: rank 1 of the EP group has 48, rank 0 has 32", narrow.rank(rank))
    slim = make_layer([6, 6], inner=16 + 4 * rank, seed=22)
    refused("intermediate size: rank 1 of the EP group has 20, rank 0 has 16", slim.rank(rank))
    half = make_layer([6, 6], dtype=torch.bfloat16 if rank else torch.float32, seed=22)
    refused("x dtype: rank 1 of the EP group has torch.bfloat16, rank 0 has torch.float32", half.rank(rank))
    everything = ("x", "weights", "fc1", "fc2")
    refused(
        r"gradient mode: rank 1 of the EP group has off \(no input needs a gradient, or no_grad\), rank 0 has on",
        frozen=everything if rank else (),
    )
    few = make_layer([6], num_experts=4 + 4 * rank, seed=22)
    refused("num_experts: rank 1 of the EP group has 16, rank 0 has 8", few.rank(0))
    expected = share_of(run_layer(layer.merged(), None), layer, rank)
    assert torch.equal(run_layer(layer.rank(rank), group)["fc1"], expected["fc1"])


def _order_of_passes(rank: int, world_size: int) -> None:
    """Several forwards before their backwards (pipeline order), no_grad between, a plan shared by two layers."""
    group = dist.group.WORLD
    batches = [make_layer([9, 14], seed=seed) for seed in (31, 32, 33)]
    expected = [share_of(run_layer(layer.merged(), None), layer, rank) for layer in batches]
    pending = []
    for layer in batches:
        x, ids, weights, dy, fc1, fc2 = layer.rank(rank)
        plan = build_plan(ids, 8, group=group)
        with torch.no_grad():
            quiet = moe(x, ids, weights, fc1, fc2, group=group, plan=plan)
        leaves = [leaf.requires_grad_() for leaf in (x, weights, fc1, fc2)]
        y = moe(x, ids, weights, fc1, fc2, group=group, plan=plan)
        assert torch.equal(y, quiet)
        pending.append((y, dy, leaves))
    for (y, dy, leaves), whole in zip(pending, expected, strict=True):
        y.backward(dy)
        assert [torch.equal(leaf.grad, whole[name]) for leaf, name in zip(leaves, NAMES[1:], strict=True)] == [True] * 4


def _staged_moves(rank: int, world_size: int) -> None:
    """The differentiable moves over a group, against the fused call's gradients of x and of the weights."""
    group = dist.group.WORLD
    layer = make_layer([11, 17], top_k=3, routing="some_dropped", seed=41)
    expected = share_of(run_layer(layer.merged(), None), layer, rank)
    x, ids, weights, dy, fc1, fc2 = layer.rank(rank)
    x, weights = x.requires_grad_(), weights.requires_grad_()
    plan = build_plan(ids, 8, group=group)
    x_MH, p_M = autograd.dispatch(x, plan, group), autograd.dispatch_weights(weights, plan, group)
    outputs = torch.zeros_like(x_MH)
    for e, (start, end) in enumerate(plan.segments):
        gate, up = (x_MH[start:end] @ fc1[e].t()).chunk(2, -1)
        a = torch.nn.functional.silu(gate) * up * p_M[start:end, None]
        outputs = outputs.index_copy(0, torch.arange(start, end), a @ fc2[e].t())
    y = autograd.combine(outputs, plan, group)
    y.backward(dy)
    for name, value in (("y", y), ("x", x.grad), ("weights", weights.grad)):
        torch.testing.assert_close(value, expected[name], rtol=1e-12, atol=1e-13)


def _two_ranks(rank: int, world_size: int) -> None:
    for check in (_uneven_needs, _disagreements, _order_of_passes, _staged_moves):
        check(rank, world_size)


def test_two_ranks_in_every_order_and_disagreement():
    run_ranks(_two_ranks, 2)


def _subgroups(rank: int, world_size: int) -> None:
    """Two EP groups of two in one world: the rank inside the group counts, not the world's."""
    groups = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    number, inside = divmod(rank, 2)
    layer = make_layer([12, 5], seed=50 + number)
    expected = share_of(run_layer(layer.merged(), None), layer, inside)
    found = run_layer(layer.rank(inside), groups[number])
    assert all(torch.equal(found[name], expected[name]) for name in NAMES)
    with pytest.raises(ValueError, match="group: this process is not a member of the one given"):
        build_plan(layer.ids[0], 8, group=groups[1 - number])


def test_groups_inside_a_larger_world():
    run_ranks(_subgroups, 4)

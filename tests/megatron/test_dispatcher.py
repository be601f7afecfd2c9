"""The six hooks alone: ids from routing maps; the paired mode moves nothing; the staged mode against alltoall."""

from functools import partial

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given

from megamoe_train.megatron.dispatcher import topk_ids_of, topk_weights_of
from tests.megatron import layers, rows


def scattered_map(tokens: int, experts: int, kept: list[int]) -> torch.Tensor:
    """A routing map with `kept[t]` experts of token t, at random."""
    scores = torch.rand(tokens, experts)
    return torch.stack([scores[t] >= scores[t].sort().values[experts - kept[t]] for t in range(tokens)])


@given(st.integers(1, 9), st.data())
def test_ids_are_the_routed_experts_ascending_then_dropped(experts, data):
    top_k = data.draw(st.integers(1, experts))
    kept = data.draw(st.lists(st.integers(1, top_k), min_size=1, max_size=6))
    routing_map = scattered_map(len(kept), experts, kept)
    expected = [row.nonzero().flatten().tolist() for row in routing_map]
    assert topk_ids_of(routing_map, top_k).tolist() == [ids + [-1] * (top_k - len(ids)) for ids in expected]


def test_ids_of_no_token_and_of_dropped_tokens():
    assert topk_ids_of(torch.zeros(0, 4, dtype=torch.bool), 2).shape == (0, 2)
    assert topk_ids_of(torch.zeros(3, 4, dtype=torch.bool), 2).tolist() == [[-1, -1]] * 3


def test_more_experts_than_top_k_is_an_error():
    with pytest.raises(RuntimeError, match="more than top_k = 2"):
        topk_ids_of(torch.ones(1, 3, dtype=torch.bool), 2)


def test_weights_follow_the_ids_and_gradients_return_to_probs():
    probs = torch.rand(3, 4, dtype=torch.float64, requires_grad=True)
    ids = torch.tensor([[0, 2], [3, -1], [-1, -1]])
    weights = topk_weights_of(probs, ids)
    expected = torch.zeros(3, 2, dtype=torch.float64)
    expected[0], expected[1, 0] = probs.detach()[0, [0, 2]], probs.detach()[1, 3]
    assert torch.equal(weights, expected)
    (weights * torch.tensor([[1.0, 2.0]], dtype=torch.float64)).sum().backward()
    assert probs.grad.tolist() == [[1, 0, 2, 0], [0, 0, 0, 1], [0, 0, 0, 0]]


def through_hooks(dispatcher, x, routing_map, probs):
    """What the experts get, and what comes out when every expert gives p * row back."""
    rows, weights = dispatcher.token_dispatch(*dispatcher.dispatch_preprocess(x, routing_map, probs))
    rows, counts, weights = dispatcher.dispatch_postprocess(rows, weights)
    results = dispatcher.combine_preprocess(rows * weights.unsqueeze(1))
    return rows, counts, weights, dispatcher.combine_postprocess(dispatcher.token_combine(results))


WORKLOADS = {  # tokens of a rank, experts kept of token t
    "even": (lambda rank: 24, lambda t: layers.TOP_K),
    "ragged": (lambda rank: 5 + 7 * rank, lambda t: layers.TOP_K),
    "dropped": (lambda rank: 16, lambda t: t % (layers.TOP_K + 1)),
    "empty rank": (lambda rank: 8 * (rank > 0), lambda t: layers.TOP_K),
}


DROPPING = dict(moe_expert_capacity_factor=1.0, moe_token_drop_policy="probs")


def staged_against_alltoall(folder, ep_size):
    layers.start(ep_size)
    rank = torch.distributed.get_rank()
    torch.manual_seed(rank)
    from megatron.core.transformer.moe.moe_utils import get_default_pg_collection
    from megatron.core.transformer.moe.token_dispatcher import MoEAlltoAllTokenDispatcher

    from megamoe_train.megatron.dispatcher import MegaMoETokenDispatcher

    groups = get_default_pg_collection()
    local = layers.EXPERTS // ep_size
    indices = [groups.ep.rank() * local + i for i in range(local)]
    # The capacity factor makes alltoall count the kept slots instead of assuming that none is dropped.
    theirs = MoEAlltoAllTokenDispatcher(local, indices, layers.config("alltoall", **DROPPING), groups)
    ours = MegaMoETokenDispatcher(local, indices, layers.config("megamoe", **DROPPING), groups)
    for name, (tokens_of, kept_of) in WORKLOADS.items():
        tokens = tokens_of(rank)
        routing_map = torch.zeros(0, layers.EXPERTS, dtype=torch.bool)
        if tokens:
            routing_map = scattered_map(tokens, layers.EXPERTS, [max(1, kept_of(t)) for t in range(tokens)])
            routing_map[[kept_of(t) == 0 for t in range(tokens)]] = False
        probs = torch.rand(tokens, layers.EXPERTS, dtype=torch.float64) * routing_map
        seen = []
        for dispatcher in (theirs, ours):
            x, p = layers.hidden(tokens, batch=1), probs.clone().requires_grad_()
            rows, counts, weights, y = through_hooks(dispatcher, x, routing_map, p)
            assert y.shape == x.shape
            (y * torch.linspace(1, 2, layers.HIDDEN, dtype=torch.float64)).sum().backward()
            moved = {"rows": rows.detach(), "counts": counts, "weights": weights.detach()}
            seen.append(moved | {"y": y.detach(), "dx": x.grad, "dprobs": p.grad})
        for key in ("rows", "counts", "weights"):  # data movement: the same bits in the same order
            assert torch.equal(seen[0][key], seen[1][key]), (name, key)
        for key in ("y", "dx", "dprobs"):
            layers.assert_equal({key: seen[1][key]}, {key: seen[0][key]})
    assert ours._forward is None  # nothing outlives the forward


def paired_moves_nothing(folder):
    layers.start(4)
    from megamoe_train.plan import RoutingPlan

    dispatcher = layers.new_layer(layers.config()).token_dispatcher
    x = layers.hidden(6, batch=2)
    routing_map = scattered_map(12, layers.EXPERTS, [layers.TOP_K] * 12)
    probs = torch.rand(12, layers.EXPERTS, dtype=torch.float64) * routing_map
    tokens, weights = dispatcher.token_dispatch(*dispatcher.dispatch_preprocess(x, routing_map, probs))
    tokens, plan, weights = dispatcher.dispatch_postprocess(tokens, weights)
    assert isinstance(plan, RoutingPlan) and torch.equal(plan.topk_ids, topk_ids_of(routing_map, layers.TOP_K))
    assert tokens.data_ptr() == x.data_ptr() and weights.shape == (12, layers.TOP_K)
    assert plan.counts.sum() == 4 * 12 * layers.TOP_K
    y = dispatcher.combine_postprocess(dispatcher.token_combine(dispatcher.combine_preprocess(tokens)))
    assert y.data_ptr() == x.data_ptr() and y.shape == x.shape
    assert dispatcher.get_expert_zero_copy_buffers() == (None, None)  # MoELayer asks every dispatcher


ROWS = {
    f"staged hooks move what alltoall moves, EP={ep}": partial(staged_against_alltoall, ep_size=ep) for ep in (1, 2, 4)
}
ROWS["paired hooks hand on the plan and move no token"] = paired_moves_nothing
ran = rows.fixture(__name__, world_size=4)


@pytest.mark.parametrize("row", ROWS)
def test_hooks(ran, row):
    ran.check(row)

"""Staged dispatch and combine around foreign experts, one rank: rows, gradients and refusals against plain indexing."""

import pytest
import torch

from megamoe_train import ops_plan
from megamoe_train.staged import Staged
from megamoe_train.workspace import Shape, Workspace

pytestmark = pytest.mark.gpu

TOKENS, TOP_K, EXPERTS, HIDDEN = 700, 4, 24, 512


def routing(seed: int, tokens: int = TOKENS) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """x, map and probs; a token keeps 0..K experts, as after dropping by capacity or padding."""
    torch.manual_seed(seed)
    kept = torch.randint(TOP_K + 1, (tokens, 1), device="cuda")
    order = torch.rand(tokens, EXPERTS, device="cuda").argsort(1).argsort(1)
    routing_map = order < kept
    probs = torch.rand(tokens, EXPERTS, device="cuda") * routing_map
    return torch.randn(tokens, HIDDEN, device="cuda").bfloat16(), routing_map, probs


def new(**sizing) -> Staged:
    return Staged(Workspace.create(Shape(1, EXPERTS, TOP_K, HIDDEN, TOKENS), deadline_s=4, **sizing))


def through(staged: Staged, x, routing_map, probs):
    ids, weights = staged.route(routing_map, probs)
    flight, rows, weights = staged.dispatch(x, ids, weights)
    return flight, rows, weights, staged.combine(flight, rows)


def plain_sum(x, counts) -> torch.Tensor:
    """fp32, one addend a kept expert."""
    y = torch.zeros_like(x, dtype=torch.float32)
    for k in range(TOP_K):
        y += torch.where((counts > k)[:, None], x.float(), 0)
    return y.bfloat16()


@pytest.mark.parametrize("sizing", ["high_water", "exact", "fixed"])
def test_rows_sums_and_gradients(sizing):
    staged = new(sizing=sizing, capacity=4096 if sizing == "fixed" else 0)
    for seed, tokens in ((0, TOKENS), (1, 1), (2, 0), (3, TOKENS)):
        x, routing_map, probs = routing(seed, tokens)
        x.requires_grad_(), probs.requires_grad_()
        flight, rows, weights, y = through(staged, x, routing_map, probs)
        expert, token = routing_map.t().nonzero(as_tuple=True)  # by expert, then by token: no padding between
        assert torch.equal(rows, x[token]) and torch.equal(weights, probs[token, expert])
        assert torch.equal(flight.expert_rows, routing_map.sum(0).cpu())
        counts = routing_map.sum(1)
        assert torch.equal(y, plain_sum(x.detach(), counts))
        dy, dweights = torch.randn_like(y), torch.randn_like(weights)
        torch.autograd.backward([y, weights], [dy, dweights])
        assert torch.equal(x.grad, plain_sum(dy, counts))
        wanted = torch.zeros_like(probs)
        wanted[token, expert] = dweights
        assert torch.equal(probs.grad, wanted)
    staged.workspace.close()


def test_high_water_grows_by_itself():
    staged = new()
    staged.workspace.high_water = 128
    x, routing_map, probs = routing(0)
    _, rows, _, _ = through(staged, x, routing_map, probs)
    assert torch.equal(rows, x[routing_map.t().nonzero(as_tuple=True)[1]])
    assert len(rows) <= staged.workspace.high_water < len(rows) * 1.2


def test_what_cannot_be_is_refused_by_name():
    staged = new(sizing="fixed", capacity=128)
    x, routing_map, probs = routing(0)
    with pytest.raises(ops_plan.RowOverflow, match="rank 0 has room for 128 rows; this routing needs up to"):
        through(staged, x, routing_map, probs)
    with pytest.raises(ValueError, match=r"hidden states: got dtype torch\.float32; allowed: torch\.bfloat16 on CUDA"):
        through(staged, x.float(), routing_map, probs)
    routing_map[5] = True
    with pytest.raises(ValueError, match="routing_map: token 5 of rank 0 is routed to more than top_k = 4 experts"):
        through(staged, x, routing_map, probs)
    routing_map[:] = False
    _, rows, _, y = through(staged, x, routing_map, probs)  # the errors leave nothing behind
    assert rows.shape == (0, HIDDEN) and not y.any()

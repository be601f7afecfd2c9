"""Movement of rows in the reference: dropped slots, padding, empty experts, the sum over k, dispatch and its dual."""

from __future__ import annotations

import pytest
import torch

from megamoe_train import reference
from megamoe_train.plan import build_plan, plans_of
from tests.test_reference import run_reference
from tests.workloads import make_layer


def test_dropped_slots_reach_nothing():
    """Their p, NaN or not, changes no bit; their dp is zero; a token without slots gives y = 0 and dx = 0."""
    layer = make_layer([30], top_k=3, routing="some_dropped", seed=6)
    layer.ids[0][4] = -1
    clean = run_reference(layer)
    dropped = layer.ids[0] < 0
    layer.weights[0][dropped] = float("nan")
    layer.xs[0][4] = float("nan")
    layer.dys[0][4] = float("nan")
    found = run_reference(layer)
    assert all(torch.equal(found[name], clean[name]) for name in clean)
    assert (found["dweights"][dropped] == 0).all() and (found["dweights"][~dropped] != 0).all()
    assert (found["y"][4] == 0).all() and (found["dx"][4] == 0).all()


def test_an_expert_without_rows_gets_zero_gradients():
    layer = make_layer([20], routing="empty_experts", seed=7)
    used = set(layer.ids[0].flatten().tolist())
    found = run_reference(layer)
    for e in range(8):
        assert (found["dfc1"][e] == 0).all() == (found["dfc2"][e] == 0).all() == (e not in used)


def test_padding_rows_reach_no_result():
    """Whatever stands in h's padding, every result is the same."""
    x, ids, weights, dy, fc1, fc2 = make_layer([50], seed=8).merged()
    plan = build_plan(ids, 8)
    experts = list(fc1), list(fc2)
    _, h = reference.forward(x, plan, weights, *experts, clamp=None, group=None)
    assert (h[plan.source_of < 0] == 0).all() and (plan.source_of < 0).any()
    poisoned = h.clone()
    poisoned[plan.source_of < 0] = float("nan")
    clean = reference.backward(dy, x, h, plan, weights, *experts, clamp=None, group=None)
    found = reference.backward(dy, x, poisoned, plan, weights, *experts, clamp=None, group=None)
    assert torch.equal(found.dx, clean.dx) and torch.equal(found.dweights, clean.dweights)
    for mine, theirs in zip(found.dfc1 + found.dfc2, clean.dfc1 + clean.dfc2, strict=True):
        assert torch.equal(mine, theirs)
    rows = torch.full((plan.num_rows, 4), float("nan"))
    rows[plan.rows] = 1.0
    assert torch.equal(reference.combine(rows, plan, None), torch.full((50, 4), 2.0))


@pytest.mark.parametrize("routing", ["some_dropped", "empty_experts", "all_dropped"])
def test_uninitialised_memory_reaches_no_result(routing):
    """torch's deterministic mode fills every new_empty with NaN."""
    layer = make_layer([50], top_k=3, routing=routing, seed=8)
    clean = run_reference(layer, 0.5)
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.empty(3).isnan().all()
        found = run_reference(layer, 0.5)
        plan = build_plan(layer.ids[0], 8)
        rows = reference.dispatch(layer.xs[0], plan, None)
        _, h = reference.forward(
            layer.xs[0], plan, layer.weights[0], list(layer.fc1), list(layer.fc2), clamp=None, group=None
        )
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(found[name], clean[name]) for name in clean)
    assert (rows[plan.source_of < 0] == 0).all() and (h[plan.source_of < 0] == 0).all()


def test_combine_sums_k_ascending_in_fp32_and_rounds_once():
    ids = torch.tensor([[0, 1, 2, 3]])
    plan = build_plan(ids, 4)
    values = torch.tensor([256.0, 1.0, 1.0, 1.0])  # in bf16, 256 + 1 = 256: rounding at each step would lose the ones
    rows = torch.zeros(plan.num_rows, 1, dtype=torch.bfloat16)
    rows[plan.slot_of[0], 0] = values.bfloat16()
    assert reference.combine(rows, plan, None).item() == torch.tensor(259.0).bfloat16().item() != 256.0
    big = torch.tensor([1.0, 1e8, -1e8, 1.0])  # fp32: only k ascending from the left gives 1
    rows = torch.zeros(plan.num_rows, 1)
    rows[plan.slot_of[0], 0] = big
    assert reference.combine(rows, plan, None).item() == 1.0


def test_dispatch_and_combine_are_duals():
    """<dispatch x, r> = <x, combine r>, and the same for the weights."""
    generator = torch.Generator().manual_seed(0)
    ids = make_layer([33], top_k=3, routing="some_dropped").ids[0]
    plan = build_plan(ids, 8)
    x = torch.randn(33, 5, dtype=torch.float64, generator=generator)
    rows = torch.randn(plan.num_rows, 5, dtype=torch.float64, generator=generator)
    one, other = (reference.dispatch(x, plan, None) * rows).sum(), (x * reference.combine(rows, plan, None)).sum()
    torch.testing.assert_close(one, other, rtol=1e-13, atol=0)
    p = torch.randn(33, 3, dtype=torch.float64, generator=generator)
    one = (reference.dispatch_weights(p, plan, None) * rows[:, 0]).sum()
    torch.testing.assert_close(one, (p * reference.combine_weights(rows[:, 0], plan, None)).sum(), rtol=1e-13, atol=0)


def test_dispatched_rows_are_the_tokens_named_by_the_plan():
    layer = make_layer([70], top_k=2, routing="some_dropped", dtype=torch.bfloat16)
    (plan,) = plans_of(layer.ids, 8)
    rows = reference.dispatch(layer.xs[0], plan, None)
    for row, source in enumerate(plan.source_of.tolist()):
        expected = torch.zeros(32, dtype=torch.bfloat16) if source < 0 else layer.xs[0][source // 2]
        assert torch.equal(rows[row], expected)

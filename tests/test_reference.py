"""The oracle itself: gradcheck, the autograd twin, clamp boundaries, NaN, rounding (rows: test_reference_rows.py)."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from megamoe_train import reference
from megamoe_train.functional import moe
from megamoe_train.plan import build_plan
from tests.numerics import assert_close, assert_twice_as_good
from tests.twin import twin, twin_with_grads
from tests.workloads import ROUTINGS, Layer, make_layer

CLAMPS = [None, 0.4]
FP64 = 1e-13  # a few hundred roundings of 1e-16


def run_reference(layer: Layer, clamp: float | None = None, **options) -> dict[str, Tensor]:
    """Forward and backward of a one-rank layer, named as the twin names them."""
    x, ids, weights, dy, fc1, fc2 = layer.merged()
    plan = build_plan(ids, fc1.shape[0])
    experts = list(fc1), list(fc2)
    y, h = reference.forward(x, plan, weights, *experts, clamp=clamp, group=None)
    grads = reference.backward(dy, x, h, plan, weights, *experts, clamp=clamp, group=None, **options)
    found = {"y": y, "dx": grads.dx, "dweights": grads.dweights}
    stacked = {name: torch.stack(value) for name, value in (("dfc1", grads.dfc1), ("dfc2", grads.dfc2)) if value}
    return {**found, **stacked}


def run_twin(layer: Layer, clamp: float | None = None) -> dict[str, Tensor]:
    return twin_with_grads(*layer.merged(), clamp)


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert_close(found[name], value, tolerance, name)


@pytest.mark.parametrize("clamp", CLAMPS)
@pytest.mark.parametrize("routing", ROUTINGS)
def test_matches_the_autograd_twin(routing, clamp):
    layer = make_layer([57], top_k=3, routing=routing, seed=3)
    assert_same(run_reference(layer, clamp), run_twin(layer, clamp), FP64)


@pytest.mark.parametrize(
    ("tokens", "top_k", "num_experts"), [(0, 2, 8), (1, 1, 1), (40, 1, 8), (300, 8, 8), (5, 2, 64), (260, 1, 1)]
)
def test_sizes_match_the_twin(tokens, top_k, num_experts):
    layer = make_layer([tokens], top_k=top_k, num_experts=num_experts, seed=4)
    assert_same(run_reference(layer, 0.7), run_twin(layer, 0.7), FP64)


@settings(max_examples=30)
@given(st.integers(0, 2**20), st.integers(0, 70), st.integers(1, 4), st.sampled_from([None, 0.1, 1.0]))
def test_any_routing_matches_the_twin(seed, tokens, num_experts, clamp):
    """Random ids, repeated and dropped ones too."""
    layer = make_layer([tokens], top_k=3, num_experts=4, hidden=8, inner=6, routing="balanced", seed=seed)
    layer.ids[0] = torch.randint(-1, num_experts, (tokens, 3), generator=torch.Generator().manual_seed(seed))
    assert_same(run_reference(layer, clamp), run_twin(layer, clamp), FP64)


def test_the_same_expert_twice_in_one_token_counts_twice():
    layer = make_layer([6], num_experts=4)
    layer.ids[0][:] = torch.tensor([2, 2])
    assert_same(run_reference(layer), run_twin(layer), FP64)


@pytest.mark.parametrize("clamp", CLAMPS)
def test_gradcheck(clamp):
    layer = make_layer([7], top_k=2, num_experts=4, hidden=6, inner=4, routing="some_dropped", seed=1)
    x, ids, weights, _, fc1, fc2 = layer.merged()
    leaves = [value.requires_grad_() for value in (x, weights, fc1, fc2)]
    if clamp is not None:
        with torch.no_grad():  # finite differences need every g and u away from the kinks, and both sides present
            h = torch.cat([(x @ expert.t()).flatten() for expert in fc1])
        assert (h.abs() - clamp).abs().min() > 1e-4 and (h.abs() > clamp).any() and (h.abs() < clamp).any()

    def layer_of(x, weights, fc1, fc2):
        return moe(x, ids, weights, fc1, fc2, clamp=clamp)

    assert torch.autograd.gradcheck(layer_of, leaves, eps=1e-6, atol=1e-7, rtol=1e-6)


def test_clamp_boundaries():
    """[g <= c] and [|u| <= c] include the boundary; beyond it the gradient is zero, the value constant."""
    c = 2.0
    just_beyond = torch.nextafter(torch.tensor(c), torch.tensor(9.0)).item()
    g = torch.tensor([c, just_beyond, -50.0, 1.0, 1.0, 1.0, 1.0])
    u = torch.tensor([1.0, 1.0, 1.0, c, -c, 2.5, -2.5])
    h = torch.cat([g, u])[None]
    da = torch.full((1, 7), 3.0)
    sigmoid = torch.sigmoid(g.clamp(max=c))
    slope = sigmoid * (1 + g.clamp(max=c) * (1 - sigmoid))
    dg, du = reference.swiglu_backward(da, h, c)[0].chunk(2)
    torch.testing.assert_close(
        dg, 3 * u.clamp(-c, c) * slope * torch.tensor([1.0, 0, 1, 1, 1, 1, 1]), rtol=1e-6, atol=0
    )
    torch.testing.assert_close(
        du, 3 * F.silu(g.clamp(max=c)) * torch.tensor([1.0, 1, 1, 1, 1, 0, 0]), rtol=1e-6, atol=0
    )
    assert dg[1] == 0 and du[5] == 0 and du[6] == 0 and dg[0] != 0 and du[3] != 0 and du[4] != 0
    limited = torch.cat([g.clamp(max=c), u.clamp(-c, c)])[None]
    assert torch.equal(reference.swiglu(h, c), reference.swiglu(limited, None))
    # The gate has no lower limit: -50 passes.
    assert reference.clamp_gate(g, c)[2] == -50.0


def test_clamp_off_and_far_away_agree():
    layer = make_layer([20])
    off, far = run_reference(layer, None), run_reference(layer, 1e30)
    assert all(torch.equal(off[name], far[name]) for name in off)


@pytest.mark.parametrize("clamp", CLAMPS)
@pytest.mark.parametrize("part", ["gate", "up"])
def test_nan_passes_the_clamp(part, clamp):
    """A NaN in one expert's weight shows in every y, dx and dp of its tokens, and nowhere else."""
    layer = make_layer([40], top_k=2, num_experts=4, seed=2)
    row = 3 if part == "gate" else 16 + 3
    layer.fc1[1, row, 5] = float("nan")
    hit = (layer.ids[0] == 1).any(1)
    assert hit.any() and not hit.all()
    found = run_reference(layer, clamp)
    for name in ("y", "dx"):
        assert torch.equal(found[name].isnan().any(1), hit), name
    assert torch.equal(found["dweights"].isnan(), layer.ids[0] == 1)
    for name in ("dfc1", "dfc2"):
        assert found[name].isnan().flatten(1).any(1).tolist() == [False, True, False, False], name


def test_nan_in_h_is_nan_in_its_own_gradient():
    """Where autograd's clamp would hide it (a NaN is neither below nor above), the gate's gradient stays NaN."""
    h = torch.tensor([[float("nan"), 1.0, 1.0, 1.0]])
    dg, du = reference.swiglu_backward(torch.ones(1, 2), h, 2.0)[0].chunk(2)
    assert dg.isnan().tolist() == [True, False] and du.isnan().tolist() == [True, False]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_lower_precision_by_the_2x_rule(dtype):
    """Every tensor, and every expert's weight gradient, at most twice as far from fp64 as autograd in that dtype."""
    layer = make_layer([300], top_k=4, num_experts=8, hidden=64, inner=48, routing="zipf", dtype=dtype, seed=9)
    exact_layer = Layer(
        *([part.to(torch.float64 if part.is_floating_point() else part.dtype) for part in parts] for parts in
          (layer.xs, layer.ids, layer.weights, layer.dys)), layer.fc1.double(), layer.fc2.double(),
    )  # fmt: skip
    found, plain, exact = run_reference(layer, 1.5), run_twin(layer, 1.5), run_twin(exact_layer, 1.5)
    for name in ("y", "dx", "dweights"):
        assert_twice_as_good(found[name], plain[name], exact[name], name)
    for name in ("dfc1", "dfc2"):
        for e in range(8):
            assert_twice_as_good(found[name][e], plain[name][e], exact[name][e], f"{name}[{e}]")


def test_dtypes_of_what_comes_back():
    for dtype, wide in (
        (torch.bfloat16, torch.float32),
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
    ):
        found = run_reference(make_layer([9], dtype=dtype))
        assert found["y"].dtype == found["dx"].dtype == dtype
        assert found["dweights"].dtype == found["dfc1"].dtype == found["dfc2"].dtype == wide


def test_roundings_stand_where_the_contract_puts_them():
    """bf16, one token, one expert, step by step: h rounded, a from the rounded h in fp32, p before fc2, then fc2."""
    layer = make_layer([1], top_k=1, num_experts=1, hidden=64, inner=32, dtype=torch.bfloat16, seed=11)
    x, _, weights, _, fc1, fc2 = layer.merged()
    h = (x.float() @ fc1[0].float().t()).bfloat16().float()
    a = (F.silu(h[:, :32].clamp(max=1.0)) * h[:, 32:].clamp(-1.0, 1.0) * weights).bfloat16()
    expected = (a.float() @ fc2[0].float().t()).bfloat16()
    assert torch.equal(run_reference(layer, 1.0)["y"], expected)


@pytest.mark.parametrize("missing", ["x", "weights", "fc1", "fc2"])
def test_each_gradient_can_be_left_out(missing):
    layer = make_layer([40], seed=12)
    full = run_reference(layer)
    need = reference.Need(**{missing: False})
    found = run_reference(layer, need=need)
    assert found.get(f"d{missing}") is None
    for name, value in found.items():
        assert value is None or torch.equal(value, full[name]), name


def test_given_buffers_are_added_to():
    layer = make_layer([40], seed=13)
    fresh = run_reference(layer)
    ones = {name: [torch.ones_like(expert) for expert in fresh[name]] for name in ("dfc1", "dfc2")}
    ones["dfc1"][2] = None  # no gradient wanted for this one
    x, ids, weights, dy, fc1, fc2 = layer.merged()
    plan = build_plan(ids, 8)
    _, h = reference.forward(x, plan, weights, list(fc1), list(fc2), clamp=None, group=None)
    grads = reference.backward(dy, x, h, plan, weights, list(fc1), list(fc2), clamp=None, group=None, **ones)
    for name in ("dfc1", "dfc2"):
        for e, (buffer, returned) in enumerate(zip(ones[name], getattr(grads, name), strict=True)):
            assert returned is buffer
            if buffer is not None:
                torch.testing.assert_close(buffer, fresh[name][e] + 1, rtol=1e-13, atol=1e-13)


def test_h_computed_again_has_the_same_bits():
    x, ids, weights, dy, fc1, fc2 = make_layer([200], dtype=torch.bfloat16, seed=14).merged()
    plan = build_plan(ids, 8)
    args = plan, weights, list(fc1), list(fc2)
    _, h = reference.forward(x, *args, clamp=None, group=None)
    kept = reference.backward(dy, x, h, *args, clamp=None, group=None)
    again = reference.backward(dy, x, None, *args, clamp=None, group=None)
    assert torch.equal(kept.dx, again.dx) and torch.equal(kept.dweights, again.dweights)
    for mine, theirs in zip(kept.dfc1 + kept.dfc2, again.dfc1 + again.dfc2, strict=True):
        assert torch.equal(mine, theirs)


def test_autocast_does_not_reach_inside():
    layer = make_layer([20], dtype=torch.float32)
    plain = run_reference(layer)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = run_reference(layer)
    assert all(torch.equal(found[name], plain[name]) and found[name].dtype == plain[name].dtype for name in plain)


@pytest.mark.parametrize(
    ("seam", "broken"),
    [
        ("clamp_gate", lambda g, clamp: g),
        ("clamp_up", lambda u, clamp: u),
        ("weigh", lambda act, p, dtype: act.to(dtype)),
        ("swiglu", lambda h, clamp: F.silu(h.chunk(2, -1)[1]) * h.chunk(2, -1)[0]),
    ],
)
def test_the_comparison_with_the_twin_sees_mutations(monkeypatch, seam, broken):
    layer = make_layer([57], top_k=3, seed=3)
    expected = run_twin(layer, 0.4)
    monkeypatch.setattr(reference, seam, broken)
    with pytest.raises(AssertionError, match="y: relative L2 error"):
        assert_same(run_reference(layer, 0.4), expected, FP64)


def test_the_twin_is_the_formula():
    """One token, two experts, written out."""
    x, ids, weights, _, fc1, fc2 = make_layer([1], num_experts=3, seed=15).merged()
    expected = torch.zeros(1, 32, dtype=torch.float64)
    for k in range(2):
        e = int(ids[0, k])
        gate, up = (x @ fc1[e].t()).chunk(2, -1)
        half = torch.tensor(0.5, dtype=torch.float64)
        gate, up = torch.minimum(gate, half), torch.maximum(torch.minimum(up, half), -half)
        expected += weights[0, k] * (gate / (1 + torch.exp(-gate)) * up) @ fc2[e].t()
    torch.testing.assert_close(twin(x, ids, weights, fc1, fc2, 0.5), expected, rtol=1e-13, atol=1e-14)

"""The fused backend around its kernels: sizing, verdicts, caches, gradient buffers, refusals.

The kernels are plain torch here (fake_fused.py); tests/gpu has the real ones."""

from __future__ import annotations

import itertools

import pytest
import torch

from megamoe_train import MegaMoE, MegaMoEConfig, reference
from megamoe_train.functional import moe
from megamoe_train.plan import ROW_TILE, build_plan
from megamoe_train.workspace import Shape
from tests.fake_fused import NAMES, FakeWorkspace, fused, layer_of, run, same_as_reference, two_ranks  # noqa: F401
from tests.test_autograd import MainGrads, leaves_of, packed_by
from tests.workloads import ROUTINGS

pytestmark = pytest.mark.usefixtures("fused")


@pytest.mark.parametrize("recompute", [None, "fc1"])
@pytest.mark.parametrize("routing", ROUTINGS)
def test_a_call_is_the_references(fused, routing, recompute):  # noqa: F811
    same_as_reference(layer_of(routing=routing), clamp=0.5, recompute=recompute)
    again = [] if recompute is None else ["fc1_again"]
    assert fused[1].names() == ["forward", *again, "backward"]


@pytest.mark.parametrize("frozen", [("x",), ("weights",), ("fc1",), ("fc1", "fc2"), ("x", "weights", "fc2")])
def test_frozen_inputs(fused, frozen):  # noqa: F811
    same_as_reference(layer_of(), frozen)
    tables = fused[1].calls[-1][1]["tables"]
    assert [table is None for table in tables] == ["fc1" in frozen, "fc2" in frozen]


def test_no_tokens():
    same_as_reference(layer_of(0))


def test_h_is_kept_with_at_most_a_tile_of_padding_an_expert():
    leaves, ids, dy = leaves_of(layer_of(300))
    kept, y = packed_by(lambda: moe(leaves["x"], ids, *[leaves[name] for name in NAMES[1:]], backend="fused"))
    inputs = {leaf.data_ptr() for leaf in leaves.values()}
    (h,) = (tensor for tensor in kept if tensor.data_ptr() not in inputs)
    assert h.shape[1] == 256 and 900 <= h.shape[0] <= 900 + 4 * ROW_TILE
    y.backward(dy)


def test_a_second_backward_is_refused_by_name():
    leaves, ids, dy = leaves_of(layer_of())
    y = moe(leaves["x"], ids, *[leaves[name] for name in NAMES[1:]], backend="fused")
    y.backward(dy, retain_graph=True)
    with pytest.raises(RuntimeError, match="megamoe: backward of this forward has run already, and the fused backend"):
        y.backward(dy)


def test_forwards_in_flight_and_backwards_in_any_order():
    layers = [layer_of(size, seed=size) for size in (5, 40, 0, 17)]
    found, pending = [leaves_of(layer) for layer in layers], []
    for leaves, ids, _ in found:
        pending.append(moe(leaves["x"], ids, *[leaves[name] for name in NAMES[1:]], backend="fused"))
    for number in (2, 0, 3, 1):
        pending[number].backward(found[number][2])
    for layer, (leaves, _, _) in zip(layers, found, strict=True):
        alone, ids, dy = leaves_of(layer)
        run(alone, ids, dy, "reference")
        assert all(torch.equal(leaves[name].grad, alone[name].grad) for name in NAMES)


# ---- caches and gradients --------------------------------------------------------------------------------------------


def test_maps_are_made_once_a_layer_and_again_when_any_weight_moves(fused):  # noqa: F811
    x, ids, weights, _, fc1, fc2 = layer_of().merged()
    other1, other2, lists = fc1.clone(), fc2.clone(), [expert.clone() for expert in fc1]

    def maps_with(fc1, fc2):
        moe(x, ids, weights, fc1, fc2, backend="fused")
        return fused[1].calls[-1][1]["maps"]

    first, second = maps_with(fc1, fc2), maps_with(other1, other2)
    assert first is not second and maps_with(fc1, fc2) is first and maps_with(other1, other2) is second
    listed = maps_with(lists, fc2)
    assert listed is not first and maps_with(lists, fc2) is listed
    lists[3] = lists[3].clone()
    moved = maps_with(lists, fc2)
    assert moved is not listed and moved.fc1[3].data_ptr() == lists[3].data_ptr()
    assert maps_with(lists, fc2) is moved


def test_fresh_gradients_are_written_and_a_sinks_are_added_to(fused):  # noqa: F811
    layer = layer_of()
    leaves, ids, dy = leaves_of(layer)
    run(leaves, ids, dy)
    assert fused[1].calls[-1][1]["accumulate"] == (False, False)
    assert {b.dtype for table in fused[1].calls[-1][1]["tables"] for b in table.buffers} == {torch.bfloat16}
    again, _, _ = leaves_of(layer)
    sink = MainGrads(again["fc1"], again["fc2"])
    for count in (1, 2):
        run(again, ids, dy, wgrad_sink=sink)
        assert fused[1].calls[-1][1]["accumulate"] == (True, True)
        for name in ("fc1", "fc2"):
            expected = 0.5 + count * leaves[name].grad.float()
            torch.testing.assert_close(sink.main_grad[id(again[name])], expected, rtol=2e-2, atol=2e-2)
    tables = [call["tables"] for name, call in fused[1].calls if name == "backward"]
    assert tables[1][0] is tables[2][0] and tables[1][1] is tables[2][1]  # the same buffers: the same table


def test_buffers_that_tma_cannot_write_and_frozen_experts(fused):  # noqa: F811
    """Unaligned, strided, frozen, without a buffer: every expert another case, all gradients right."""
    layer = layer_of(60)
    x, ids, weights, dy, fc1, fc2 = layer.merged()
    plan = build_plan(ids, 4)
    args = plan, weights, list(fc1), list(fc2)
    _, h = reference.forward(x, *args, clamp=None, group=None)
    expected = reference.backward(dy, x, h, *args, clamp=None, group=None)
    experts = [expert.clone().requires_grad_(number != 2) for number, expert in enumerate(fc1)]
    sink, size = MainGrads(*experts[:2]), experts[0].numel()
    aligned = torch.full((size + 4,), 0.5)
    sink.main_grad[id(experts[0])] = aligned[1 : size + 1].view_as(experts[0])
    sink.main_grad[id(experts[1])] = torch.full(experts[1].t().shape, 0.5).t()
    moe(x, ids, weights, experts, fc2, backend="fused", wgrad_sink=sink).backward(dy)
    for number in (0, 1):
        buffer = sink.main_grad[id(experts[number])]
        torch.testing.assert_close(buffer, expected.dfc1[number] + 0.5, rtol=1e-6, atol=1e-6)
    assert experts[2].grad is None and torch.equal(experts[3].grad, expected.dfc1[3].bfloat16())
    assert (aligned[[0, -3, -2, -1]] == 0.5).all()
    assert fused[1].calls[-1][1]["accumulate"][0] is True


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_sinks_buffer_must_be_fp32(fused, dtype):  # noqa: F811
    """Found out inside the launch, so that peers are told."""
    leaves, ids, dy = leaves_of(layer_of())
    sink = MainGrads(leaves["fc1"], leaves["fc2"])
    sink.main_grad = {key: buffer.to(dtype) for key, buffer in sink.main_grad.items()}
    with pytest.raises(ValueError, match=rf"wgrad_sink: got a buffer of {dtype}; allowed: torch.float32"):
        run(leaves, ids, dy, wgrad_sink=sink)
    assert fused[1].names() == ["forward"]


def test_one_of_several_ranks_that_has_frozen_fc1_still_takes_part():
    """Its peers may want dfc1, for which they pull this rank's x: the gradient goes to a matrix that nobody reads."""
    from megamoe_train.fused import _Targets

    weights = [torch.zeros(256, 256, dtype=torch.bfloat16) for _ in range(3)]
    for given, dtype in itertools.product((None, [None] * 3), (torch.float32, torch.bfloat16)):
        assert _Targets(given, weights, False, torch.float32).buffers is None
        targets = _Targets(given, weights, False, dtype, always=True)
        (spare,) = {buffer.data_ptr() for buffer in targets.buffers}
        assert targets.buffers[0].dtype == dtype and targets.buffers[0].shape == weights[0].shape
        assert not targets.accumulate and targets.stand_ins == [] and spare not in {w.data_ptr() for w in weights}
    wanted = [torch.zeros(256, 256) for _ in range(3)]
    taken = _Targets(wanted, weights, False, torch.float32, always=True).buffers
    assert all(a is b for a, b in zip(taken, wanted, strict=True))


def test_a_rank_that_fails_before_its_launch_frees_the_others(fused):  # noqa: F811
    space = two_ranks()
    with pytest.raises(torch.OutOfMemoryError), space.launching():
        raise torch.OutOfMemoryError("no room for h")
    assert space.aborted == 1
    alone = FakeWorkspace(Shape(1, 4, 3, 256, 100))
    fused[1].fail = RuntimeError("launch failed")
    with pytest.raises(RuntimeError, match="launch failed"):
        same_as_reference(layer_of(), workspace=alone)
    assert alone.aborted == 0
    same_as_reference(layer_of(), workspace=alone)


def test_the_module_runs_on_it():
    config = MegaMoEConfig(256, 128, num_experts=4, top_k=3, backend="fused")
    x, ids, weights, dy, _, _ = layer_of(30).merged()
    for tokens in (None, 50):
        layer = MegaMoE(config, dtype=torch.bfloat16)
        layer.workspace = None if tokens is None else FakeWorkspace(Shape.of(config, tokens))
        y = layer(x, ids, weights)
        assert torch.equal(y, moe(x, ids, weights, layer.fc1, layer.fc2, backend="reference"))
        y.backward(dy)
        assert layer.fc1.grad.isfinite().all() and layer.fc1.grad.abs().max() > 0
        assert layer.workspace is None or layer.workspace.verdicts.plans == 1

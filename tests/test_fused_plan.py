"""The fused backend's plans: sizing, verdicts, ids, workspaces; what the kernels do not take.

The kernels are plain torch here (fake_fused.py); tests/gpu has the real ones."""

from __future__ import annotations

import re

import pytest
import torch

from megamoe_train import ops_plan
from megamoe_train.functional import moe
from megamoe_train.plan import ROW_TILE, build_plan
from megamoe_train.verdicts import Verdicts
from megamoe_train.workspace import Shape
from tests.fake_fused import NAMES, FakeWorkspace, fused, layer_of, run, same_as_reference, two_ranks  # noqa: F401
from tests.test_autograd import leaves_of

pytestmark = pytest.mark.usefixtures("fused")


# ---- sizing ----------------------------------------------------------------------------------------------------------


def test_rows_that_do_not_fit_are_launched_once_more():
    from megamoe_train.fused_plan import FusedPlan, room_for

    space, ids = two_ranks(), layer_of(200).ids[0]
    space.high_water = 2 * ROW_TILE
    plan, launches = FusedPlan.build(space, ids), []
    first = plan.device_plan
    assert plan.run(lambda device_plan: launches.append(device_plan) or len(launches)) == 2
    assert launches == [first, plan.device_plan] and first is not plan.device_plan
    rows = build_plan(ids, 4).num_rows
    assert plan.device_plan.rows == rows == space.most_rows and first.capacity < rows <= plan.device_plan.capacity
    assert space.high_water == room_for(rows)
    assert plan.run(lambda device_plan: "again") == "again"  # another layer, the same plan: no verdict is awaited
    small = FusedPlan.build(space, ids[:5])
    small.run(lambda device_plan: None)
    assert space.high_water == room_for(rows) == small.device_plan.capacity  # it never falls


def test_room_is_left_but_little():
    from megamoe_train.fused_plan import most_rows_alone, room_for

    for rows in (0, 1, 128, 5000, 51200, 52224, 10**6):
        assert rows * 33 // 32 <= room_for(rows) <= max(rows * 1.07 + ROW_TILE, ROW_TILE)
        assert room_for(rows) % ROW_TILE == 0
    for tokens, routing in ((0, "uniform"), (1, "uniform"), (300, "zipf"), (300, "hot_expert"), (128, "balanced")):
        ids = layer_of(tokens, routing).ids[0]
        rows = build_plan(ids, 4).num_rows
        assert rows <= most_rows_alone(ids.numel(), 4) <= ids.numel() + 4 * ROW_TILE
    assert most_rows_alone(2, 100) == 256  # two slots fill two tiles at most


def test_exact_sizing_allocates_what_is_needed(fused):  # noqa: F811
    space = FakeWorkspace(Shape(1, 4, 3, 256, 100), sizing="exact")
    layer = layer_of(60)
    same_as_reference(layer, workspace=space)
    assert fused[1].calls[0][1]["capacity"] == build_plan(layer.ids[0], 4).num_rows


def test_fixed_sizing_reads_nothing_and_tells_later(fused):  # noqa: F811
    from megamoe_train import RowOverflow, check_workspace

    space = FakeWorkspace(Shape(1, 4, 3, 256, 1000), sizing="fixed", capacity=640)
    same_as_reference(layer_of(30), workspace=space)
    large, ids, _ = leaves_of(layer_of(400))
    with torch.no_grad():
        y = moe(large["x"], ids, *[large[name] for name in NAMES[1:]], backend="fused", workspace=space)
    assert y.isnan().all() and fused[1].calls[-1][1] == {**fused[1].calls[-1][1], "capacity": 640, "good": False}
    rows = build_plan(ids, 4).num_rows
    with pytest.raises(RowOverflow, match=f"rank 0 has room for 640 rows; this routing needs up to {rows}"):
        same_as_reference(layer_of(30), workspace=space)
    same_as_reference(layer_of(30), workspace=space)
    check_workspace(space)


def test_a_captured_plan_is_judged_at_every_replay(fused, monkeypatch):  # noqa: F811
    from megamoe_train import RowOverflow, check_workspace
    from megamoe_train.fused_plan import FusedPlan

    space = FakeWorkspace(Shape(1, 4, 3, 256, 1000), sizing="fixed", capacity=640)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    plan = FusedPlan.build(space, layer_of(30).ids[0])
    with pytest.raises(ValueError, match='sizing: got "high_water" while a CUDA graph is captured'):
        FusedPlan.build(FakeWorkspace(space.shape), layer_of(30).ids[0])
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    check_workspace(space)
    plan.device_plan.status[:7] = torch.tensor([2, ops_plan.PlanCode.OVERFLOW, 0, -1, 640, 900, 900])  # a replay's
    with pytest.raises(RowOverflow, match="needs up to 900"):
        check_workspace(space)
    check_workspace(space)  # told once
    plan.device_plan.status[:2] = torch.tensor([3, ops_plan.PlanCode.GOOD])
    check_workspace(space)
    assert len(space.verdicts.unread) == 1


def test_statuses_of_captured_plans_are_not_used_again():
    verdicts = Verdicts(pinned=False)
    verdicts.next(captured=False)
    kept = verdicts.next(captured=True)
    seen = {verdicts.next(captured=False).data_ptr() for _ in range(3000)}
    assert kept.data_ptr() not in seen and len(seen) == len(verdicts.statuses) - 1
    for _ in range(len(verdicts.statuses) - 1):
        verdicts.next(captured=True)
    with pytest.raises(RuntimeError, match="captured graphs hold all 1024 verdicts"):
        verdicts.next(captured=False)


def test_a_plan_that_did_not_come_about_leaves_its_status_to_the_next():
    verdicts = Verdicts(pinned=False)
    offered = verdicts.offer()
    assert verdicts.offer() == offered and verdicts.plans == 0
    taken = verdicts.take()
    assert taken.data_ptr() == offered and verdicts.plans == 1
    taken[0] = 7
    verdicts.plans += len(verdicts.statuses) - 1
    assert verdicts.next(captured=False).data_ptr() == offered and taken[0] == 0  # cleared when it is offered again


# ---- plans, ids, workspaces ------------------------------------------------------------------------------------------


def test_bad_ids_are_the_devices_word_and_the_next_call_works():
    leaves, ids, dy = leaves_of(layer_of())
    wrong = ids.clone()
    wrong[7, 1] = 4
    message = "topk_ids: got expert 4 at rank 0, token 7, k = 1; allowed: -1 (dropped) and 0..3"
    with pytest.raises(ValueError, match=re.escape(message)):
        run(leaves, wrong, dy)
    same_as_reference(layer_of())


def test_plans_of_every_kind_are_taken(fused):  # noqa: F811
    backend, fake = fused
    leaves, ids, _ = leaves_of(layer_of())
    space = FakeWorkspace(Shape(1, 4, 3, 256, 100))
    ours = backend.plan(ids, 4, None, space, hidden_size=256)
    args = leaves["x"].detach(), ids, *[leaves[name].detach() for name in NAMES[1:]]
    expected = moe(*args, backend="reference")
    for plan in (ours, build_plan(ids, 4)):
        assert torch.equal(moe(*args, backend="fused", plan=plan), expected)
    assert fake.calls[0][1]["good"] and ours.device_plan.rows is not None
    assert torch.equal(moe(*args, backend="reference", plan=ours), expected)
    with pytest.raises(ValueError, match="workspace: got another one than the plan's"):
        moe(*args, backend="fused", plan=ours, workspace=FakeWorkspace(space.shape))
    with pytest.raises(ValueError, match="plan: got num_tokens = 20; allowed: 3"):
        moe(args[0][:3], ids[:3], args[2][:3], *args[3:], backend="fused", plan=ours)
    with pytest.raises(ValueError, match="workspace: got FakeWorkspace; allowed: None with the reference backend"):
        moe(*args, backend="reference", workspace=space)


def test_narrow_ids():
    layer = layer_of()
    leaves, ids, dy = leaves_of(layer)
    run(leaves, ids.to(torch.int16), dy)
    other, _, _ = leaves_of(layer)
    run(other, ids, dy)
    assert all(torch.equal(leaves[name].grad, other[name].grad) for name in NAMES)


def test_calls_without_a_workspace_share_one_that_grows():
    from megamoe_train import fused_plan

    same_as_reference(layer_of(20))
    (first,) = fused_plan._shared.values()
    same_as_reference(layer_of(10))
    assert list(fused_plan._shared.values()) == [first] and first.shape.tokens == 128
    same_as_reference(layer_of(200))
    (second,) = fused_plan._shared.values()
    assert second is not first and second.shape.tokens >= 200
    same_as_reference(layer_of(20, top_k=2))
    assert len(fused_plan._shared) == 2
    assert fused_plan.shared_bytes() == sum(space.layout.bytes for space in fused_plan._shared.values())


def closed(space: FakeWorkspace) -> FakeWorkspace:
    space.closed = True
    return space


@pytest.mark.parametrize(
    ("space", "message"),
    [
        (lambda: object(), "workspace: got object; allowed: None or a megamoe_train.Workspace"),
        (lambda: closed(FakeWorkspace(Shape(1, 4, 3, 256, 20))), "workspace: got one that is closed"),
        (lambda: two_ranks(), "workspace: got ranks = 2; allowed: 1, as in this call"),
        (lambda: FakeWorkspace(Shape(1, 8, 3, 256, 20)), "workspace: got experts = 8; allowed: 4"),
        (lambda: FakeWorkspace(Shape(1, 4, 2, 256, 20)), "workspace: got top_k = 2; allowed: 3"),
        (lambda: FakeWorkspace(Shape(1, 4, 3, 512, 20)), "workspace: got hidden = 512; allowed: 256"),
        (lambda: FakeWorkspace(Shape(1, 4, 3, 256, 19)), "x: got 20 tokens; allowed: at most 19, the tokens of the"),
    ],
)
def test_a_workspace_of_another_call_is_refused(space, message):
    leaves, ids, dy = leaves_of(layer_of())
    with pytest.raises(ValueError, match=re.escape(message)):
        run(leaves, ids, dy, workspace=space())
    same_as_reference(layer_of())


def test_a_group_without_a_workspace_is_told_what_to_make(monkeypatch):
    from megamoe_train import comm, fused_plan

    monkeypatch.setattr(comm, "size_of", lambda group: 2)
    message = (
        "workspace: got None with a group of 2 ranks; allowed: one made before, by all ranks together: "
        "megamoe_train.Workspace.create(megamoe_train.WorkspaceShape(ranks=2, experts=8, top_k=3, hidden=256, "
        "tokens=MOST_PER_RANK), group=group)"
    )
    with pytest.raises(ValueError, match=re.escape(message)):
        fused_plan.workspace_for(None, torch.zeros(5, 3, dtype=torch.int64), 8, 256, object())


@pytest.mark.parametrize(
    ("shape", "options", "message"),
    [
        ({"hidden": 320}, {}, 'H: got 320; allowed: a multiple of 256 (any with backend="reference")'),
        ({"inner": 64}, {}, "I: got 64; allowed: a multiple of 128"),
        ({"top_k": 17, "num_experts": 32}, {}, "top_k: got 17; allowed: 1..16"),
        ({}, {"clamp": 1.001}, "clamp: got 1.001; allowed: None or a number that bf16 holds exactly"),
    ],
)
def test_what_the_kernels_do_not_take(shape, options, message):
    leaves, ids, dy = leaves_of(layer_of(**shape))
    with pytest.raises(ValueError, match=re.escape(message)):
        run(leaves, ids, dy, **options)
    run(leaves, ids, dy, "reference", **options)


def test_dtypes_strides_and_alignment_are_named():
    x, ids, weights, _, fc1, fc2 = layer_of().merged()
    for dtype in (torch.float32, torch.float16):
        with pytest.raises(ValueError, match=f"x: got dtype {dtype}; allowed: torch.bfloat16"):
            moe(x.to(dtype), ids, weights.float().to(dtype), fc1.to(dtype), fc2.to(dtype), backend="fused")
    strided = list(fc2)
    strided[2] = fc2[2].t().contiguous().t()
    with pytest.raises(
        ValueError, match=r"fc2\[2\]: got strides \(1, 256\) at address .*; allowed: contiguous, 16-byte"
    ):
        moe(x, ids, weights, fc1, strided, backend="fused")
    shifted = torch.empty(fc1.numel() + 1, dtype=fc1.dtype)[1:].view(fc1.shape).copy_(fc1)
    with pytest.raises(ValueError, match=r"fc1: got strides .* at address .*; allowed: contiguous, 16-byte aligned"):
        moe(x, ids, weights, shifted, fc2, backend="fused")
    moved = torch.empty(x.numel() + 1, dtype=x.dtype)[1:].view(x.shape).copy_(x)  # activations are copied instead
    assert torch.equal(
        moe(moved, ids, weights, fc1, fc2, backend="fused"), moe(x, ids, weights, fc1, fc2, backend="reference")
    )

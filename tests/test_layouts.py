"""The local memory of a plan and of a fused launch: parts that do not overlap, and views that lie where csrc says."""

import itertools
from types import SimpleNamespace

import pytest
import torch

from megamoe_train import ops, ops_fused, ops_plan
from megamoe_train.experts import per_expert, places_of
from megamoe_train.workspace import ALIGNMENT, Shape

pytestmark = pytest.mark.usefixtures("extension")
PLANS = list(itertools.product((1, 2, 8), (8, 384), (0, 1, 6, 1024, 1025, 8192 * 6, 10**6)))  # R, E, T * K
LAUNCHES = list(itertools.product((128, 51200), (0, 1, 8192), (256, 7168), (128, 384, 3072)))  # capacity, T, H, I


@pytest.fixture(scope="module")
def extension():
    ops.load()


def check_regions(offsets: list[int], sizes: list[int]) -> None:
    """Aligned, in this order, each with its room and less than one step more."""
    for (begin, end), size in zip(itertools.pairwise(offsets), sizes, strict=True):
        assert begin % ALIGNMENT == 0 and end - begin >= size > end - begin - ALIGNMENT, (begin, end, size)


@pytest.mark.parametrize(("ranks", "experts", "slots"), PLANS)
def test_tables_of_a_plan(ranks, experts, slots):
    layout, local = ops_plan.table_layout(ranks, experts, slots), experts // ranks
    counting = (layout.topk_ids - layout.block_counts) // (4 * experts)  # CTAs, and what alignment leaves over
    assert max(1, min(slots // 2048, 100)) <= counting <= 128 + ALIGNMENT // (4 * experts)
    words = [8, ranks * experts, local, local + 1, (layout.topk_ids - layout.block_counts) // 4, slots, 2 * slots]
    check_regions(list(layout), [4 * size for size in words])


@pytest.mark.parametrize("ranks", [1, 2])
def test_views_of_a_plan_lie_where_the_kernels_write(ranks):
    shape, ids = Shape(ranks, 8, 3, 256, 50), torch.zeros(40, 3, dtype=torch.int64)
    layout = ops_plan.table_layout(ranks, 8, ids.numel())
    tables = torch.arange(layout.source_of // 4 + 2 * 384, dtype=torch.int32)
    space = SimpleNamespace(shape=shape)
    plan = ops_plan.DevicePlan(space, ids, 384, torch.zeros(8), tables)
    sizes = {"slot_of": (40, 3), "topk_ids": (40, 3), "counts": (ranks, 8), "expert_rows": (8 // ranks,),
             "expert_offset": (8 // ranks + 1,), "source_of": (384,)}  # fmt: skip
    for name, size in sizes.items():
        view = getattr(plan, name)
        wide = name in ("slot_of", "source_of")
        assert view.shape == size and view.dtype == (torch.int64 if wide else torch.int32), name
        assert view.data_ptr() == tables.data_ptr() + getattr(layout, name), name
    assert plan.arguments == (384, tables, None)
    plan.capacity = 200  # as the staged path cuts it
    assert plan.source_of.shape == (200,)
    own = torch.zeros(384, dtype=torch.int64)
    late = ops_plan.DevicePlan(space, ids, 384, torch.zeros(8), tables[: layout.source_of // 4], own_source_of=own)
    assert late.source_of.data_ptr() == own.data_ptr() and late.slot_of.shape == (40, 3)


@pytest.mark.parametrize(("capacity", "tokens", "hidden", "inter"), LAUNCHES)
def test_scratch_of_a_launch(capacity, tokens, hidden, inter):
    layout = ops_fused.scratch_layout(capacity, tokens, hidden, inter)
    counters = 9 + 4 * (capacity // 128) + (tokens + 31) // 32
    check_regions(list(layout[:5]), [2 * capacity * hidden, 2 * capacity * inter, 4 * capacity, 4 * counters])
    partials = 4 * capacity * -(-inter // ops_fused.DP_TILE)
    check_regions(list(layout[5:]), [partials, 2 * capacity * hidden])
    assert layout.pool == layout.dp_partials == 0


def test_schedule_of_a_launch():
    """32 experts of 1536 rows, H 4096, I 2048, 66 clusters: six pairs of row tiles."""
    schedule = ops_fused.Schedule.of(32, 1536, 2048, 4096, 66)
    forward = 32 * 6 * (2048 // 128 + 4096 // 256)
    wgrads = 32 * (16 * 8 + 16 * 16)  # pairs of row tiles of the gradients, and their column tiles
    dgrads = 32 * 6 * (2048 // 256 + 4096 // 256)
    assert schedule.fc2_lag == 32 and 0 < schedule.dgrad1_lag < schedule.wgrads_lag <= 32
    assert schedule.forward_waves == -(-forward // 66) and schedule.backward_waves == -(-(dgrads + wgrads) // 66)


def test_views_of_scratch_have_the_pools_shapes():
    layout = ops_fused.scratch_layout(256, 40, 512, 384)
    call = object.__new__(ops_fused.BackwardCall)
    call.plan, call.maps, call.hidden = SimpleNamespace(capacity=256), SimpleNamespace(inter=384), 512
    call.layout = layout
    call.scratch, call.more = (torch.zeros(size, dtype=torch.uint8) for size in (layout.bytes, layout.more_bytes))
    shapes = {"pool": (256, 512), "act": (256, 384), "row_weights": (256,),
              "dp_partials": (256, 2), "second_pool": (256, 512)}  # fmt: skip
    for name, shape in shapes.items():
        view = getattr(call, name)
        base = call.scratch if name in ("pool", "act", "row_weights") else call.more
        assert view.shape == shape and view.data_ptr() == base.data_ptr() + getattr(layout, name), name


def test_a_call_with_other_tokens_than_the_plans_is_refused():
    ids, x = torch.zeros(40, 3, dtype=torch.int64), torch.zeros(39, 256)
    plan = ops_plan.DevicePlan(SimpleNamespace(), ids, 384, torch.zeros(8), torch.zeros(8, dtype=torch.int32))
    maps = ops_fused.WeightMaps(128, torch.zeros(4, 8, 128, dtype=torch.uint8))
    with pytest.raises(ValueError, match="x: got 39 tokens; allowed: 40, those of the plan"):
        ops_fused.ForwardCall(plan, x, torch.zeros(39, 3), maps)


def test_cached_tables_are_told_apart_by_all_that_they_hold():
    stack = torch.zeros(4, 8, 16)
    seen = [per_expert((stack,)), per_expert((stack.view(torch.int32),)), per_expert((stack[1:],)),
            per_expert((stack.view(4, 16, 8),)), list(stack), list(stack.view(torch.int32)),
            list(stack[::2])]  # fmt: skip
    assert len({places_of(matrices) for matrices in seen}) == len(seen)
    assert places_of(per_expert((stack.clone().copy_(stack),))) != places_of(seen[0])
    assert places_of(per_expert((stack.view(4, 8, 16),))) == places_of(seen[0])

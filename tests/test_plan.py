"""The routing plan against a plain-Python restatement of its rule, and its properties for any routing."""

from __future__ import annotations

import dataclasses

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from megamoe_train import plan as plan_module
from megamoe_train.plan import ROW_TILE, RoutingPlan, build_plan, decode_source, plans_of
from tests.distributed import run_ranks
from tests.workloads import ROUTINGS, route


@st.composite
def routings(draw) -> tuple[list[Tensor], int]:
    """(ids of each rank, number of experts): ragged T, T = 0, K = 1, any -1, repeated experts in one token."""
    ranks = draw(st.sampled_from([1, 2, 3, 4]))
    num_experts = ranks * draw(st.integers(1, 5))
    top_k = draw(st.integers(1, 4))
    highest = draw(st.integers(-1, num_experts - 1))  # -1: everything dropped; low: empty experts and ranks
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**20)))
    sizes = [draw(st.one_of(st.just(0), st.integers(1, 9), st.integers(120, 300))) for _ in range(ranks)]
    return [torch.randint(-1, highest + 1, (size, top_k), generator=generator) for size in sizes], num_experts


def rows_by_the_rule(ids: list[Tensor], num_experts: int, owner: int) -> list[tuple[int, int, int] | None]:
    """Rows of one owner, written from the rule alone: (source rank, token, k), None for padding."""
    local = num_experts // len(ids)
    rows: list[tuple[int, int, int] | None] = []
    for expert in range(owner * local, (owner + 1) * local):
        for source, source_ids in enumerate(ids):
            for token, chosen in enumerate(source_ids.tolist()):
                rows += [(source, token, k) for k, e in enumerate(chosen) if e == expert]
        rows += [None] * (-len(rows) % ROW_TILE)
    return rows


def assert_equal_plans(one: RoutingPlan, other: RoutingPlan) -> None:
    for field in dataclasses.fields(RoutingPlan):
        mine, theirs = getattr(one, field.name), getattr(other, field.name)
        same = torch.equal(mine, theirs) and mine.dtype == theirs.dtype if isinstance(mine, Tensor) else mine == theirs
        assert same, f"{field.name}: {mine} != {theirs}"


@given(routings())
def test_rows_follow_the_rule(case):
    ids, num_experts = case
    for owner, plan in enumerate(plans_of(ids, num_experts)):
        expected = rows_by_the_rule(ids, num_experts, owner)
        assert plan.num_rows == len(expected)
        source, slot = decode_source(plan.source_of)
        got = list(zip(source.tolist(), (slot // plan.top_k).tolist(), (slot % plan.top_k).tolist(), strict=True))
        holds_a_token = (plan.source_of >= 0).tolist()
        assert [row if kept else None for row, kept in zip(got, holds_a_token, strict=True)] == expected


@given(routings())
def test_every_kept_slot_has_one_row_and_the_maps_invert(case):
    ids, num_experts = case
    plans = plans_of(ids, num_experts)
    local = num_experts // len(ids)
    taken = [torch.zeros(plan.num_rows, dtype=torch.int64) for plan in plans]
    for rank, plan in enumerate(plans):
        assert torch.equal(plan.slot_of >= 0, ids[rank] >= 0)
        for slot in (plan.slot_of.flatten() >= 0).nonzero().flatten().tolist():
            expert, row = int(ids[rank].flatten()[slot]), int(plan.slot_of.flatten()[slot])
            owner = plans[expert // local]
            start, end = owner.segments[expert % local]
            assert start <= row < end
            assert [int(part) for part in decode_source(owner.source_of[row])] == [rank, slot]
            taken[expert // local][row] += 1
    for plan, times in zip(plans, taken, strict=True):
        assert torch.equal(times, (plan.source_of >= 0).long())


@given(routings())
def test_counts_offsets_and_padding(case):
    ids, num_experts = case
    for rank, plan in enumerate(plans_of(ids, num_experts)):
        for source, source_ids in enumerate(ids):
            expected = [int((source_ids == expert).sum()) for expert in range(num_experts)]
            assert plan.counts[source].tolist() == expected
        mine = slice(plan.first_expert, plan.first_expert + plan.num_local_experts)
        assert plan.expert_rows.tolist() == plan.counts[:, mine].sum(0).tolist()
        assert plan.expert_offset[0] == 0 and int(plan.expert_offset[-1]) == plan.num_rows == len(plan.source_of)
        assert (plan.expert_offset % ROW_TILE == 0).all()
        padding = plan.expert_offset.diff() - plan.expert_rows
        assert ((padding >= 0) & (padding < ROW_TILE)).all()
        assert (plan.rank, plan.ep_size, plan.num_tokens, plan.top_k) == (rank, len(ids), *ids[rank].shape)


@given(routings())
def test_sends_meet_receives(case):
    """What leaves rank s for rank o, in order, is what o expects from s, in order."""
    ids, num_experts = case
    plans = plans_of(ids, num_experts)
    for s, source in enumerate(plans):
        leaving = source.send_slots.split(source.send_splits)
        for o, owner in enumerate(plans):
            arriving = owner.receive_rows.split(owner.receive_splits)[s]
            source_rank, slot = decode_source(owner.source_of[arriving])
            assert (source_rank == s).all() and torch.equal(slot, leaving[o])
            assert torch.equal(source.slot_of.flatten()[leaving[o]], arriving)


@given(routings(), st.integers(0, 2**20))
def test_permuting_tokens_permutes_rows_as_the_order_rule_predicts(case, seed):
    """Rows of an expert stand in token order: the new rows are the old ones sorted by the tokens' new places."""
    ids, num_experts = case
    generator = torch.Generator().manual_seed(seed)
    orders = [torch.randperm(len(rank_ids), generator=generator) for rank_ids in ids]
    place = [torch.argsort(order) for order in orders]  # new position of each old token
    before = plans_of(ids, num_experts)
    after = plans_of([rank_ids[order] for rank_ids, order in zip(ids, orders, strict=True)], num_experts)
    for old, new in zip(before, after, strict=True):
        assert torch.equal(old.expert_offset, new.expert_offset) and torch.equal(old.counts, new.counts)
        for start, end in old.segments:
            source, slot = (part.tolist() for part in decode_source(old.source_of[start:end]))
            moved = [(s, int(place[s][n // old.top_k]), n % old.top_k) for s, n in zip(source, slot, strict=True)]
            source, slot = (part.tolist() for part in decode_source(new.source_of[start:end]))
            assert [(s, n // new.top_k, n % new.top_k) for s, n in zip(source, slot, strict=True)] == sorted(moved)


@given(routings())
def test_one_rank_with_all_tokens_holds_the_same_rows(case):
    """The order rule does not know the ranks: EP = 1 over the concatenated tokens gives every expert the same rows."""
    ids, num_experts = case
    (whole,) = plans_of([torch.cat(ids)], num_experts)
    first_token = [sum(len(part) for part in ids[:rank]) for rank in range(len(ids))]
    for plan in plans_of(ids, num_experts):
        for (start, end), (whole_start, whole_end) in zip(
            plan.segments, whole.segments[plan.first_expert :][: plan.num_local_experts], strict=True
        ):
            source, slot = decode_source(plan.source_of[start:end])
            shift = torch.tensor(first_token)[source] * plan.top_k
            assert torch.equal(slot + shift, decode_source(whole.source_of[whole_start:whole_end])[1])


def test_bits_do_not_depend_on_the_number_of_threads():
    ids = [route("zipf", 6000, 6, 64, 2, torch.Generator().manual_seed(rank)) for rank in range(2)]
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(4)
        many = plans_of(ids, 64)
    finally:
        torch.set_num_threads(threads)
    for one, other in zip(plans_of(ids, 64), many, strict=True):
        assert_equal_plans(one, other)


def test_id_dtypes_give_the_same_plan():
    ids = route("some_dropped", 50, 3, 8, 1, torch.Generator().manual_seed(5))
    for dtype in (torch.int16, torch.int32):
        assert_equal_plans(build_plan(ids.to(dtype), 8), build_plan(ids, 8))


def test_a_plan_is_its_own():
    ids = route("uniform", 50, 3, 8, 1, torch.Generator().manual_seed(5))
    plan, expected = build_plan(ids, 8), build_plan(ids.clone(), 8)
    ids.fill_(-1)
    assert_equal_plans(plan, expected)
    assert torch.equal(plan.send_slots, expected.send_slots)


def test_strided_ids_give_the_same_plan():
    ids = route("uniform", 50, 3, 8, 1, torch.Generator().manual_seed(5))
    assert_equal_plans(build_plan(ids.t().contiguous().t(), 8), build_plan(ids, 8))


@pytest.mark.parametrize(
    ("ids", "num_experts", "message"),
    [
        (torch.zeros(4, dtype=torch.int64), 8, r"topk_ids: got shape \(4,\); allowed: \[T, K\]"),
        (torch.zeros(4, 0, dtype=torch.int64), 8, r"topk_ids: got shape \(4, 0\)"),
        (torch.zeros(4, 2), 8, r"topk_ids: got dtype torch.float32; allowed: int16, int32, int64"),
        (torch.tensor([[0, 8]]), 8, r"topk_ids: got expert 8 on rank 0; allowed: -1 \(dropped\) and 0..7"),
        (torch.tensor([[0, -2]]), 8, r"topk_ids: got expert -2 on rank 0"),
        (
            torch.zeros(4, 2, dtype=torch.int64),
            0,
            r"num_experts: got 0; allowed: a positive multiple of the 1 EP ranks",
        ),
    ],
)
def test_bad_ids_are_refused(ids, num_experts, message):
    with pytest.raises(ValueError, match=message):
        build_plan(ids, num_experts)


def test_plans_of_refuses_what_a_group_would():
    with pytest.raises(ValueError, match="num_experts: got 7; allowed: a positive multiple of the 2 EP ranks"):
        plans_of([torch.zeros(1, 1, dtype=torch.int64)] * 2, 7)
    with pytest.raises(ValueError, match="topk_ids: got expert 9 on rank 1"):
        plans_of([torch.zeros(1, 1, dtype=torch.int64), torch.tensor([[9]])], 8)


def _group_cases(world_size: int) -> list[tuple[list[Tensor], int]]:
    cases = []
    for number, kind in enumerate(ROUTINGS):
        generator = torch.Generator().manual_seed(number)
        sizes = [(37 * (rank + number)) % 300 for rank in range(world_size)]  # ragged; rank 0 of the first case: T = 0
        top_k = 1 + number % 4
        cases.append(([route(kind, size, top_k, 8, world_size, generator) for size in sizes], 8))
    return cases


def _plans_in_a_group(rank: int, world_size: int) -> int:
    group = dist.group.WORLD
    for ids, num_experts in _group_cases(world_size):
        assert_equal_plans(build_plan(ids[rank], num_experts, group=group), plans_of(ids, num_experts)[rank])
    # Whatever one rank does wrong, every rank raises the same: none is left waiting.
    good = torch.zeros(2, 2, dtype=torch.int64)
    bad = torch.tensor([[0, 99]]) if rank == world_size - 1 else good
    with pytest.raises(ValueError, match=f"topk_ids: got expert 99 on rank {world_size - 1}"):
        build_plan(bad, 8, group=group)
    with pytest.raises(ValueError, match=f"num_experts: rank 1 of the EP group has {2 * 8}, rank 0 has 8"):
        build_plan(good, 8 * (1 + rank), group=group)
    with pytest.raises(ValueError, match="top-k: rank 1 of the EP group has 2, rank 0 has 1"):
        build_plan(good[:, : 1 + rank % 2], 8, group=group)
    return len(_group_cases(world_size))


@pytest.mark.parametrize("world_size", [2, 4])
def test_a_group_builds_the_bits_of_one_process(world_size):
    assert run_ranks(_plans_in_a_group, world_size) == [len(ROUTINGS)] * world_size


def test_workloads_are_what_they_are_called():
    generator = torch.Generator().manual_seed(0)
    counts = {
        kind: torch.bincount(route(kind, 400, 2, 8, 2, generator).flatten() + 1, minlength=9) for kind in ROUTINGS
    }
    assert set(counts["balanced"][1:].tolist()) == {100}
    assert counts["hot_expert"][1 + 4] == 400
    assert counts["hot_rank"][1:5].sum() > 0.9 * 800
    assert (counts["empty_experts"][1:] == 0).sum() == 6
    assert counts["empty_rank"][5:].sum() == 0
    assert 0 < counts["some_dropped"][0] < 400 and counts["all_dropped"][0] == 800
    assert plan_module.is_kept(torch.tensor([-1, 0])).tolist() == [False, True]

"""Plans, and dispatch and combine by kernels of their own."""

from __future__ import annotations

import torch

from megamoe_train import ops_plan
from tests.gpu.virtual import Data, Load, assert_same, run_layer, twins_of

from .ranks import EmulatedRanks


def layer(load: Load, hidden: int, steps: int = 2, **options) -> None:
    """Plan, forward and backward of some steps, each with another rank late."""
    ranks = EmulatedRanks(load, hidden)
    for step in range(steps):
        run_layer(ranks, Data(load, hidden, step, "cpu"), late=step % load.ranks, **options)


def whole_plan(workspace, ids: torch.Tensor) -> ops_plan.DevicePlan:
    return ops_plan.build_plan(workspace, ids, sizing="fixed", capacity=workspace.high_water)


def plans(load: Load, sizing: str, dtype: torch.dtype) -> None:
    """Plans of three epochs (both parities), each with another rank late."""
    ranks = EmulatedRanks(load)
    for seed in range(3):
        ids = load.ids(seed)
        twins = twins_of(ids, load.experts)
        for workspace in ranks.workspaces:
            workspace.high_water = max(twin.num_rows for twin in twins)
        given, late = [one.to(dtype) for one in ids], seed % load.ranks
        if sizing == "in one call":
            ranks.delay(late)
            made = ranks.each(whole_plan, ranks.workspaces, given)
        else:
            made = ranks.plan(given, sizing, late=late)
        ranks.synchronize()
        for plan, twin in zip(made, twins, strict=True):
            assert_same(plan, twin)


def rank_without_rows_runs_ahead(tokens: int) -> None:
    """Rank 1 owns no row, so that only the protocol holds it back; ranks 0 and 2, which pull its tokens if it brings
    any, are late."""
    load = Load("first_and_last", (3, tokens, 2), 1, 3)
    ranks = EmulatedRanks(load)
    for step in range(2):
        run_layer(ranks, Data(load, 256, step, "cpu"), late=2 * step)


def dispatches_back_to_back() -> None:
    """One staging buffer, new rows each time. Rank 0 receives nothing, so that only the acknowledgements of the late
    rank 1 keep it from staging all three before the first is pulled."""
    load = Load("last", (12, 20), 1, 4)
    ranks = EmulatedRanks(load)
    data = [Data(load, 256, seed, "cpu") for seed in range(3)]
    plans_now = data[0].plans(ranks)
    ranks.synchronize()
    ranks.delay(1)
    pools = [ranks.dispatch(plans_now, one.xs, one.ps) for one in data]
    ranks.synchronize()
    for one, pool in zip(data, pools, strict=True):
        data[0].xs, data[0].ps = one.xs, one.ps
        data[0].check_rows(pool)


def combines_by_many_ctas() -> None:
    """Fewer rows than CTAs, so that most of those that push have nothing to push, while everybody waits for the last
    rank. New rows each time: a sum that comes too early finds old ones."""
    load = Load("first_and_last", (4, 3), 2, 2)
    ranks = EmulatedRanks(load)
    data = Data(load, 256, 0, "cpu")
    plans_now = data.plans(ranks)
    for seed in range(12):
        data.rows = Data(load, 256, seed, "cpu").rows
        pools, values = data.padded(plans_now[0].capacity)
        ranks.synchronize()
        ranks.delay(seed % load.ranks)
        combined = ranks.combine(plans_now, pools, values, num_sms=8)
        ranks.synchronize()
        data.check_sums(combined)


def overflow() -> None:
    """The same verdict at every rank; nothing is written; the next plan works."""
    load = Load("hot_rank", (40, 9), 2, 8)
    ids, ranks = load.ids(), EmulatedRanks(load)
    most = max(twin.num_rows for twin in twins_of(ids, load.experts))
    made = ranks.plan(ids, "fixed", capacity=most - 128)
    pools = ranks.dispatch(made, [torch.randn(t, 256).bfloat16() for t in load.tokens])
    ranks.synchronize()
    for plan, (pool, _) in zip(made, pools, strict=True):
        try:
            plan.settle()
            raise AssertionError("no overflow")
        except ops_plan.RowOverflow as error:
            assert f"rank 0 has room for {most - 128} rows; this routing needs up to {most}" in str(error), error
        assert pool.isnan().all(), "a plan that does not fit wrote rows"
        ops_plan.grow(plan)
    run_layer(ranks, Data(load, 256, 1, "cpu"), late=1)


def bad_ids() -> None:
    """Named alike on every rank; the next plan works."""
    load = Load("uniform", (30, 50), 4, 16)
    ranks = EmulatedRanks(load)
    ids = load.ids()
    ids[1][43, 2], ids[1][45, 0] = 16, -7
    for plan in ranks.plan(ids):
        try:
            plan.settle()
            raise AssertionError("no error")
        except ValueError as error:
            assert "got expert 16 at rank 1, token 43, k = 2" in str(error), error
    run_layer(ranks, Data(load, 256, 1, "cpu"), late=0)


CASES = {
    "layer of 4 ranks, one without tokens": lambda: layer(Load("hot_rank", (7, 0, 128, 1), 6, 64), 1024),
    "layer of 2 ranks, rows in pieces": lambda: layer(Load("some_dropped", (9, 40), 2, 8), 4608, num_sms=3),
    "layer of 2 ranks, several rows a unit": lambda: layer(Load("zipf", (60, 33), 4, 16), 256, num_sms=2),
    "layer of 8 ranks": lambda: layer(Load("hot_expert", (5, 7, 1, 0, 20, 3, 2, 1), 2, 64), 512, steps=1, num_sms=7),
    "layer of 1 rank": lambda: layer(Load("some_dropped", (50,), 4, 8), 768),
    "layer of no token": lambda: layer(Load("uniform", (0, 0), 2, 8), 256),
    "a rank without rows runs ahead": lambda: rank_without_rows_runs_ahead(4),
    "a rank without rows and tokens runs ahead": lambda: rank_without_rows_runs_ahead(0),
    "dispatches back to back": dispatches_back_to_back,
    "combines by many CTAs": combines_by_many_ctas,
    "plans, int64, exact": lambda: plans(Load("zipf", (300, 1100), 2, 96), "exact", torch.int64),
    "plan of one rank": lambda: plans(Load("zipf", (700,), 3, 40), "high_water", torch.int64),
    "plans, int32, high water": lambda: plans(Load("some_dropped", (7, 130, 0, 64), 6, 384), "high_water", torch.int32),
    "plans in one call": lambda: plans(Load("uniform", (40, 0, 300), 4, 24), "in one call", torch.int64),
    "plan of one rank in one call": lambda: plans(Load("zipf", (500,), 3, 40), "in one call", torch.int32),
    "overflow": overflow,
    "bad ids": bad_ids,
}

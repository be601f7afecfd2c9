"""The plan kernels against plan.py, bit for bit; sizing modes; bad ids."""

import pytest
import torch

from megamoe_train import ops_plan
from tests.gpu.virtual import Load, Ranks, assert_same, twins_of

pytestmark = pytest.mark.gpu

LOADS = (
    Load("uniform", (8192,), 6, 256),
    Load("zipf", (8192, 8192), 6, 256),
    Load("balanced", (4099,), 8, 128),
    Load("hot_expert", (4099, 7), 2, 64),
    Load("hot_rank", (128, 0, 4099, 1), 6, 384),
    Load("empty_experts", (1, 128), 2, 32),
    Load("empty_rank", (7, 7, 7, 128), 1, 4),
    Load("some_dropped", (8192, 4099, 128, 0, 1, 7, 128, 8192), 8, 1024),
    Load("all_dropped", (128, 4099), 2, 8),
    Load("uniform", (0,), 1, 1),
    Load("uniform", (0, 0), 6, 16),
    Load("zipf", (1, 7, 128, 4099, 1, 7, 128, 4099), 2, 8),
    Load("balanced", (128,), 1, 1),
    Load("uniform", (4099, 8192), 1, 48),
    Load("some_dropped", (70000,), 8, 96),
)


@pytest.mark.parametrize("load", LOADS, ids=str)
def test_the_same_bits_as_the_twin(load):
    ranks = Ranks(load)
    for seed, (sizing, dtype) in enumerate((("exact", torch.int64), ("high_water", torch.int32))):
        ids = load.ids(seed)
        given = [i.to("cuda", dtype) for i in ids]
        twins = twins_of(ids, load.experts)
        for workspace in ranks.workspaces:
            workspace.high_water = max(twin.num_rows for twin in twins)
        for plan, twin in zip(ranks.plan(given, sizing), twins, strict=True):
            assert_same(plan, twin)


@pytest.mark.parametrize("load", [LOADS[1], LOADS[4], LOADS[7]], ids=str)
def test_ranks_on_their_own_streams_with_skew(load):
    """Ranks really wait for each other; whoever starts late, the bits are the same. Epochs pass both parities."""
    ranks = Ranks(load, streams=True)
    for seed in range(4):
        ids = load.ids(seed)
        twins = twins_of(ids, load.experts)
        given = [i.cuda() for i in ids]
        for workspace in ranks.workspaces:
            workspace.high_water = max(twin.num_rows for twin in twins)
        for plan, twin in zip(ranks.plan(given, late=seed % load.ranks), twins, strict=True):
            assert_same(plan, twin)


def test_bad_ids_are_named_on_every_rank():
    load = Load("uniform", (300, 5000), 4, 16)
    ranks = Ranks(load)
    for value in (16, -2, 2**40):
        ids = [i.cuda() for i in load.ids()]
        ids[1][4321, 2], ids[1][4500, 0] = value, -7
        shown = min(value, 2**31 - 1)
        for plan in ranks.plan(ids):
            with pytest.raises(
                ValueError, match=rf"topk_ids: got expert {shown} at rank 1, token 4321, k = 2; .*0\.\.15"
            ):
                plan.settle()
    twins = twins_of(load.ids(), 16)
    for plan, twin in zip(ranks.plan([i.cuda() for i in load.ids()], "exact"), twins, strict=True):
        assert_same(plan, twin)  # the error leaves nothing behind


def test_an_overflow_is_the_same_verdict_everywhere_and_writes_nothing():
    load = Load("hot_rank", (4099, 128), 2, 32)
    ids, ranks = load.ids(), Ranks(load)
    twins = twins_of(ids, load.experts)
    most = max(twin.num_rows for twin in twins)
    assert twins[0].num_rows == most > twins[1].num_rows
    plans = ranks.plan([i.cuda() for i in ids], "fixed", capacity=most - 128)
    for plan in plans:
        with pytest.raises(ops_plan.RowOverflow, match=f"rank 0 has room for {most - 128} rows; .* up to {most}"):
            plan.settle()
    xs = [torch.randn(t, 256, device="cuda").bfloat16() for t in load.tokens]
    pools = ranks.dispatch(plans, xs)  # skipped alike on every rank; the acknowledgements still travel
    for plan in plans:
        ops_plan.grow(plan)
    assert ranks.workspaces[0].high_water == ranks.workspaces[1].high_water >= most
    assert [pool.shape[0] for pool, _ in pools] == [most - 128] * 2
    plans = ranks.plan([i.cuda() for i in ids])
    for plan, twin in zip(plans, twins, strict=True):
        assert_same(plan, twin)
    ranks.dispatch(plans, xs)
    torch.cuda.synchronize()


def test_high_water_by_itself_for_one_rank():
    load = Load("uniform", (4099,), 2, 8)
    ids, ranks = load.ids(), Ranks(load)
    (twin,), (workspace,) = twins_of(ids, 8), ranks.workspaces
    workspace.high_water = 256
    assert_same(ops_plan.planned(workspace, ids[0].cuda(), lambda plan: plan), twin)
    assert twin.num_rows <= workspace.high_water < twin.num_rows * 1.2


def test_a_captured_plan_replays_with_new_ids():
    load = Load("uniform", (1000,), 4, 32)
    ranks = Ranks(load)
    static = load.ids(0)[0].cuda()
    ranks.plan([static])
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        plan = ops_plan.build_plan(ranks.workspaces[0], static, sizing="fixed", capacity=8192)
    for seed in (1, 2, 3):
        ids = load.ids(seed)
        static.copy_(ids[0])
        graph.replay()
        torch.cuda.synchronize()
        plan.rows = None  # the verdict read before was that of another replay
        assert_same(plan, twins_of(ids, 32)[0])

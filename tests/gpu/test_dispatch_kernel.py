"""Dispatch and combine kernels: every row exactly where the plan says, sums exact; both directions, any rank skew."""

from dataclasses import replace

import pytest
import torch

from megamoe_train import reference
from tests.gpu.virtual import Data, Load, Ranks, check_layer, give_layer, run_layer

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("poisoned")]

CASES = (
    (Load("uniform", (4099,), 6, 32), 256),
    (Load("zipf", (8192,), 8, 128), 512),
    (Load("some_dropped", (128, 4099), 2, 64), 4096),
    (Load("uniform", (1000, 1024), 6, 48), 7168),
    (Load("hot_rank", (7, 0, 128, 1), 6, 64), 1024),
    (Load("empty_rank", (128, 4099, 1, 0), 1, 4), 2304),
    (Load("hot_expert", (128, 7, 1, 0, 4099, 128, 7, 1), 2, 1024), 768),
    (Load("all_dropped", (128, 7), 2, 8), 256),
    (Load("uniform", (0, 0), 2, 8), 256),
    (Load("balanced", (1,), 1, 1), 1280),
    (Load("empty_experts", (512,), 8, 16), 3072),
    (Load("uniform", (50000, 0), 6, 12), 7168),  # pools beyond 2^31 bytes, combine slots beyond 2^32
)


@pytest.mark.parametrize("load, hidden", CASES, ids=str)
def test_rows_and_sums_are_exact(load, hidden):
    ranks = Ranks(load, hidden)
    for seed, num_sms in enumerate((0, 7)):
        data = Data(load, hidden, seed)
        plans = data.plans(ranks)
        dispatched = ranks.dispatch(plans, data.xs, data.ps, num_sms=num_sms)
        combined = ranks.combine(plans, *data.padded(plans[0].capacity), num_sms=num_sms)
        data.check(dispatched, combined)


def test_one_rank_agrees_with_the_reference():
    load, hidden = Load("some_dropped", (1000,), 4, 16), 512
    ranks, data = Ranks(load, hidden), Data(load, hidden)
    plans = data.plans(ranks)
    ((pool, weights),) = ranks.dispatch(plans, data.xs, data.ps)
    plan = plans[0].to_routing_plan()
    assert torch.equal(pool[: plan.num_rows], reference.dispatch(data.xs[0], plan, None))
    assert torch.equal(weights[: plan.num_rows], reference.dispatch_weights(data.ps[0], plan, None))
    ((y, dps),) = ranks.combine(plans, *data.padded(plans[0].capacity))
    assert torch.equal(y, reference.combine(data.rows[0], plan, None))
    assert torch.equal(dps, reference.combine_weights(data.row_dps[0], plan, None))


@pytest.mark.parametrize("load, hidden", [CASES[2], CASES[4], CASES[6]], ids=str)
def test_a_layer_on_streams_with_skew(load, hidden):
    """Forward and backward of three steps, each rank on its own stream, a different one late: the same bits."""
    ranks = Ranks(load, hidden, streams=True)
    for seed in range(3):
        run_layer(ranks, Data(load, hidden, seed), late=seed % load.ranks, num_sms=max(1, 96 // load.ranks))


@pytest.mark.parametrize("load, hidden", [CASES[0], CASES[2], CASES[4], CASES[6]], ids=str)
def test_all_ranks_in_one_launch(load, hidden):
    """Plans, forward and backward of all ranks as one graph; replayed with other routings and rows: exact each time."""
    ranks = Ranks(load, hidden, streams=True)
    options = {"num_sms": max(1, 96 // load.ranks)}
    datas = [Data(load, hidden, seed) for seed in range(3)]
    capacity = max(twin.num_rows for data in datas for twin in data.twins)
    run_layer(ranks, datas[0], late=0, **options)  # a first launch loads kernels, which a capture may not

    def tensors(data: Data) -> list:
        return [[ids.cuda() for ids in data.ids], data.xs, data.ps, *data.padded(capacity)]

    given = tensors(datas[0])

    def layer() -> tuple:
        plans = ranks.give_plans(given[0], [capacity] * load.ranks)
        return plans, *give_layer(ranks, plans, *given[1:], **options)

    graph, moved = ranks.in_one_launch(layer)
    for data in datas:
        for mine, theirs in zip(given, tensors(data), strict=True):
            for one, other in zip(mine, theirs, strict=True):
                one.copy_(other)
        with ranks.workspaces[0].guard.watch():
            graph.replay()
            torch.cuda.synchronize()
        plans, *results = moved
        unread = [replace(plan, rows=None) for plan in plans]  # each replay has a verdict of its own
        check_layer(data, unread, *results)

"""Dispatch and combine kernels: every row exactly where the plan says, sums exact; both directions, any rank skew."""

import pytest
import torch

from megamoe_train import reference
from tests.gpu.virtual import Load, Ranks, expected_rows, expected_slots, sum_slots, twins_of

pytestmark = pytest.mark.gpu

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
)


@pytest.fixture(autouse=True)
def poisoned():
    """torch.empty is filled with NaN (or the largest integer): what a kernel does not write shows."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


class Data:
    def __init__(self, load: Load, hidden: int, seed: int = 0):
        torch.manual_seed(seed)
        self.ids = load.ids(seed)
        self.twins = twins_of(self.ids, load.experts)
        self.xs = [torch.randn(t, hidden, device="cuda").bfloat16() for t in load.tokens]
        self.ps = [torch.rand(t, load.top_k, device="cuda") for t in load.tokens]
        self.rows = [torch.randn(twin.num_rows, hidden, device="cuda").bfloat16() for twin in self.twins]
        self.row_dps = [torch.randn(twin.num_rows, device="cuda") for twin in self.twins]

    def plans(self, ranks: Ranks):
        for workspace in ranks.workspaces:
            workspace.high_water = max(twin.num_rows for twin in self.twins)
        return ranks.plan([i.cuda() for i in self.ids])

    def padded(self, rows: int) -> tuple[list, list]:
        """rows and row_dps in pools of `rows` rows, NaN in padding: it must reach nothing."""
        pools, values = [], []
        for twin, pool, value in zip(self.twins, self.rows, self.row_dps, strict=True):
            padding = (twin.source_of < 0).cuda()
            pools.append(torch.full((rows, pool.shape[1]), torch.nan, device="cuda").bfloat16())
            values.append(torch.full((rows,), torch.nan, device="cuda"))
            pools[-1][: len(pool)] = pool.masked_fill(padding[:, None], torch.nan)
            values[-1][: len(pool)] = value.masked_fill(padding, torch.nan)
        return pools, values


def check(data: Data, load: Load, dispatched, combined) -> None:
    for rank, twin in enumerate(data.twins):
        pool, weights = dispatched[rank]
        assert torch.equal(pool[: twin.num_rows], expected_rows(data.twins, rank, data.xs, load.top_k, False)), rank
        flat = [p.flatten() for p in data.ps]
        assert torch.equal(weights[: twin.num_rows], expected_rows(data.twins, rank, flat, load.top_k, True)), rank
        y, dps = combined[rank]
        assert torch.equal(y, sum_slots(expected_slots(data.twins, rank, data.rows))), f"y of rank {rank}"
        assert torch.equal(dps, expected_slots(data.twins, rank, data.row_dps)), f"dp of rank {rank}"


@pytest.mark.parametrize("load, hidden", CASES, ids=str)
def test_rows_and_sums_are_exact(load, hidden):
    ranks = Ranks(load, hidden)
    for seed, num_sms in enumerate((0, 7)):
        data = Data(load, hidden, seed)
        plans = data.plans(ranks)
        dispatched = ranks.dispatch(plans, data.xs, data.ps, num_sms=num_sms)
        combined = ranks.combine(plans, *data.padded(plans[0].capacity), num_sms=num_sms)
        check(data, load, dispatched, combined)


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
        data = Data(load, hidden, seed)
        plans = data.plans(ranks)
        pools, values = data.padded(plans[0].capacity)
        torch.cuda.synchronize()
        with ranks.on(seed % load.ranks):
            torch.cuda._sleep(20_000_000)
        options = {"num_sms": max(1, 96 // load.ranks)}
        first = ranks.dispatch(plans, data.xs, data.ps, **options)
        y = ranks.combine(plans, pools, **options)
        second = ranks.dispatch(plans, data.xs, data.ps, buffer=1, backward=True, **options)
        third = ranks.dispatch(plans, data.xs, data.ps, buffer=0, backward=True, **options)
        last = ranks.combine(plans, pools, values, backward=True, **options)
        torch.cuda.synchronize()
        for dispatched in (first, second, third):
            check(data, load, dispatched, last)
        assert all(torch.equal(a, b) for (a, _), (b, _) in zip(y, last, strict=True))

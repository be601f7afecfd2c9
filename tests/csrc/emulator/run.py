"""Virtual ranks on the emulator, in a process of its own: `python -m tests.csrc.emulator.run LIBRARY SEED CASE ...`.

The library defines the operators that the CUDA extension defines elsewhere: both cannot be loaded at once.
"""

from __future__ import annotations

import contextlib
import copy
import ctypes
import os
import sys

import torch

from megamoe_train import ops, ops_plan
from tests.gpu.fused_run import VirtualRanks, assert_same_bits
from tests.gpu.gemm_case import Case as GemmCase
from tests.gpu.gemm_case import assert_products, assert_wgrad
from tests.gpu.layer_case import Case, Layer, assert_layer
from tests.gpu.virtual import Data, Load, Ranks, assert_same, run_layer, twins_of

QUIET_MS = 50  # a late rank waits until the others got nowhere for so long
DEADLINE_S = 20.0  # threads of two cores take turns; nothing here should ever wait so long


class EmulatedRanks(Ranks):
    """Ranks on the CPU, every rank on its own stream. Tensors are kept: no allocator here knows of streams."""

    device = "cpu"
    library: ctypes.CDLL
    deadline_s = DEADLINE_S
    current = 1
    count = 0

    def __init__(self, load: Load, hidden: int = 256):
        self.kept = []
        super().__init__(load, hidden, streams=True, deadline_s=self.deadline_s)

    def new_stream(self) -> int:
        EmulatedRanks.count += 1
        return EmulatedRanks.count

    def synchronize(self) -> None:
        failed = self.library.emulator_synchronize()
        for workspace in self.workspaces:
            workspace.guard.check()
        assert not failed, "a kernel trapped and left no record"

    def delay(self, rank: int) -> None:
        self.library.emulator_hold(ctypes.c_uint64(self.streams[rank]), QUIET_MS)

    @contextlib.contextmanager
    def on(self, rank: int):
        before, EmulatedRanks.current = EmulatedRanks.current, self.streams[rank]
        yield
        EmulatedRanks.current = before

    def each(self, call, *lists) -> list:
        results = super().each(call, *lists)
        self.kept.append((results, lists))
        return results


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


def fused(case: Case, num_sms: int) -> None:
    """The fused kernels against fp64, twice, each time with another rank late: the same bits."""
    layer = Layer(case, device="cpu")
    found = []
    for late in range(2):
        ranks = VirtualRanks(layer, num_sms, EmulatedRanks(case.load, case.hidden))
        found.append(ranks.run(layer, late=late % case.load.ranks))
        assert_layer(layer, found[-1])
    assert_same_bits(layer, *found)


def fused_gradients() -> None:
    """Gradients are written, then added to; those that nobody wants change nothing else."""
    layer = Layer(Case(Load("zipf", (70, 41), 3, 8), 512, 256), device="cpu")
    ranks = VirtualRanks(layer, 4, EmulatedRanks(layer.case.load, layer.case.hidden))
    plans_now, results = ranks.forward(layer, late=1)
    ranks.backward(layer, plans_now, results)
    assert_layer(layer, dict(enumerate(results)))
    for wanted in ((True, True), (True, False), (False, True), (False, False)):
        before = [copy.deepcopy(result) for result in results]
        ranks.backward(layer, plans_now, results, late=0, add=True, wanted=wanted)
        for now, then in zip(results, before, strict=True):
            assert torch.equal(now.dx, then.dx) and torch.equal(now.dweights, then.dweights)
            for name, is_wanted in zip(("dfc1", "dfc2"), wanted, strict=True):
                for got, had in zip(getattr(now, name), getattr(then, name), strict=True):
                    assert torch.equal(got, had) != (is_wanted and had.any().item()), f"{name}, wanted: {wanted}"
            if wanted == (True, True):
                assert all(torch.equal(got, 2 * had) for got, had in zip(now.dfc1, then.dfc1, strict=True))


def fused_overflow() -> None:
    """Every rank gives the staged rows back unread and writes nothing; the next pass works."""
    layer = Layer(Case(Load("hot_rank", (40, 9), 2, 8), 256, 128), device="cpu")
    ranks = VirtualRanks(layer, 2, EmulatedRanks(layer.case.load, layer.case.hidden))
    plans_now, results = ranks.forward(layer, capacity=layer.most_rows - ops.ROW_TILE)
    assert all(result.y.isnan().all() and result.h.isnan().all() for result in results)
    for plan in plans_now:
        ops_plan.grow(plan)
    assert_layer(layer, ranks.run(layer, late=1))


def products() -> None:
    """The six products, each alone in a launch, and wgrads whose rows end in half a pair of row tiles."""
    EmulatedRanks.current = 0
    shape = {"hidden": 512, "inter": 384, "clamp": 1.0, "scale": 2.0, "num_sms": 4, "device": "cpu"}
    for accumulate in (True, False):
        assert_products(GemmCase([70, 0, 200], seed=int(accumulate), **shape), accumulate)
    for out in (64, 384):
        assert_wgrad(GemmCase([70, 0, 200], **shape), out)


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
    "plans, int64, exact": lambda: plans(Load("zipf", (300, 1100), 2, 96), "exact", torch.int64),
    "plan of one rank": lambda: plans(Load("zipf", (700,), 3, 40), "high_water", torch.int64),
    "plans, int32, high water": lambda: plans(Load("some_dropped", (7, 130, 0, 64), 6, 384), "high_water", torch.int32),
    "plans in one call": lambda: plans(Load("uniform", (40, 0, 300), 4, 24), "in one call", torch.int64),
    "plan of one rank in one call": lambda: plans(Load("zipf", (500,), 3, 40), "in one call", torch.int32),
    "fused, 1 rank": lambda: fused(Case(Load("zipf", (150,), 16, 40), 256, 128), 6),
    "fused, 1 rank, many rows": lambda: fused(Case(Load("uniform", (330,), 1, 1), 256, 256, 10.0), 4),
    "fused, 2 ranks": lambda: fused(Case(Load("zipf", (40, 61), 3, 16), 512, 384, 1.0, 3.0), 4),
    "fused, 4 ranks": lambda: fused(Case(Load("some_dropped", (7, 0, 31, 20), 4, 16), 768, 128, 2.0, 2.0), 2),
    "fused, gradients added or not wanted": fused_gradients,
    "fused, overflow": fused_overflow,
    "products": products,
    "overflow": overflow,
    "bad ids": bad_ids,
}


def main(library: str, seed: str, *names: str, deadline_s: float = DEADLINE_S) -> None:
    torch.set_num_threads(1)
    torch.ops.load_library(library)
    EmulatedRanks.library, EmulatedRanks.deadline_s = ctypes.CDLL(library), deadline_s
    EmulatedRanks.library.emulator_configure(2, 30 + int(seed) * 17 % 60, ctypes.c_uint64(1000 * int(seed) + 1))
    ops.load, ops.raw_stream = lambda: None, lambda device: EmulatedRanks.current
    ops.pinned_bytes = lambda *size: torch.empty(*size, dtype=torch.uint8)
    ops_plan.stream_of = lambda workspace: EmulatedRanks.current
    torch.use_deterministic_algorithms(True, warn_only=True)  # torch.empty comes filled with NaN
    for name in names:
        CASES[name]()
        print("passed", name, flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
    sys.stdout.flush()
    os._exit(0)  # the emulator's workers wait for ever

"""One of several processes, one GPU each: `python -m tests.gpu.two_ranks STORE RANKS RANK SCENARIO ...`. See
test_two_gpus.py."""

from __future__ import annotations

import faulthandler
import os
import signal
import sys
import time
from datetime import timedelta

import torch
import torch.distributed as dist

from megamoe_train import ops_comm, ops_plan, watchdog
from megamoe_train.staged import Staged
from megamoe_train.workspace import Shape, Workspace
from tests.gpu import hold
from tests.gpu.processes import spread
from tests.gpu.virtual import Data, Load, assert_same

DEADLINE_S = 3.0
HUNG_S = 60
LATE_S = 0.1  # the skew of a rank


class Rank:
    """This process's rank: what all ranks must get is known here, since inputs follow from seeds."""

    def __init__(self, rank: int, load: Load, hidden: int, deadline_s: float = DEADLINE_S):
        self.rank, self.load, self.hidden = rank, load, hidden
        shape = Shape(load.ranks, load.experts, load.top_k, hidden, max(load.tokens))
        self.workspace = Workspace.create(shape, group=dist.group.WORLD, deadline_s=deadline_s)

    def plan(self, data: Data) -> ops_plan.DevicePlan:
        self.workspace.high_water = max(twin.num_rows for twin in data.twins)
        return ops_plan.build_plan(self.workspace, data.ids[self.rank].cuda())

    def layer(self, seed: int, late: int | None = None, **options) -> list[torch.Tensor]:
        """Plan, forward and backward of one layer, exact; returns the results for a comparison of bits."""
        return self.check(*self.run(Data(self.load, self.hidden, seed), late, **options))

    def run(self, data: Data, late: int | None = None, **options) -> tuple:
        """The data, the plan and what was moved, once all of it is done."""
        rank = self.rank
        pools, values = data.padded(max(twin.num_rows for twin in data.twins))
        torch.cuda.current_stream().synchronize()
        if late == rank:
            time.sleep(LATE_S)
        plan = self.plan(data)
        moved = [
            ops_comm.dispatch(plan, data.xs[rank], data.ps[rank], **options),
            ops_comm.combine(plan, pools[rank], **options),
            ops_comm.dispatch(plan, data.xs[rank], data.ps[rank], buffer=1, backward=True, **options),
            ops_comm.dispatch(plan, data.xs[rank], data.ps[rank], backward=True, **options),
            ops_comm.combine(plan, pools[rank], values[rank], backward=True, **options),
        ]
        limit = time.monotonic() + 10
        done = torch.cuda.Event()
        done.record()
        while not done.query():
            self.workspace.guard.check()
            assert time.monotonic() < limit, "the layer did not finish"
        return data, plan, moved

    def check(self, data: Data, plan: ops_plan.DevicePlan, moved: list) -> list[torch.Tensor]:
        rank = self.rank
        assert_same(plan, data.twins[rank])
        for number in (0, 2, 3):
            data.check_rows({rank: moved[number]})
        data.check_sums({rank: moved[4]})
        assert torch.equal(moved[1][0], moved[4][0])
        rows = data.twins[rank].num_rows
        return [moved[0][0][:rows], moved[0][1][:rows], moved[4][0], moved[4][1]]


def load_of(kind: str, tokens: tuple[int, ...], top_k: int, experts: int) -> Load:
    """Of all ranks: `tokens` over and over, and at least an expert for each."""
    ranks = dist.get_world_size()
    return Load(kind, spread(tokens, ranks), top_k, max(experts, ranks))


LOADS = (
    (("uniform", (8192, 4099), 6, 256), 4096),
    (("zipf", (128, 1), 8, 128), 7168),
    (("hot_rank", (0, 7), 2, 2), 256),
    (("some_dropped", (4099, 128), 1, 64), 2304),
    (("empty_rank", (7, 128), 2, 16), 768),
)


def exact(rank: int) -> None:
    """Every row exact, whichever rank is 100 ms late and however many SMs move them; the bits of a seed repeat."""
    for load, hidden in LOADS:
        one = Rank(rank, load_of(*load), hidden)
        results = [one.layer(5, late=late, num_sms=sms) for late, sms in ((None, 24), (0, 0), (1, 7), (None, 2))]
        for again in results[1:]:
            assert all(torch.equal(a, b) for a, b in zip(results[0], again, strict=True)), "other bits"
        for seed in range(2):
            one.layer(seed, late=seed)
        one.workspace.close()


def staged(rank: int) -> None:
    """Around foreign experts, autograd through tokens and probs: against the same routing on one process."""
    load = load_of("some_dropped", (500, 300), 4, 24)
    one = Rank(rank, load, 1024)
    mover = Staged(one.workspace)
    one.workspace.high_water = 128  # the first call overflows on every rank, which launches again
    for seed in range(4):
        data = Data(load, one.hidden, seed)
        ids, x = data.ids[rank].cuda(), data.xs[rank].clone().requires_grad_()
        wide = torch.zeros(len(ids), load.experts + 1, device="cuda")
        wide.scatter_(1, ids.where(ids >= 0, load.experts), data.ps[rank])
        probs = wide[:, : load.experts].contiguous().requires_grad_()
        if rank == seed % 2:
            time.sleep(LATE_S)
        topk_ids, weights = mover.route(probs.detach() > 0, probs)
        flight, rows, weights = mover.dispatch(x, topk_ids, weights)
        y = mover.combine(flight, rows)
        local = load.experts // load.ranks
        mine = range(rank * local, (rank + 1) * local)
        tokens = [(r, t) for e in mine for r, given in enumerate(data.ids) for t in (given == e).any(1).nonzero()[:, 0]]
        assert torch.equal(rows, torch.stack([data.xs[r][t] for r, t in tokens])), "rows"
        kept = (ids >= 0).sum(1)
        torch.autograd.backward([y, weights], [x.detach(), 2 * weights.detach()])
        for got in (y, x.grad):
            total = torch.zeros_like(got, dtype=torch.float32)
            for k in range(load.top_k):
                total += torch.where((kept > k)[:, None], x.detach().float(), 0)
            assert torch.equal(got, total.bfloat16()), "sums"
        assert torch.equal(probs.grad, 2 * probs.detach()), "gradient of probs"
    one.workspace.close()


def many_seeds(rank: int) -> None:
    """For the build with random delays: many routings, bits compared with the twin's."""
    for load, hidden in ((load_of("zipf", (300, 500), 4, 32), 1024), (load_of("some_dropped", (64, 7), 2, 8), 256)):
        one = Rank(rank, load, hidden)
        for seed in range(60):
            one.layer(seed, late=None, num_sms=(0, 1, 5)[seed % 3])
        one.workspace.close()


def held(rank: int) -> None:
    """Another stream's kernel holds all SMs but one."""
    hold.build()
    for load, hidden in ((load_of("uniform", (600, 300), 6, 64), 1024), (load_of("hot_rank", (7, 128), 2, 16), 512)):
        one = Rank(rank, load, hidden)
        for sms in (0, 1):
            one.layer(1, num_sms=sms)
            torch.cuda.synchronize()
            dist.barrier()
            data = Data(load, one.hidden, 2)
            torch.cuda.synchronize()
            with hold.all_but(1):
                ran = one.run(data, num_sms=sms)
            one.check(*ran)  # torch's kernels may need more than one SM
        one.workspace.close()


def beside_nccl(rank: int) -> None:
    """All-reduces on another stream, launched before and after."""
    one = Rank(rank, load_of("uniform", (2000, 1000), 6, 64), 2048)
    big, other = torch.ones(64 << 20, device="cuda"), torch.cuda.Stream()
    one.layer(0)
    dist.all_reduce(big)
    torch.cuda.synchronize()
    for step in range(6):
        before = step % 2 == 0
        for _ in range(3 if before else 0):
            with torch.cuda.stream(other):
                dist.all_reduce(big)
        data = Data(one.load, one.hidden, step)
        plan = one.plan(data)
        pool, weights = ops_comm.dispatch(plan, data.xs[rank], data.ps[rank], num_sms=0)
        for _ in range(0 if before else 3):
            with torch.cuda.stream(other):
                dist.all_reduce(big)
        y, _ = ops_comm.combine(plan, pool)
        torch.cuda.synchronize()
        data.check_rows({rank: (pool, weights)})
        assert y.isfinite().all()
        assert_same(plan, data.twins[rank])
    one.workspace.close()


def _last_step(rank: int, peer_does, deadline_s: float = DEADLINE_S) -> None:
    """A good layer; then rank 1 does something else, and the others must be told so."""
    one = Rank(rank, load_of(*LOADS[1][0]), 1024, deadline_s)
    one.layer(0)
    data = Data(one.load, one.hidden, 1)
    dist.barrier()
    start = time.monotonic()
    try:
        if rank == 1:
            peer_does(one, data)
        plan = one.plan(data)
        pool, _ = ops_comm.dispatch(plan, data.xs[rank])
        ops_comm.combine(plan, pool)
        with one.workspace.guard.watch():
            torch.cuda.synchronize()
    except watchdog.MegaMoETimeout as error:
        print(f"RAISED after {time.monotonic() - start:.1f} s: {error}", flush=True)
        os._exit(7)
    print("nothing was noticed")


def _die(one: Rank, data: Data) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _sleep(one: Rank, data: Data) -> None:
    time.sleep(8)
    os._exit(0)


def _backward(one: Rank, data: Data) -> None:
    plan = one.plan(data)
    ops_comm.dispatch(plan, data.xs[1], backward=True)
    with one.workspace.guard.watch():
        torch.cuda.synchronize()


def _out_of_memory(one: Rank, data: Data) -> None:
    plan = one.plan(data)
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(1e-6)
    try:
        plan.capacity = 1 << 20
        ops_comm.dispatch(plan, data.xs[1])
    except torch.OutOfMemoryError as error:
        print("RAISED", type(error).__name__, flush=True)
        os._exit(8)


SCENARIOS = {
    "exact": exact,
    "staged": staged,
    "many_seeds": many_seeds,
    "held": held,
    "beside_nccl": beside_nccl,
    "killed": lambda rank: _last_step(rank, _die),
    "never_launches": lambda rank: _last_step(rank, _sleep),
    "backward": lambda rank: _last_step(rank, _backward, 30.0),
    "out_of_memory": lambda rank: _last_step(rank, _out_of_memory, 30.0),
}


def main(store: str, ranks: str, rank: str, *names: str) -> None:
    faulthandler.dump_traceback_later(HUNG_S)  # tells where, should it hang all the same
    torch.cuda.set_device(int(rank))
    torch.use_deterministic_algorithms(True, warn_only=True)  # torch.empty comes filled with NaN
    dist.init_process_group(
        "nccl", init_method=f"file://{store}", rank=int(rank), world_size=int(ranks), timeout=timedelta(seconds=40),
        device_id=torch.device("cuda", int(rank)),
    )  # fmt: skip
    for name in names:
        SCENARIOS[name](int(rank))
        print("passed", name, flush=True)
    torch.cuda.synchronize()
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])

"""Two, four and eight processes, one GPU each: `moe` and MegaMoE over NVLink against fp64, and errors that all ranks
share."""

import pytest
import torch
import torch.distributed as dist

from megamoe_train import MegaMoE, MegaMoEConfig, Workspace, WorkspaceShape
from megamoe_train.bench import ranks as processes
from megamoe_train.functional import moe
from megamoe_train.fused_plan import FusedPlan
from tests.gpu import hold
from tests.gpu.fused_run import shape_of
from tests.gpu.layer_case import Case, Layer, RankResult, assert_layer
from tests.gpu.leaves import Leaves, MainGrads, assert_plain_passes, plain_passes
from tests.gpu.processes import RANKS, spread
from tests.gpu.virtual import DELAY, Load
from tests.workloads import ROUTINGS

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs in one machine"),
]
SHAPES = ((256, 128, None, 1.0), (512, 384, 1.0, 3.0), (2048, 256, 10.0, 1.0))


def everyone(*values):
    """A value a rank, over and over."""
    return spread(values, dist.get_world_size())


def cases() -> list[Case]:
    tokens = (everyone(700, 411), everyone(0, 333), everyone(1024))
    return [Case(Load(kind, tokens[i % 3], 1 + i % 4, 16), *SHAPES[i % 3]) for i, kind in enumerate(ROUTINGS)]


def poison() -> None:
    torch.use_deterministic_algorithms(True, warn_only=True)  # torch.empty is filled with NaN


class RankLeaves(Leaves):
    """This process's inputs of a layer of all ranks."""

    def __init__(self, layer: Layer, rank: int, frozen: tuple[str, ...] = ()):
        alone = Layer.__new__(Layer)
        alone.__dict__ |= layer.__dict__
        alone.xs, alone.ids, alone.ps, alone.dys = ([part[rank]] for part in (layer.xs, layer.ids, layer.ps, layer.dys))
        alone.experts_of = lambda _: layer.experts_of(rank)
        super().__init__(alone, frozen)


def step(layer: Layer, space: Workspace, **options) -> RankResult:
    """Forward and backward of this rank, weight gradients through a sink."""
    leaves = RankLeaves(layer, dist.get_rank())
    grads = {id(w): torch.zeros(w.shape, device="cuda") for w in [*leaves.fc1, *leaves.fc2]}
    leaves.run(group=dist.group.WORLD, workspace=space, wgrad_sink=MainGrads(grads), **options)
    dfc1, dfc2 = ([grads[id(w)] for w in kind] for kind in (leaves.fc1, leaves.fc2))
    torch.cuda.current_stream().synchronize()
    return RankResult(leaves.y.detach(), None, leaves.x.grad, leaves.p.grad, dfc1, dfc2)


def same(one: RankResult, other: RankResult) -> bool:
    names = ("y", "dx", "dweights")
    lists = [*zip(one.dfc1, other.dfc1, strict=True), *zip(one.dfc2, other.dfc2, strict=True)]
    return all(torch.equal(getattr(one, n), getattr(other, n)) for n in names) and all(torch.equal(*p) for p in lists)


def _workloads() -> None:
    """Every workload; again with the first rank late, then the last: the same bits."""
    poison()
    rank = dist.get_rank()
    for case in cases():
        layer = Layer(case)
        space = Workspace.create(shape_of(layer), group=dist.group.WORLD, deadline_s=5.0)
        first = step(layer, space)
        assert_layer(layer, {rank: first})
        for late in (0, dist.get_world_size() - 1):
            if rank == late:
                torch.cuda._sleep(DELAY)
            assert same(step(layer, space, recompute="fc1" if late else None), first), f"{case}, rank {late} late"
        space.close()


def _held() -> None:
    """Another stream's kernel holds all SMs but those of one cluster, on all GPUs: the same bits."""
    hold.build()
    for case in cases()[:2]:
        layer = Layer(case)
        space = Workspace.create(shape_of(layer), group=dist.group.WORLD, deadline_s=5.0)
        first = step(layer, space)
        torch.cuda.synchronize()
        dist.barrier()
        with hold.all_but(2, cluster_size=2):
            held = step(layer, space)
        assert same(held, first), str(case)
        space.close()


def _overflow() -> None:
    """A hot rank outgrows the high water of a balanced start: launched again with room on every rank, same results."""
    poison()
    calm = Layer(Case(Load("balanced", everyone(1024), 2, 16), 512, 256))
    hot = Layer(Case(Load("hot_rank", everyone(1024), 2, 16), 512, 256), seed=3)
    space = Workspace.create(shape_of(calm), group=dist.group.WORLD, deadline_s=5.0)
    step(calm, space)
    before = space.high_water
    result = step(hot, space)
    assert_layer(hot, {dist.get_rank(): result})
    grown = torch.tensor(space.high_water > before, device="cuda").int()
    dist.all_reduce(grown)
    assert int(grown) == 1, "only the hot rank keeps more room"
    assert same(step(hot, space), result)
    plans = space.verdicts.plans
    assert same(step(hot, space), result) and space.verdicts.plans == plans + 1  # it fits now: one plan a forward
    space.close()


def _plain() -> None:
    """Second steps by one operator a pass; one of them outgrows the high water, and one rank is late."""
    poison()
    rank, load = dist.get_rank(), {"tokens": everyone(1024), "top_k": 2, "experts": 16}
    calm, hot = (Layer(Case(Load(kind, *load.values()), 512, 256, 1.0, 3.0)) for kind in ("balanced", "hot_rank"))
    space = Workspace.create(shape_of(calm), group=dist.group.WORLD, deadline_s=5.0)
    options = {"group": dist.group.WORLD, "workspace": space}
    assert_plain_passes(leaves := RankLeaves(calm, rank), **options)
    routed = space.high_water
    leaves.ids = hot.ids[rank]
    with plain_passes() as passes, torch.no_grad():
        first = leaves.forward(**options)
        grown = torch.tensor(space.high_water > routed, device="cuda").int()
        dist.all_reduce(grown)
        if rank == 1:
            torch.cuda._sleep(DELAY)
        second = leaves.forward(**options)
    assert int(grown) == 1 and passes == ["forward"] * 2 and torch.equal(first, second)
    planned = FusedPlan.build(space, leaves.ids)
    assert torch.equal(leaves.forward(plan=planned, **options), first)
    space.close()


def _bad_ids() -> None:
    """One rank's bad id is the same error on all, and the next call works."""
    layer = Layer(Case(Load("uniform", everyone(300), 2, 8), 256, 128))
    space = Workspace.create(shape_of(layer), group=dist.group.WORLD, deadline_s=5.0)
    leaves = RankLeaves(layer, dist.get_rank())
    ids = leaves.ids.clone()
    if dist.get_rank() == 1:
        ids[123, 1] = 8
    with pytest.raises(ValueError, match=r"topk_ids: got expert 8 at rank 1, token 123, k = 1; allowed: -1 .* 0\.\.7"):
        moe(leaves.x, ids, leaves.p, leaves.fc1, leaves.fc2, group=dist.group.WORLD, workspace=space)
    assert_layer(layer, {dist.get_rank(): step(layer, space)})
    space.close()


def _refusals() -> None:
    layer = Layer(Case(Load("uniform", everyone(300), 2, 8), 256, 128))
    leaves = RankLeaves(layer, dist.get_rank())
    rank, ranks = dist.get_rank(), dist.get_world_size()
    with pytest.raises(ValueError, match=rf"workspace: got None with a group of {ranks} ranks; .*Workspace\.create"):
        leaves.forward(group=dist.group.WORLD)
    with pytest.raises(ValueError, match="workspace hidden: rank 1 of the EP group has 512, rank 0 has 256"):
        Workspace.create(WorkspaceShape(ranks, 8, 2, 512 if rank == 1 else 256, 300), group=dist.group.WORLD)
    with pytest.raises(ValueError, match="tokens: got None; allowed: the most tokens a rank brings to one call"):
        MegaMoE(MegaMoEConfig(256, 128, 8, 2, ep_size=ranks), dist.group.WORLD, device="cuda", dtype=torch.bfloat16)


def _uneven_needs() -> None:
    """Ranks may freeze different things, fc1 on one of them too: the other gradients keep their bits."""
    poison()
    layer = Layer(Case(Load("uniform", everyone(300, 200), 2, 8), 256, 128))
    space = Workspace.create(shape_of(layer), group=dist.group.WORLD, deadline_s=5.0)
    options = {"group": dist.group.WORLD, "workspace": space}
    full = RankLeaves(layer, dist.get_rank()).run(**options)
    for pair in ([("fc1",), ()], [(), ("fc1", "fc2")], [("x",), ("p",)], [("fc1",), ("fc1",)]):
        frozen = everyone(*pair)
        part = RankLeaves(layer, dist.get_rank(), frozen[dist.get_rank()]).run(**options)
        for name, tensors in part.named().items():
            for mine, theirs in zip(tensors, full.named()[name], strict=True):
                if name in frozen[dist.get_rank()]:
                    assert mine.grad is None
                else:
                    assert torch.equal(mine.grad, theirs.grad), f"{name} with {frozen} frozen"
    space.close()


def _pipeline_order() -> None:
    """Four forwards in flight over one workspace, backwards in another order, no_grad in between: no bit changes."""
    poison()
    layers = [Layer(Case(Load("uniform", everyone(t, 400 - t), 2, 8), 256, 128), seed=t) for t in (10, 200, 399, 77)]
    shape = WorkspaceShape(dist.get_world_size(), 8, 2, 256, 400)
    space = Workspace.create(shape, group=dist.group.WORLD, deadline_s=5.0)
    together, alone = ([RankLeaves(layer, dist.get_rank()) for layer in layers] for _ in range(2))
    options = {"group": dist.group.WORLD, "workspace": space}
    for leaves in alone:
        leaves.run(**options)
    for leaves in together:
        leaves.y = leaves.forward(**options)
        with torch.no_grad():
            assert torch.equal(leaves.forward(**options), leaves.y)
    for number in (1, 3, 0, 2):
        together[number].y.backward(together[number].dy)
    for one, other in zip(together, alone, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one.grads(), other.grads(), strict=True))
    space.close()


def _training() -> None:
    """MegaMoE over all ranks, 200 Adam steps: the loss follows that of the reference backend over the same group."""
    torch.manual_seed(0)
    rank, losses = dist.get_rank(), {}
    config = {"num_experts": 8, "top_k": 2, "ep_size": dist.get_world_size(), "clamp": 10.0}
    for backend in ("fused", "reference"):
        torch.manual_seed(0)
        make = MegaMoEConfig(256, 128, **config, backend=backend)
        options = {"device": "cuda", "dtype": torch.bfloat16, "tokens": 512}
        teacher, layer = MegaMoE(make, dist.group.WORLD, **options), MegaMoE(make, dist.group.WORLD, **options)
        assert (layer.workspace is None) == (backend == "reference")
        generator = torch.Generator("cuda").manual_seed(rank)
        x = torch.randn(512, 256, device="cuda", generator=generator).bfloat16()
        ids = torch.rand(512, 8, device="cuda", generator=generator).topk(2).indices
        p = torch.rand(512, 2, device="cuda", generator=generator)
        target = teacher(x, ids, p).detach().float()
        masters = [w.detach().float().clone().requires_grad_() for w in layer.parameters()]
        optimizer, losses[backend] = torch.optim.Adam(masters, lr=2e-3), []
        for _ in range(200):
            with torch.no_grad():
                for weight, master in zip(layer.parameters(), masters, strict=True):
                    weight.copy_(master)
            loss = (layer(x, ids, p).float() - target).square().mean()
            loss.backward()
            for weight, master in zip(layer.parameters(), masters, strict=True):
                master.grad, weight.grad = weight.grad.float(), None
            optimizer.step()
            dist.all_reduce(loss := loss.detach())
            losses[backend].append(loss)
        for module in (teacher, layer):
            module.close()
    ours, theirs = (torch.stack(losses[backend]) for backend in ("fused", "reference"))
    assert theirs[-1] < 0.3 * theirs[0]
    torch.testing.assert_close(ours, theirs, rtol=0.05, atol=1e-3)


CHECKS = {
    check.__name__: check
    for check in (_workloads, _held, _overflow, _plain, _bad_ids, _refusals, _uneven_needs, _pipeline_order, _training)
}


@pytest.fixture(scope="module", params=RANKS, ids=lambda ranks: f"{ranks} ranks")
def finished(request, tmp_path_factory) -> tuple[list[str], Exception | None]:
    """Names of the checks that all ranks of one set of processes finished, and what ended it early."""
    log, error = tmp_path_factory.mktemp("ranks") / "finished", None
    log.touch()
    try:
        processes.run(run_checks, request.param, str(log))
    except Exception as raised:  # torch's wrapper of a rank's exception, with its traceback as text
        error = raised
    return log.read_text().split(), error


def run_checks(log: str) -> None:
    """In every rank."""
    for name, check in CHECKS.items():
        check()
        torch.use_deterministic_algorithms(False)
        dist.barrier()
        if dist.get_rank() == 0:
            with open(log, "a") as file:
                file.write(name + "\n")


@pytest.mark.parametrize("name", CHECKS)
def test_processes(finished, name):
    done, error = finished
    if name in done:
        return
    assert error is not None, "the processes ended without an error and without this check"
    first = next(check for check in CHECKS if check not in done)
    if name != first:
        pytest.fail(f"not reached: {first} failed before")
    raise error

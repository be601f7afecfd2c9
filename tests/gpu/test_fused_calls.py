"""Fused calls of one rank: what is kept and launched, sizing modes, CUDA graphs, training."""

import pytest
import torch

from megamoe_train import MegaMoE, MegaMoEConfig, RowOverflow, Workspace, WorkspaceShape, check_workspace
from megamoe_train.functional import moe
from megamoe_train.plan import ROW_TILE, build_plan
from tests.gpu.layer_case import Case, Layer
from tests.gpu.leaves import Leaves, MainGrads, assert_same, buffers_of
from tests.gpu.virtual import Load

pytestmark = [pytest.mark.gpu, pytest.mark.filterwarnings("ignore:.*deterministic:UserWarning")]
CASE = Case(Load("some_dropped", (600,), 3, 8), 512, 256, 1.0, 2.0)


# ---- memory and launches ---------------------------------------------------------------------------------------------


def requested_bytes() -> int:
    """What tensors hold; memory_allocated counts with it what the allocator's blocks have too much."""
    return torch.cuda.memory_stats()["requested_bytes.all.current"]


@pytest.mark.parametrize("recompute", [None, "fc1"])
def test_what_is_kept_for_backward(recompute):
    case = Case(Load("uniform", (2048,), 4, 8), 1024, 512)
    leaves = Leaves(Layer(case))
    leaves.run(recompute=recompute)  # caches and the shared workspace
    torch.cuda.synchronize()
    before = requested_bytes()
    y = leaves.forward(recompute=recompute)
    torch.cuda.synchronize()
    kept = requested_bytes() - before - y.numel() * 2
    slots, row = 2048 * 4, 2 * 2 * 512
    plan = slots * 8 + slots * 4 + (slots + 8 * ROW_TILE) * 8  # slot_of, topk_ids, source_of
    limit = plan + 64 * 1024 + (0 if recompute else (slots + 8 * ROW_TILE) * row)
    assert (0 if recompute else slots * row) < kept <= limit
    y.backward(leaves.dy)


def kernels_of(call) -> list[str]:
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        call()
        torch.cuda.synchronize()
    return [event.name for event in profile.events() if event.device_type == torch.autograd.DeviceType.CUDA]


def test_launches():
    """Between entry and return: the plan, announcing, one fused kernel; no NCCL, nothing elementwise."""
    layer = Layer(CASE)
    leaves = Leaves(layer)
    sink = MainGrads(buffers_of(leaves, 0.0))
    leaves.run(wgrad_sink=sink)
    y = None

    def forward():
        nonlocal y
        y = leaves.forward(wgrad_sink=sink)

    leaves.x.grad = leaves.p.grad = None  # autograd hands over the gradients instead of adding them
    passes = {"forward": kernels_of(forward), "backward": kernels_of(lambda: y.backward(leaves.dy))}
    allowed = ("plan_count", "plan_place", "plan_sources", "announce", "fused")
    for name, launched in passes.items():
        fused = [kernel for kernel in launched if "fused_kernel" in kernel]
        assert len(fused) == 1, f"{name}: {launched}"
        assert not [kernel for kernel in launched if not any(part in kernel for part in allowed)], f"{name}: {launched}"
    assert sum("plan" in kernel for kernel in passes["forward"]) == 2  # one rank: place lists the rows too
    assert not any("plan" in kernel for kernel in passes["backward"])


def test_the_host_reads_one_pinned_word_and_never_synchronises():
    leaves = Leaves(Layer(CASE))
    sink = MainGrads(buffers_of(leaves, 0.0))
    leaves.run(wgrad_sink=sink)
    torch.cuda.set_sync_debug_mode("error")
    try:
        leaves.run(wgrad_sink=sink)
    finally:
        torch.cuda.set_sync_debug_mode("default")


# ---- sizing and graphs -----------------------------------------------------------------------------------------------


def test_sizing_modes_give_the_same_bits(poisoned):
    layer = Layer(CASE)
    expected, shape = Leaves(layer).run(), WorkspaceShape(1, 8, 3, 512, 600)
    for options in ({"sizing": "exact"}, {"sizing": "fixed", "capacity": 4096}):
        space = Workspace.create(shape, deadline_s=5.0, **options)
        assert_same(Leaves(layer).run(workspace=space), expected)
        check_workspace(space, wait=True)
        space.close()
    for tokens in (0, 1):  # pools of no rows
        small = Layer(Case(Load("all_dropped", (tokens,), 3, 8), 512, 256))
        space = Workspace.create(shape, deadline_s=5.0, sizing="exact")
        assert (Leaves(small).run(workspace=space).y == 0).all()
        space.close()


def test_a_fixed_capacity_that_is_too_small_is_told(poisoned):
    layer = Layer(CASE)
    rows = build_plan(layer.ids[0].cpu(), 8).num_rows
    space = Workspace.create(WorkspaceShape(1, 8, 3, 512, 600), deadline_s=5.0, sizing="fixed", capacity=rows - 128)
    leaves = Leaves(layer)
    with torch.no_grad():
        y = leaves.forward(workspace=space)
    message = f"rank 0 has room for {rows - 128} rows; this routing needs up to {rows}"
    with pytest.raises(RowOverflow, match=message):
        check_workspace(space, wait=True)
    assert y.isnan().all()  # nothing was written
    small = Layer(Case(Load("uniform", (64,), 3, 8), 512, 256))
    assert_same(Leaves(small).run(workspace=space), Leaves(small).run())
    check_workspace(space, wait=True)


def test_a_captured_layer_replays_with_new_inputs():
    first, *others = [Layer(Case(Load("uniform", (500,), 3, 8), 512, 256, 1.0), seed) for seed in range(4)]
    space = Workspace.create(WorkspaceShape(1, 8, 3, 512, 500), deadline_s=5.0, sizing="fixed", capacity=4096)
    leaves = Leaves(first)
    sink = MainGrads(buffers_of(leaves, 0.0))

    def step():
        y = leaves.forward(workspace=space, wgrad_sink=sink)
        return y, *torch.autograd.grad(y, [leaves.x, leaves.p, *leaves.fc1, *leaves.fc2], leaves.dy, allow_unused=True)

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y, dx, dp, *_ = step()
    for layer in others:
        for buffer in sink.buffers.values():
            buffer.zero_()
        with torch.no_grad():
            for mine, theirs in ((leaves.x, layer.xs[0]), (leaves.p, layer.ps[0]), (leaves.dy, layer.dys[0])):
                mine.copy_(theirs)
            leaves.ids.copy_(layer.ids[0])
        graph.replay()
        torch.cuda.synchronize()
        check_workspace(space)
        eager = Leaves(layer)
        eager.fc1, eager.fc2 = leaves.fc1, leaves.fc2
        again = MainGrads({key: torch.zeros_like(buffer) for key, buffer in sink.buffers.items()})
        eager.run(wgrad_sink=again)
        assert torch.equal(y, eager.y) and torch.equal(dx, eager.x.grad) and torch.equal(dp, eager.p.grad)
        assert all(torch.equal(sink.buffers[key], again.buffers[key]) for key in sink.buffers)


def test_capturing_without_a_fixed_capacity_is_refused():
    leaves = Leaves(Layer(CASE))
    leaves.run()
    message = 'sizing: got "high_water" while a CUDA graph is captured'
    with pytest.raises(ValueError, match=message), torch.cuda.graph(torch.cuda.CUDAGraph()):
        leaves.forward()
    assert_same(Leaves(leaves.layer).run(), Leaves(leaves.layer).run())


# ---- training --------------------------------------------------------------------------------------------------------


def test_a_layer_trains_as_on_the_reference():
    """200 Adam steps on another layer's output: the loss follows that of the reference backend within bf16 noise."""
    torch.manual_seed(0)
    config = MegaMoEConfig(256, 128, num_experts=8, top_k=2, clamp=10.0)
    teacher = MegaMoE(config, device="cuda", dtype=torch.bfloat16)
    start = MegaMoE(config, device="cuda", dtype=torch.bfloat16)
    x = torch.randn(512, 256, device="cuda").bfloat16()
    ids = torch.rand(512, 8, device="cuda").topk(2).indices
    p = torch.rand(512, 2, device="cuda")
    target = teacher(x, ids, p).detach().float()
    losses = {}
    for backend in ("fused", "reference"):
        masters = [weight.detach().float().clone().requires_grad_() for weight in (start.fc1, start.fc2)]
        optimizer, losses[backend] = torch.optim.Adam(masters, lr=2e-3), []
        for _ in range(200):
            fc1, fc2 = (master.bfloat16() for master in masters)
            loss = (moe(x, ids, p, fc1, fc2, clamp=10.0, backend=backend).float() - target).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses[backend].append(loss.detach())
    ours, theirs = (torch.stack(losses[backend]) for backend in ("fused", "reference"))
    assert theirs[-1] < 0.3 * theirs[0]
    torch.testing.assert_close(ours, theirs, rtol=0.05, atol=1e-3)

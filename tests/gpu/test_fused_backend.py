"""`moe` on the fused kernels, one rank: gradients and sinks, what is kept, refusals, order, launches, CUDA graphs."""

import re

import pytest
import torch
from torch import Tensor

from megamoe_train import MegaMoE, MegaMoEConfig, RowOverflow, Workspace, WorkspaceShape, backends, check_workspace
from megamoe_train.functional import moe
from megamoe_train.plan import ROW_TILE, build_plan
from tests.gpu.layer_case import Case, Layer, RankResult, assert_layer
from tests.gpu.virtual import Load

pytestmark = [pytest.mark.gpu, pytest.mark.filterwarnings("ignore:.*deterministic:UserWarning")]
CASE = Case(Load("some_dropped", (600,), 3, 8), 512, 256, 1.0, 2.0)


@pytest.fixture
def poisoned():
    """torch.empty is filled with NaN (or the largest integer): what a kernel does not write shows."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


class MainGrads:
    """A sink with one fp32 buffer per weight, as Megatron's main_grad is used."""

    def __init__(self, buffers: dict[int, Tensor]):
        self.buffers = buffers

    def buffer(self, weight: Tensor) -> Tensor | None:
        return self.buffers.get(id(weight))

    def finish(self, weight: Tensor, grad: Tensor | None) -> Tensor | None:
        return None if grad is None else grad.to(weight.dtype)


class Leaves:
    """One rank's inputs as leaves. `frozen` ones want no gradient."""

    def __init__(self, layer: Layer, frozen: tuple[str, ...] = ()):
        fc1, fc2 = layer.experts_of(0)
        self.layer, self.ids, self.dy = layer, layer.ids[0], layer.dys[0]
        self.x, self.p = layer.xs[0].clone(), layer.ps[0].clone()
        self.fc1, self.fc2 = [w.clone() for w in fc1], [w.clone() for w in fc2]
        for name, tensors in self.named().items():
            for tensor in tensors:
                tensor.requires_grad_(name not in frozen)

    def named(self) -> dict[str, list[Tensor]]:
        return {"x": [self.x], "p": [self.p], "fc1": self.fc1, "fc2": self.fc2}

    def forward(self, **options) -> Tensor:
        options = {"clamp": self.layer.case.clamp} | options
        return moe(self.x, self.ids, self.p, self.fc1, self.fc2, **options)

    def run(self, **options) -> "Leaves":
        self.y = self.forward(**options)
        self.y.backward(self.dy)
        return self

    def grads(self) -> list[Tensor | None]:
        return [tensor.grad for tensors in self.named().values() for tensor in tensors]


def assert_same(one: Leaves, other: Leaves, *, only_present: bool = False) -> None:
    assert torch.equal(one.y, other.y)
    for number, (mine, theirs) in enumerate(zip(one.grads(), other.grads(), strict=True)):
        if not (only_present and (mine is None or theirs is None)):
            assert torch.equal(mine, theirs), f"gradient {number}"


def buffers_of(leaves: Leaves, fill: float) -> dict[int, Tensor]:
    return {id(w): torch.full(w.shape, fill, device="cuda") for w in [*leaves.fc1, *leaves.fc2]}


# ---- numbers ---------------------------------------------------------------------------------------------------------


def test_auto_is_fused_here():
    assert backends.choose("auto", "cuda").name == "fused"


@pytest.mark.parametrize("recompute", [None, "fc1"])
def test_against_fp64_through_autograd(poisoned, recompute):
    """fp32 gradients by a sink; those that autograd returns are these, rounded."""
    layer = Layer(CASE)
    leaves = Leaves(layer)
    buffers = buffers_of(leaves, 0.0)
    leaves.run(wgrad_sink=MainGrads(buffers), recompute=recompute)
    dfc1, dfc2 = ([buffers[id(w)] for w in kind] for kind in (leaves.fc1, leaves.fc2))
    result = RankResult(leaves.y.detach(), None, leaves.x.grad, leaves.p.grad, dfc1, dfc2)
    assert_layer(layer, {0: result})
    returned = Leaves(layer).run()
    for weight, exact in zip([*returned.fc1, *returned.fc2], [*dfc1, *dfc2], strict=True):
        assert torch.equal(weight.grad, exact.bfloat16())


def test_recompute_gives_the_same_bits(poisoned):
    layer = Layer(CASE)
    assert_same(Leaves(layer).run(), Leaves(layer).run(recompute="fc1"))


@pytest.mark.parametrize("frozen", [("x",), ("p",), ("fc1",), ("fc2",), ("fc1", "fc2"), ("x", "p", "fc2")])
def test_frozen_inputs_change_no_other_gradient(poisoned, frozen):
    layer = Layer(CASE)
    full, part = Leaves(layer).run(), Leaves(layer, frozen).run()
    assert all(tensor.grad is None for name in frozen for tensor in part.named()[name])
    assert_same(full, part, only_present=True)


def test_micro_batches_accumulate_in_fp32(poisoned):
    """Buffers are views of one flat tensor in reverse order, as main_grad is; one of them unaligned. Sums are exact."""
    layers = [Layer(CASE, seed) for seed in range(3)]
    leaves = Leaves(layers[0])
    weights = [*leaves.fc1, *leaves.fc2]
    flat = torch.zeros(sum(w.numel() + 4 for w in weights) + 1, device="cuda")
    buffers, end = {}, flat.numel() - 1
    for number, weight in enumerate(weights):
        begin = end - weight.numel() - 4 + (number == 5)  # expert 5 of fc1 is off by four bytes
        buffers[id(weight)] = flat[begin : begin + weight.numel()].view(weight.shape)
        end -= weight.numel() + 4
    total = [torch.zeros_like(w, dtype=torch.float32) for w in weights]
    for layer in layers:
        alone = Leaves(layer)
        alone.fc1, alone.fc2 = leaves.fc1, leaves.fc2
        written = buffers_of(alone, 0.0)
        alone.run(wgrad_sink=MainGrads(written))
        total = [t + written[id(w)] for t, w in zip(total, weights, strict=True)]
        alone.run(wgrad_sink=MainGrads(buffers))
    for number, (weight, exact) in enumerate(zip(weights, total, strict=True)):
        torch.testing.assert_close(buffers[id(weight)], exact, rtol=1e-5, atol=1e-5, msg=f"weight {number}")
    assert buffers[id(weights[5])].data_ptr() % 16 != 0


def test_forwards_in_flight_and_backwards_in_any_order(poisoned):
    layers = [Layer(Case(Load("uniform", (tokens,), 2, 8), 512, 256), tokens) for tokens in (64, 700, 0, 333)]
    together, alone = [Leaves(layer) for layer in layers], [Leaves(layer).run() for layer in layers]
    for leaves in together:
        leaves.y = leaves.forward()
    for number in (0, 3, 1, 2):
        together[number].y.backward(together[number].dy)
    for one, other in zip(together, alone, strict=True):
        assert_same(one, other)


def test_calls_on_other_streams_run_in_order(poisoned):
    layer = Layer(CASE)
    expected = Leaves(layer).run()
    space = Workspace.create(WorkspaceShape(1, 8, 3, 512, 600), deadline_s=5.0)
    leaves = [Leaves(layer) for _ in range(4)]
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in leaves]
    for one, stream in zip(leaves, streams, strict=True):
        with torch.cuda.stream(stream):
            if stream is streams[0]:
                torch.cuda._sleep(20_000_000)
            one.run(workspace=space)
    torch.cuda.synchronize()
    for one in leaves:
        assert_same(one, expected)


# ---- memory and launches ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("recompute", [None, "fc1"])
def test_what_is_kept_for_backward(recompute):
    case = Case(Load("uniform", (2048,), 4, 8), 1024, 512)
    leaves = Leaves(Layer(case))
    leaves.run(recompute=recompute)  # caches and the shared workspace
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    y = leaves.forward(recompute=recompute)
    torch.cuda.synchronize()
    kept = torch.cuda.memory_allocated() - before - y.numel() * 2
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
    """Between entry and return: the plan, one fused kernel, clearing and announcing; no NCCL, nothing elementwise."""
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
    allowed = ("plan_count", "plan_place", "plan_sources", "announce", "fused", "Memset")
    for name, launched in passes.items():
        fused = [kernel for kernel in launched if "fused_kernel" in kernel]
        assert len(fused) == 1, f"{name}: {launched}"
        assert not [kernel for kernel in launched if not any(part in kernel for part in allowed)], f"{name}: {launched}"
    assert sum("plan" in kernel for kernel in passes["forward"]) == 3
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


# ---- refusals --------------------------------------------------------------------------------------------------------


def changed(leaves: Leaves, **replaced):
    arguments = {"x": leaves.x, "topk_ids": leaves.ids, "topk_weights": leaves.p, "fc1": leaves.fc1, "fc2": leaves.fc2}
    return moe(**arguments | replaced)


def unaligned(weight: Tensor) -> Tensor:
    return torch.empty(weight.numel() + 1, dtype=weight.dtype, device="cuda")[1:].view(weight.shape).copy_(weight)


def with_id(ids: Tensor, value: int) -> Tensor:
    ids = ids.clone()
    ids[400, 2] = value
    return ids


REFUSED = {
    "dtype": (lambda v: {"x": v.x.float(), "fc1": [w.float() for w in v.fc1], "fc2": [w.float() for w in v.fc2]},
              "x: got dtype torch.float32; allowed: torch.bfloat16"),
    "hidden": (lambda v: {"x": v.x[:, :320].contiguous(), "fc1": [w[:, :320].contiguous() for w in v.fc1],
                          "fc2": [w[:320].contiguous() for w in v.fc2]}, "H: got 320; allowed: a multiple of 256"),
    "device of ids": (lambda v: {"topk_ids": v.ids.cpu()}, "topk_ids: got device cpu; allowed: cuda:0"),
    "one expert unaligned": (lambda v: {"fc1": [*v.fc1[:3], unaligned(v.fc1[3].detach()), *v.fc1[4:]]},
                             "fc1[3]: got strides (512, 1) at address"),
    "one expert strided": (lambda v: {"fc2": [v.fc2[0].detach().t().contiguous().t(), *v.fc2[1:]]},
                           "fc2[0]: got strides (1, 512)"),
    "clamp": (lambda v: {"clamp": 1.0001}, "clamp: got 1.0001; allowed: None or a number that bf16 holds exactly"),
    "an id too large": (lambda v: {"topk_ids": with_id(v.ids, 8)},
                        "topk_ids: got expert 8 at rank 0, token 400, k = 2; allowed: -1 (dropped) and 0..7"),
    "an id too small": (lambda v: {"topk_ids": torch.full_like(v.ids, -2)},
                        "topk_ids: got expert -2 at rank 0, token 0, k = 0"),
    "too many tokens": (lambda v: {"workspace": Workspace.create(WorkspaceShape(1, 8, 3, 512, 599))},
                        "x: got 600 tokens; allowed: at most 599, the tokens of the workspace"),
    "workspace of another shape": (lambda v: {"workspace": Workspace.create(WorkspaceShape(1, 16, 3, 512, 600))},
                                   "workspace: got experts = 16; allowed: 8, as in this call"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_refused_by_name_and_the_next_call_works(name):
    layer = Layer(CASE)
    leaves = Leaves(layer)
    change, message = REFUSED[name]
    with pytest.raises(ValueError, match=re.escape(message)):
        changed(leaves, **change(leaves))
    assert_same(Leaves(layer).run(), Leaves(layer).run())
    torch.cuda.synchronize()


def test_a_second_backward_is_refused_by_name():
    leaves = Leaves(Layer(CASE))
    y = leaves.forward()
    y.backward(leaves.dy, retain_graph=True)
    with pytest.raises(RuntimeError, match="megamoe: backward of this forward has run already"):
        y.backward(leaves.dy)


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

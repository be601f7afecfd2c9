"""The fused operators in plain torch on the CPU, by the contracts of ops_fused and ops_plan, for one rank.

What is behind them (FusedBackend, FusedPlan, autograd) runs as it does on a GPU: capacities, verdicts, overflow,
poisoned rows from M on, gradients that are written or added.
"""

from __future__ import annotations

import contextlib
import importlib
import sys
import types
from dataclasses import dataclass, field

import pytest
import torch
from torch import Tensor

import megamoe_train
from megamoe_train import ops_plan, reference, workspace
from megamoe_train.functional import moe
from megamoe_train.plan import RoutingPlan, build_plan
from megamoe_train.verdicts import Verdicts
from megamoe_train.workspace import Shape, Workspace
from tests.test_autograd import leaves_of
from tests.workloads import make_layer


class FakeWorkspace(Workspace):
    """Without memory, kernels and watchdog."""

    def __init__(self, shape: Shape, rank: int = 0, sizing: str = "high_water", capacity: int = 0):
        workspace.check_sizing(sizing, capacity)
        self.shape, self.rank, self.sizing, self.capacity = shape, rank, sizing, capacity
        self.layout = workspace.layout_of(shape)
        self.memory = torch.empty(0)
        self.guard = types.SimpleNamespace(watch=contextlib.nullcontext, check=lambda: None, failure=lambda: None)
        self.high_water = self.most_rows = self.aborted = 0
        self.verdicts = Verdicts(pinned=False)
        self.closed, self.group = False, None

    def abort(self) -> None:
        self.aborted += 1


@dataclass(eq=False)
class FakeDevicePlan(ops_plan.DevicePlan):
    truth: RoutingPlan | None = None  # None: a bad id

    @property
    def good(self) -> bool:
        return int(self.status[1]) == ops_plan.PlanCode.GOOD

    def to_routing_plan(self) -> RoutingPlan:
        self.settle()
        return self.truth


def fake_build_plan(space: FakeWorkspace, ids: Tensor, *, sizing: str = "high_water", capacity: int = 0):
    experts, status = space.shape.experts, space.verdicts.next(captured=False)
    bad = ((ids < -1) | (ids >= experts)).flatten().nonzero()
    status[0] = space.verdicts.plans
    truth = None
    if len(bad):
        where = int(bad[0])
        status[1:5] = torch.tensor([ops_plan.PlanCode.BAD_ID, 0, where, int(ids.flatten()[where])])
    else:
        truth = build_plan(ids, experts)
        capacity = truth.num_rows if sizing == "exact" else capacity
        code = ops_plan.PlanCode.OVERFLOW if truth.num_rows > capacity else ops_plan.PlanCode.GOOD
        status[1:7] = torch.tensor([code, 0, -1, capacity, truth.num_rows, truth.num_rows])
    plan = FakeDevicePlan(space, ids, capacity, status, torch.empty(0), truth=truth)
    if sizing == "exact":
        plan.settle()
    return plan


@dataclass(eq=False)
class FakeOps:
    """In place of the module `ops_fused`, and what was asked of it."""

    calls: list[tuple[str, dict]] = field(default_factory=list)
    fail: Exception | None = None  # raised by the next launch

    @property
    def WeightMaps(self):
        return FakeMaps

    def _log(self, name: str, plan: FakeDevicePlan, **details) -> None:
        if self.fail is not None:
            error, self.fail = self.fail, None
            raise error
        self.calls.append((name, {"capacity": plan.capacity, "good": plan.good, **details}))

    def names(self) -> list[str]:
        return [name for name, _ in self.calls]

    def forward(self, plan, x, weights, maps, *, clamp=None, num_sms=0):
        assert x.is_contiguous() and weights.dtype == torch.float32 and weights.is_contiguous()
        self._log("forward", plan, maps=maps)
        y, h = torch.full_like(x, torch.nan), x.new_full((plan.capacity, maps.fc1[0].shape[0]), torch.nan)
        if plan.good:
            args = plan.truth, weights, maps.fc1, maps.fc2
            result, rows = reference.forward(x, *args, clamp=clamp, group=None)
            y.copy_(result)
            h[: len(rows)] = rows
        return y, h

    def fc1_again(self, plan, x, weights, maps):
        self._log("fc1_again", plan)
        h = x.new_full((plan.capacity, maps.fc1[0].shape[0]), torch.nan)
        h[: plan.truth.num_rows] = reference.fc1_forward(reference.dispatch(x, plan.truth, None), plan.truth, maps.fc1)
        return h

    def backward(self, plan, dy, x, h, weights, maps, dfc1, dfc2, *, clamp=None, accumulate1=True, accumulate2=True,
                 num_sms=0):  # fmt: skip
        assert dy.is_contiguous() and h.shape[0] == plan.capacity
        self._log("backward", plan, tables=(dfc1, dfc2), accumulate=(accumulate1, accumulate2))
        fresh = [[torch.zeros_like(w, dtype=torch.float32) for w in kind] for kind in (maps.fc1, maps.fc2)]
        grads = reference.backward(
            dy, x, h[: plan.truth.num_rows], plan.truth, weights, maps.fc1, maps.fc2, clamp=clamp, group=None,
            dfc1=fresh[0], dfc2=fresh[1],
        )  # fmt: skip
        for table, kind, add in zip((dfc1, dfc2), fresh, (accumulate1, accumulate2), strict=True):
            for buffer, value in zip(table.buffers, kind, strict=True) if table else ():
                buffer.add_(value) if add else buffer.copy_(value)
        h.fill_(torch.nan)  # its place is dh's
        return grads.dx, grads.dweights


@dataclass
class FakeMaps:
    fc1: list[Tensor]
    fc2: list[Tensor]

    @classmethod
    def of(cls, fc1, fc2):
        return cls(fc1, fc2)


@dataclass
class FakeTable:
    buffers: list[Tensor]

    @classmethod
    def of(cls, buffers):
        return cls(buffers)


@pytest.fixture
def fused(monkeypatch):
    """(a FusedBackend, the fake operators it calls); `moe` on CPU tensors takes it for backend="fused"."""
    fake = FakeOps()
    monkeypatch.setitem(sys.modules, "megamoe_train.ops_fused", fake)
    monkeypatch.setattr(megamoe_train, "ops_fused", fake, raising=False)
    module, plans = (importlib.import_module(f"megamoe_train.{name}") for name in ("fused", "fused_plan"))
    monkeypatch.setattr(module, "ops_fused", fake)
    monkeypatch.setattr(module.ops, "GradientTable", FakeTable)
    monkeypatch.setattr(ops_plan, "build_plan", fake_build_plan)
    monkeypatch.setattr(plans, "_shared", {})
    monkeypatch.setattr(plans.Workspace, "create", lambda shape, device: FakeWorkspace(shape))
    for part in (module, plans):
        monkeypatch.setattr(part, "in_order", lambda device: contextlib.nullcontext())  # of no stream
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(module.ops, "raw_stream", lambda device: 0)
    from megamoe_train import backends

    backend = module.FusedBackend()
    monkeypatch.setattr(backends, "_BACKENDS", {"fused": backend, "reference": backends.ReferenceBackend()})
    monkeypatch.setattr(backends, "choose", lambda name, device: backends.Choice(name, "a test"))
    return backend, fake


# ---- calls of one layer on the fused backend and on the reference

NAMES = ("x", "weights", "fc1", "fc2")


def layer_of(tokens: int = 20, routing: str = "uniform", seed: int = 0, **shape):
    shape = {"top_k": 3, "num_experts": 4, "hidden": 256, "inner": 128} | shape
    return make_layer([tokens], dtype=torch.bfloat16, routing=routing, seed=seed, **shape)


def run(leaves: dict[str, Tensor], ids: Tensor, dy: Tensor, backend: str = "fused", **options) -> Tensor:
    y = moe(leaves["x"], ids, *[leaves[name] for name in NAMES[1:]], backend=backend, **options)
    y.backward(dy)
    return y.detach()


def same_as_reference(layer, frozen: tuple[str, ...] = (), **options) -> None:
    ours, ids, dy = leaves_of(layer, frozen)
    theirs, _, _ = leaves_of(layer, frozen)
    knobs = {name: value for name, value in options.items() if name != "workspace"}
    assert torch.equal(run(ours, ids, dy, **options), run(theirs, ids, dy, "reference", **knobs))
    for name in NAMES:
        mine, other = ours[name].grad, theirs[name].grad
        assert mine is None and other is None if name in frozen else torch.equal(mine, other), name


def two_ranks(**options) -> FakeWorkspace:
    return FakeWorkspace(Shape(2, 4, 3, 256, 1000), **options)

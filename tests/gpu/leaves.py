"""One rank's inputs as autograd leaves, for tests that call `moe`; a sink like Megatron's main_grad."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from unittest import mock

import torch
from torch import Tensor

from megamoe_train.functional import moe
from megamoe_train.fused_plan import FusedPlan
from megamoe_train.workspace import Workspace
from tests.gpu.layer_case import Layer, RankResult, assert_layer


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

    def run(self, **options) -> Leaves:
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
    return {id(w): torch.full(w.shape, fill, device=w.device) for w in [*leaves.fc1, *leaves.fc2]}


@contextlib.contextmanager
def plain_passes() -> Iterator[list[str]]:
    """Which passes inside were launched by one operator (plain.py)."""
    passes = []

    def noting(name: str, original):
        def call(*args):
            if done := original(*args):
                passes.append(name)
            return done

        return call

    with contextlib.ExitStack() as patches:
        for operator, name in (("plain_forward", "forward"), ("plain_backward", "backward")):
            original = getattr(torch.ops.megamoe, operator)
            patches.enter_context(mock.patch.object(torch.ops.megamoe, operator, noting(name, original)))
        yield passes


def assert_plain_passes(leaves: Leaves, **options) -> None:
    """A layer's second step is launched by one operator a pass, with the bits of the first; no unusual one is."""
    buffers = buffers_of(leaves, 1.0)
    options |= {"wgrad_sink": MainGrads(buffers)}

    def step(expected: list[str] | None, dy: Tensor | None = None, **unusual) -> list[Tensor]:
        for tensor in (leaves.x, leaves.p, *buffers.values()):
            tensor.grad = None
        for buffer in buffers.values():
            buffer.fill_(1.0)
        with plain_passes() as passes:
            y = leaves.forward(**options | unusual)
            y.backward(leaves.dy if dy is None else dy)
        assert expected is None or passes == expected
        return [y.detach(), leaves.x.grad, leaves.p.grad, *[buffer.clone() for buffer in buffers.values()]]

    def same(results: list[Tensor]) -> bool:
        return all(map(torch.equal, results, first))

    first = step(None)  # a layer of an earlier test may have lain where this one does
    assert same(step(["forward", "backward"]))
    launch = torch.ops.megamoe.plain_forward
    with mock.patch.object(torch.ops.megamoe, "plain_forward", lambda *args: launch(*args)[2:]):
        assert same(step(["forward"]))  # memory was short after the plan: the long way goes on with it
    assert same(step(["forward"], recompute="fc1"))
    assert same(step(["forward"], dy=leaves.dy.t().contiguous().t()))
    assert not same(step([], clamp=0.25)), "the clamp does nothing here"
    assert same(step([]))  # the layer's clamp is another one again
    leaves.fc2[1].data = leaves.fc2[1].data.clone()
    assert same(step([])), "a weight elsewhere"
    assert same(step(["forward", "backward"]))
    if (space := options.get("workspace")) is not None:
        assert same(step(["forward", "backward"], plan=FusedPlan.build(space, leaves.ids)))
    leaves.ids = leaves.ids.int()
    assert same(step(["forward", "backward"]))


SAME_BYTES = ((512, 128), (256, 256))  # H, I


class Pooled:
    """A sink that hands out fresh views of one pool, for whatever layer comes."""

    def __init__(self, device: torch.device):
        self.pool, self.places, self.end = torch.zeros(1 << 20, device=device), {}, 0

    def buffer(self, weight: Tensor) -> Tensor:
        if id(weight) not in self.places:
            self.places[id(weight)], self.end = self.end, self.end + weight.numel()
        begin = self.places[id(weight)]
        return self.pool[begin : begin + weight.numel()].view(weight.shape)

    def finish(self, weight: Tensor, grad: Tensor | None) -> None:
        return None


def assert_fresh_buffers(layers: list[Layer], spaces: Sequence[Workspace | None]) -> None:
    """Layers whose weights have equal sizes and other shapes take turns at the same memory, which gets new tensors
    (and they the ids of old ones) at every step: each finds its own gradients there."""
    sinks = [Pooled(layer.xs[0].device) for layer in layers]
    for sink in sinks[1:]:
        sink.pool = sinks[0].pool
    leaves, first = [Leaves(layer) for layer in layers], {}
    for _ in range(6):
        for number, (one, sink) in enumerate(zip(leaves, sinks, strict=True)):
            sink.pool.zero_()
            one.run(wgrad_sink=sink, workspace=spaces[number])
            assert torch.equal(sink.pool, first.setdefault(number, sink.pool.clone())), f"layer {number}"
    assert any(pool.any() for pool in first.values())


def assert_through_autograd(layer: Layer, *, recompute: str | None = None, **options) -> None:
    """fp32 gradients by a sink against fp64; those that autograd returns are these, rounded."""
    leaves = Leaves(layer)
    buffers = buffers_of(leaves, 0.0)
    leaves.run(wgrad_sink=MainGrads(buffers), recompute=recompute, **options)
    dfc1, dfc2 = ([buffers[id(w)] for w in kind] for kind in (leaves.fc1, leaves.fc2))
    assert_layer(layer, {0: RankResult(leaves.y.detach(), None, leaves.x.grad, leaves.p.grad, dfc1, dfc2)})
    returned = Leaves(layer).run(**options)
    for weight, exact in zip([*returned.fc1, *returned.fc2], [*dfc1, *dfc2], strict=True):
        assert torch.equal(weight.grad, exact.bfloat16())

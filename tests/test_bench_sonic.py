"""SonicMoE as a candidate of `bench layer`, with plain torch in place of its kernels: it is given what they expect."""

from __future__ import annotations

import sys
from dataclasses import replace
from types import ModuleType, SimpleNamespace

import pytest
import torch

from megamoe_train import reference
from megamoe_train.bench import candidates, sonic_layer
from megamoe_train.bench.layer_load import Shape
from megamoe_train.plan import build_plan
from tests.numerics import assert_close
from tests.test_bench_layer import inputs_of

SMALL = Shape("small", hidden=64, inter=40, top_k=3, experts_local=4, tokens=30, clamp=None)


def metadata(ids, experts, counts, ends, gather, scatter, back) -> None:
    assert ids.dtype == torch.int32
    flat = ids.flatten().long()
    order = torch.argsort(flat, stable=True)
    counts.copy_(torch.bincount(flat, minlength=experts))
    ends.copy_(torch.cat([torch.zeros(1), counts.cumsum(0)]))
    gather.copy_(order // ids.shape[1])
    scatter.copy_(order)
    back[order] = torch.arange(order.numel(), dtype=torch.int32)


def up(x, w1, bias, ends, slots, top_k, gather, scatter, back, counts_of_tokens, varies, activation, inference):
    """w1 `[2I, H, E]`, rows of gate and up in turn."""
    assert (bias, counts_of_tokens, varies, inference, activation) == (None, None, False, False, "swiglu")
    parts = [x[gather[ends[e] : ends[e + 1]].long()] @ w1[:, :, e].mT for e in range(w1.shape[2])]
    h = torch.cat(parts)
    assert h.shape[0] == slots
    return torch.nn.functional.silu(h[:, ::2]) * h[:, 1::2], h


def down(a, h, w2, bias, scores, ends, tokens, top_k, gather, scatter, back, counts_of_tokens, varies, activation):
    """w2 `[H, I, E]`."""
    assert (bias, counts_of_tokens, varies, activation) == (None, None, False, "swiglu")
    rows = torch.cat([a[ends[e] : ends[e + 1]] @ w2[:, :, e].mT for e in range(w2.shape[2])])
    return (rows[back.long()].view(tokens, top_k, -1) * scores[..., None]).sum(1)


@pytest.fixture
def sonicmoe(monkeypatch):
    package, functional, enums = ModuleType("sonicmoe"), ModuleType("sonicmoe.functional"), ModuleType("sonicmoe.enums")
    functional.TC_topk_router_metadata_triton = metadata
    functional._UpProjection, functional._DownProjection = SimpleNamespace(apply=up), SimpleNamespace(apply=down)
    enums.ActivationType = SimpleNamespace(SWIGLU="swiglu")
    package.functional, package.enums = functional, enums
    for name, module in (("sonicmoe", package), ("sonicmoe.functional", functional), ("sonicmoe.enums", enums)):
        monkeypatch.setitem(sys.modules, name, module)


def test_it_computes_the_layer(sonicmoe):
    assert sonic_layer.missing(SMALL) is None
    given, weights = inputs_of(SMALL, 0)
    plan = build_plan(given.ids, SMALL.experts, group=None)
    args = plan, given.weights, list(weights.fc1), list(weights.fc2)
    y, h = reference.forward(given.x, *args, clamp=None, group=None)
    grads = reference.backward(given.dy, given.x, h, *args, clamp=None, group=None)
    candidate = candidates.SonicCandidate(SMALL, weights)
    candidate.prepare(given)
    found = candidate.forward(given)
    assert_close(found, y, 2e-5, "y")
    dx = candidate.backward(given, found)
    assert_close(dx, grads.dx, 2e-5, "dx")


def test_why_it_is_not_measured(monkeypatch):
    assert "EP is 2" in sonic_layer.missing(replace(SMALL, ranks=2))
    monkeypatch.setitem(sys.modules, "sonicmoe", None)
    assert "sonicmoe" in sonic_layer.missing(SMALL)


def test_rows_of_gate_and_up_in_turn():
    fc1 = torch.arange(2 * 6 * 1).view(2, 6, 1)
    assert sonic_layer.interleaved(fc1)[0].flatten().tolist() == [0, 3, 1, 4, 2, 5]

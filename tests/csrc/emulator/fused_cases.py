"""The fused passes, as operators and through autograd, and the six products alone, against fp64."""

from __future__ import annotations

import copy

import torch

from megamoe_train import ops, ops_plan
from tests.gpu.fused_run import VirtualRanks, assert_back_to_back, assert_bf16_gradients, assert_same_bits
from tests.gpu.gemm_case import Case as GemmCase
from tests.gpu.gemm_case import assert_products, assert_wgrad
from tests.gpu.layer_case import Case, Layer, RankResult, assert_layer
from tests.gpu.leaves import (
    SAME_BYTES,
    Leaves,
    assert_fresh_buffers,
    assert_plain_passes,
    assert_same,
    assert_through_autograd,
)
from tests.gpu.virtual import Load

from .ranks import EmulatedRanks, at_once


def run_twice(case: Case, num_sms: int, late: tuple[int, int]) -> tuple[Layer, dict[int, RankResult]]:
    """The fused kernels of all ranks, each time with another rank late: the same bits."""
    layer = Layer(case, device="cpu")
    first, second = (
        VirtualRanks(layer, num_sms, EmulatedRanks(case.load, case.hidden)).run(layer, late=rank) for rank in late
    )
    assert_same_bits(layer, first, second)
    return layer, first


def fused(case: Case, num_sms: int) -> None:
    """Against fp64; the second run has the same bits."""
    assert_layer(*run_twice(case, num_sms, late=(0, 1 % case.load.ranks)))


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


def fused_bf16_gradients() -> None:
    layer = Layer(Case(Load("zipf", (40, 0, 61), 3, 12), 512, 384, 1.0, 3.0), device="cpu")
    assert_bf16_gradients(layer, VirtualRanks(layer, 4, EmulatedRanks(layer.case.load, layer.case.hidden)))


def back_to_back() -> None:
    layers = [Layer(Case(Load("zipf", (40, 61), 3, 8), 512, 256), device="cpu", seed=seed) for seed in range(3)]
    assert_back_to_back(layers, VirtualRanks(layers[0], 4, EmulatedRanks(layers[0].case.load, 512)))


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
    shape = {"hidden": 512, "inter": 384, "clamp": 1.0, "scale": 2.0, "num_sms": 4, "device": "cpu"}
    with at_once():
        for accumulate, dtype in ((True, torch.float32), (False, torch.float32), (False, torch.bfloat16)):
            assert_products(GemmCase([70, 0, 200], seed=int(accumulate), **shape), accumulate, dtype)
        for out, dtype in ((64, torch.float32), (384, torch.float32), (64, torch.bfloat16), (384, torch.bfloat16)):
            assert_wgrad(GemmCase([70, 0, 200], **shape), list(torch.ones(3, out, shape["hidden"], dtype=dtype)))


def through_autograd() -> None:
    """`moe` of one rank: gradients by a sink and by autograd, h computed again, frozen inputs, two in flight."""
    layer = Layer(Case(Load("some_dropped", (90,), 3, 8), 512, 256, 1.0, 2.0), device="cpu")
    with at_once():
        options = {"workspace": EmulatedRanks(layer.case.load, layer.case.hidden).workspaces[0]}
        assert_through_autograd(layer, **options)
        assert_plain_passes(Leaves(layer), **options)
        whole = Leaves(layer).run(**options)
        assert_same(whole, Leaves(layer).run(recompute="fc1", **options))
        for frozen in (("x",), ("fc1", "fc2"), ("x", "p", "fc2")):
            assert_same(whole, Leaves(layer, frozen).run(**options), only_present=True)
        in_flight = [Leaves(layer), Leaves(layer)]
        for one in in_flight:
            one.y = one.forward(**options)
        for one in in_flight:
            one.y.backward(one.dy)
            assert_same(whole, one)


def fresh_buffers() -> None:
    """Gradients of two layers of as many bytes, in tensors that are new at every step."""
    layers = [Layer(Case(Load("uniform", (40,), 1, 2), h, i), device="cpu") for h, i in SAME_BYTES]
    with at_once():
        spaces = [EmulatedRanks(layer.case.load, layer.case.hidden).workspaces[0] for layer in layers]
        assert_fresh_buffers(layers, spaces)


CASES = {
    "fused, 1 rank": lambda: fused(Case(Load("zipf", (150,), 16, 40), 256, 128), 6),
    "fused, 1 rank, many rows": lambda: fused(Case(Load("uniform", (330,), 1, 1), 256, 256, 10.0), 4),
    "fused, 1 rank, long products": lambda: fused(Case(Load("uniform", (50,), 2, 3), 1024, 640), 4),
    "fused, 2 ranks": lambda: fused(Case(Load("zipf", (40, 61), 3, 16), 512, 384, 1.0, 3.0), 4),
    "fused, 4 ranks": lambda: fused(Case(Load("some_dropped", (7, 0, 31, 20), 4, 16), 768, 128, 2.0, 2.0), 2),
    "fused, gradients added or not wanted": fused_gradients,
    "fused, gradients in bf16": fused_bf16_gradients,
    "fused, passes back to back": back_to_back,
    "fused, overflow": fused_overflow,
    "moe through autograd": through_autograd,
    "gradients in fresh tensors": fresh_buffers,
    "products": products,
}

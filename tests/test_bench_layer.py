"""`bench layer` without a GPU: the unfused baseline computes the layer, shapes fit, the table says what it means."""

from __future__ import annotations

import argparse
import itertools
import json
import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from megamoe_train import ops_fused, reference
from megamoe_train.bench import layer_load
from megamoe_train.bench.layer_load import Routing, Shape, Weights, shape_of
from megamoe_train.plan import build_plan
from tests.distributed import run_ranks
from tests.numerics import assert_close

GB = 10**9
SMALL = Shape("small", hidden=64, inter=40, top_k=3, experts_local=4, tokens=30, clamp=0.5)


def loop_grouped_mm(left: Tensor, right: Tensor, *, offs: Tensor) -> Tensor:
    """What torch._grouped_mm computes: rows of one expert by its matrix, or a sum over its rows."""
    bounds = [0, *offs.tolist()]
    parts = list(itertools.pairwise(bounds))
    if right.dim() == 3:
        return torch.cat([left[begin:end] @ right[e] for e, (begin, end) in enumerate(parts)])
    return torch.stack([left[:, begin:end] @ right[begin:end] for begin, end in parts])


@pytest.fixture(scope="module")
def interpreter():
    """A process of its own in which Triton, its standard library too, runs in Triton's interpreter.

    Triton reads the variable when it is imported, which here other tests have done.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")
        pool = ProcessPoolExecutor(1, multiprocessing.get_context("spawn"))
        pool.submit(torch.set_num_threads, 1).result()
    with pool:
        yield pool


def inputs_of(shape: Shape, rank: int) -> tuple[Routing, Weights]:
    """fp32, so that equal mathematics agrees closely; weights large enough for the clamp to act."""
    given, weights = Routing.random(shape, 1, rank, "cpu"), Weights.random(shape, rank, "cpu")
    given.x, given.dy = given.x.float(), given.dy.float()
    weights.fc1, weights.fc2 = 2 * weights.fc1.float(), weights.fc2.float()
    return given, weights


def against_reference(shape: Shape, rank: int, group, accumulate: bool, routed: bool) -> None:
    from megamoe_train.bench import unfused

    given, weights = inputs_of(shape, rank)
    plan = build_plan(given.ids, shape.experts, group=group)
    args = plan, given.weights, list(weights.fc1), list(weights.fc2)
    y, h = reference.forward(given.x, *args, clamp=shape.clamp, group=group)
    grads = reference.backward(given.dy, given.x, h, *args, clamp=shape.clamp, group=group)
    routes = {id(given): unfused.route(given.ids, shape, group)} if routed else None
    layer = unfused.Unfused(shape, weights, group, accumulate, routes, grouped_mm=loop_grouped_mm)
    found, kept = layer.forward(given)
    dx, dp, dfc1, dfc2 = layer.backward(given.dy, kept)
    assert (dfc1 is None) == accumulate
    if accumulate:
        dfc1, dfc2 = weights.grad1, weights.grad2
    pairs = {"y": (found, y), "dx": (dx, grads.dx), "dp": (dp, grads.dweights)}
    pairs |= {"dfc1": (dfc1, torch.stack(grads.dfc1)), "dfc2": (dfc2, torch.stack(grads.dfc2))}
    for name, (got, want) in pairs.items():
        assert_close(got, want, 2e-5, name)
    assert (h.abs() > shape.clamp).any()


@pytest.mark.parametrize("routed", [False, True])
@pytest.mark.parametrize("accumulate", [False, True])
def test_the_unfused_baseline_is_the_layer(interpreter, accumulate, routed):
    interpreter.submit(against_reference, SMALL, 0, None, accumulate, routed).result()


def _over_ranks(rank: int, world_size: int) -> None:
    for routed in (False, True):
        against_reference(replace(SMALL, ranks=world_size), rank, dist.group.WORLD, False, routed)


def test_the_unfused_baseline_over_two_ranks(interpreter):
    interpreter.submit(run_ranks, _over_ranks, 2).result()  # its ranks are forked by a server of its own


# ---- shapes ----------------------------------------------------------------------------------------------------------


def test_shapes_are_those_of_the_models():
    found = {name: shape_of(name, 2, 80 * GB) for name in layer_load.NAMES}
    assert {name: (s.hidden, s.inter, s.top_k, s.experts, s.tokens) for name, s in found.items()} == {
        "flash": (4096, 2048, 6, 64, 8192),
        "pro": (7168, 3072, 6, 96, 8192),
        "qwen3-30b": (2048, 768, 8, 128, 8192),
        "v3": (7168, 2048, 8, 256, 8192),
        "mixtral": (4096, 14336, 2, 8, 8192),
    }
    assert all(s.scaled_from == 0 for s in found.values())
    assert found["flash"].flops(backward=False) == pytest.approx(2.47e12, rel=0.01)
    assert found["pro"].flops(backward=True) == pytest.approx(12.99e12, rel=0.01)


def test_experts_are_scaled_to_fit_and_it_is_said():
    shape = shape_of("v3", 1, 80 * GB)
    assert (shape.experts_local, shape.scaled_from) == (128, 256)
    assert shape.bytes_needed < 0.85 * 80 * GB < shape_of("v3", 1, 10**12).bytes_needed
    assert shape_of("v3", 1, 80 * GB, experts_local=256).experts_local == 256  # asked for: not scaled
    assert shape_of("flash", 1, 80 * GB, experts_local=128, tokens=512).tokens == 512
    with pytest.raises(ValueError, match="ep: got 3; allowed: a divisor of the 8 experts of mixtral"):
        shape_of("mixtral", 3, 80 * GB)


def test_inputs_are_what_the_rules_of_measuring_say():
    given, weights = Routing.random(SMALL, 3, 0, "cpu"), Weights.random(SMALL, 0, "cpu")
    assert (given.ids.sort(dim=1).values.diff(dim=1) > 0).all() and given.ids.max() < SMALL.experts
    assert given.weights.sum(1).allclose(torch.ones(SMALL.tokens))
    assert abs(weights.fc1.float().std() * 8 - 1) < 0.05 and abs(weights.fc2.float().std() * 40**0.5 - 1) < 0.05
    assert not torch.equal(given.x, Routing.random(SMALL, 4, 0, "cpu").x)
    assert given.off_rank(SMALL, 0) == 0 and given.off_rank(SMALL, 1) == SMALL.tokens * SMALL.top_k


# ---- the table -------------------------------------------------------------------------------------------------------


def arguments(*words: str) -> argparse.Namespace:
    from megamoe_train.bench.__main__ import parse

    return parse(["layer", *words])


def test_the_command_line():
    args = arguments("--shape", "flash", "--ep", "2", "--iterations", "10")
    assert (args.ep, args.iterations, args.seeds, args.modes, args.passes) == (
        2,
        10,
        3,
        ["paced", "sustained"],
        ["fwd", "bwd"],
    )
    with pytest.raises(SystemExit):
        arguments("--shape", "huge")


def test_what_cannot_run_exits_without_a_table(capsys, monkeypatch):
    from megamoe_train import backends
    from megamoe_train.bench import layer

    monkeypatch.setattr(backends, "choose", lambda *_: backends.Choice(None, "the CUDA extension is not built"))
    assert layer.main(arguments("--shape", "flash"), "abc") == 3
    assert "the CUDA extension is not built" in capsys.readouterr().err
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert layer.main(arguments("--shape", "flash", "--ep", "2", "--candidates", "unfused"), "abc") == 2
    assert "ep: got 2; allowed: 1..1, the GPUs of this machine" in capsys.readouterr().err


class Played:
    """A candidate that computes nothing."""

    moves = (2, 3)

    def __init__(self, scale: float = 1.0):
        self.scale = scale

    def prepare(self, inputs):
        pass

    def forward(self, inputs):
        return inputs.x * self.scale

    def backward(self, inputs, state):
        return inputs.dy * self.scale


def played_bench(monkeypatch, seeds: int, **candidates):
    """A Bench whose clock is a table: milliseconds by seed, then candidate."""
    from megamoe_train.bench import layer, passes, ranks
    from megamoe_train.bench.timing import CuBLAS

    bench = object.__new__(layer.Bench)
    bench.shape, bench.group = SMALL, None
    bench.args = argparse.Namespace(seeds=seeds, modes=["paced"], passes=["fwd", "bwd"], iterations=1)
    cublas = object.__new__(CuBLAS)
    cublas.repeats = 1
    nothing = {name: lambda *_: None for name in ("prepare", "forward", "backward")}
    bench.candidates = {"cublas": argparse.Namespace(passes=(cublas, cublas), moves=(0, 0), **nothing)}
    bench.candidates |= candidates
    bench.absent, bench.workspace_bytes = {"megatron": "No module named 'x'"}, 5 * 10**8
    bench.schedule = ops_fused.Schedule(32, 1, 3, 60, 250)
    slow = iter([1.0, 3.0, 2.0])

    def alternate(candidates, inputs, iterations, passes, group, *, paced):
        ms = next(slow)
        return {(name, one): (ms * (2 if one == "bwd" else 1), 0.25) for name in candidates for one in passes}

    monkeypatch.setattr(passes, "alternate", alternate)
    monkeypatch.setattr(passes, "memory", lambda candidate, inputs, backward: (10**9, 2 * 10**9))
    monkeypatch.setattr(ranks, "rank", lambda: 1)
    monkeypatch.setattr(layer, "Routing", argparse.Namespace(random=lambda *args: Routing.random(*args, "cpu")))
    return bench


def test_rows_are_of_the_worst_seed(monkeypatch, capsys):
    bench = played_bench(monkeypatch, 3, ours=Played(), unfused=Played(1.001))
    rows = bench.run(loud=True)
    assert [(row["pass"], row["candidate"], row["seed"], row["ms"]) for row in rows] == [
        ("fwd", "ours", 1, 3.0), ("bwd", "ours", 1, 6.0), ("fwd", "unfused", 1, 3.0), ("bwd", "unfused", 1, 6.0),
    ]  # fmt: skip
    first = rows[0]
    flops, cublas = 6 * 30 * 3 * 64 * 40, 2 * 8192**3
    assert first["share"] == pytest.approx(flops / cublas) and first["tflops"] == pytest.approx(flops / 3e-3 / 1e12)
    assert rows[1]["share"] == pytest.approx(2 * flops / cublas)
    slots = 30 * 3  # of rank 1, all experts on rank 0
    assert first["nvlink_gbs"] == pytest.approx(slots * 64 * 2 * 2 / 3e-3 / 1e9)
    assert rows[1]["nvlink_gbs"] == pytest.approx(slots * 64 * 2 * 3 / 6e-3 / 1e9)
    shown = capsys.readouterr().out.splitlines()
    assert len(shown) == 4 and shown[0].split()[:4] == ["paced", "fwd", "ours", "3.000"] and "1.000" in shown[0]
    assert "our workspace 0.50 GB" in bench.title() and "not measured: megatron: No module named 'x'" in bench.title()
    assert "forward in 60 waves, fc2 32 experts behind fc1; backward in 250, dgrad1 1 and wgrads 3" in bench.title()
    json.dumps(rows)


def test_a_wrong_result_has_no_speed(monkeypatch):
    bench = played_bench(monkeypatch, 1, ours=Played(), unfused=Played(1.05))
    with pytest.raises(RuntimeError, match=r"y of unfused differs from ours's by 5\.00e-02"):
        bench.run(loud=False)
    bench = played_bench(monkeypatch, 1, ours=Played(), unfused=Played(float("nan")))
    with pytest.raises(RuntimeError, match="y of unfused differs"):
        bench.run(loud=False)

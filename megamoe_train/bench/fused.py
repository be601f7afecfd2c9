"""`bench fused`: the two fused launches beside their products launched alone, on one GPU, from one alternating run.

What a fused pass costs beyond its matrix products is here to be seen: pulls, scatter, waits, sums. EP = 1, the plan
made before the clock starts, uniform random routing.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import torch

from .. import ops, ops_fused, ops_plan
from ..workspace import Shape as WorkspaceShape
from ..workspace import Workspace
from . import layer_load
from .timing import CuBLAS, alternate

# name -> products of 2 T K H I operations that it holds: fc1 and dgrad1, wgrad1 two each, the others one
UNITS = {"fwd": 3, "fwd alone": 3, "bwd": 6, "dgrads": 3, "dgrads alone": 3, "wgrads alone": 3}
READ_H = ("bwd", "dgrads", "dgrads alone")


class Case:
    """One layer's inputs, calls whose buffers are used again, and the groups of its products."""

    def __init__(self, shape: layer_load.Shape, seed: int):
        self.clamp, self.hidden = shape.clamp, shape.hidden
        routing, weights = layer_load.Routing.random(shape, seed, 0), layer_load.Weights.random(shape, 0)
        spaces = WorkspaceShape(1, shape.experts, shape.top_k, shape.hidden, shape.tokens)
        self.workspace = Workspace.create(spaces, deadline_s=10.0)
        self.plan = ops_plan.build_plan(self.workspace, routing.ids)
        self.plan.settle()
        self.groups = ops.Groups(self.plan.expert_rows, self.plan.expert_offset[:-1].contiguous(), deadline_s=10.0)
        self.maps = ops_fused.WeightMaps.of(list(weights.fc1), list(weights.fc2))
        self.tables = [ops.GradientTable.of(list(grad)) for grad in (weights.grad1, weights.grad2)]
        self.kept = routing, weights
        x, p = routing.x, routing.weights
        self.forward = ops_fused.ForwardCall(self.plan, x, p, self.maps, clamp=self.clamp)
        run(self.forward)
        self.h = self.forward.h.clone()
        given = self.plan, routing.dy, x, self.forward.h, p, self.maps
        self.backward = ops_fused.BackwardCall(*given, *self.tables, clamp=self.clamp)
        self.dgrads = ops_fused.BackwardCall(*given, None, None, clamp=self.clamp)
        run(self.backward)
        self.rows = torch.empty_like(self.forward.pool)  # what fc2 and dgrad1 alone write

    def restore(self, name: str) -> None:
        """h for a candidate that reads it: a backward before has given its place to dh."""
        if name in READ_H:
            self.forward.h.copy_(self.h)

    def candidates(self) -> dict[str, Callable[[int], None]]:
        forward, backward, maps, groups = self.forward, self.backward, self.maps, self.groups

        def forward_alone(_):
            ops.fc1(forward.pool, maps.fc1, groups, forward.row_weights, forward.h, forward.act, self.clamp)
            ops.fc2(forward.act, maps.fc2, groups, self.rows)

        def dgrads_alone(_):
            ops.dgrad2(backward.pool, maps.fc2_mn, groups, forward.h, backward.row_weights, backward.dh, backward.act,
                       backward.dp_partials, self.clamp)  # fmt: skip
            ops.dgrad1(backward.dh, maps.fc1_mn, groups, self.rows)

        def wgrads_alone(_):
            ops.wgrad(backward.dh, backward.second_pool, self.tables[0], groups)
            ops.wgrad(backward.pool, backward.act, self.tables[1], groups)

        return {
            "fwd": lambda _: run(forward), "fwd alone": forward_alone, "bwd": lambda _: run(backward),
            "dgrads": lambda _: run(self.dgrads), "dgrads alone": dgrads_alone, "wgrads alone": wgrads_alone,
        }  # fmt: skip


def run(call: ops_fused.ForwardCall | ops_fused.BackwardCall) -> None:
    call.begin()
    call.launch()


def measure(shape: layer_load.Shape, iterations: int, mode: str, seed: int) -> list[dict]:
    """One row per candidate; prints each."""
    case = Case(shape, seed)
    flops = 2.0 * shape.tokens * shape.top_k * shape.hidden * shape.inter
    cublas = CuBLAS(3 * flops)
    times = alternate({**case.candidates(), "cublas": cublas}, iterations, paced=mode == "paced", before=case.restore)
    rate, rows = cublas.tflops(times["cublas"]), []
    for name, units in UNITS.items():
        tflops = units * flops / times[name] / 1e9
        rows.append({"shape": shape.name, "mode": mode, "what": name, "ms": times[name], "tflops": tflops,
                     "share": tflops / rate, "cublas": rate})  # fmt: skip
        print(f"{shape.name:9} {mode:9} {name:13} {times[name]:8.3f} ms {tflops:5.0f} TFLOP/s {tflops / rate:6.1%}")
    case.workspace.close()
    return rows


def add_arguments(tables: argparse._SubParsersAction) -> None:
    parser = tables.add_parser("fused", help="the fused launches beside their products launched alone, one GPU")
    parser.add_argument("--shapes", nargs="+", choices=layer_load.NAMES, default=["flash", "pro"])
    parser.add_argument("--modes", nargs="+", choices=["paced", "sustained"], default=["paced", "sustained"])
    parser.add_argument("--iterations", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="also write the rows here")


def table(args: argparse.Namespace) -> list[dict]:
    memory = torch.cuda.get_device_properties(0).total_memory
    rows = []
    for name in args.shapes:
        for mode in args.modes:
            rows += measure(layer_load.shape_of(name, 1, memory), args.iterations, mode, args.seed)
            torch.cuda.empty_cache()
    return rows

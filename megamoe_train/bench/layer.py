"""`bench layer`: one MoE layer, ours beside honest others, all in one process per rank, iteration by iteration.

Share of cuBLAS: 6TKHI (backward 12TKHI) FLOPs over the time, by the rate of the alternating cuBLAS 8192^3 of the same
mode. NVLink GB/s: rows that reach a rank from others, over the time. Times are of the worst rank and the worst seed.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

import torch

from .. import backends, ops_fused
from . import candidates, passes, ranks
from .layer_load import NAMES, Routing, Shape, Weights, shape_of

MODES = ("paced", "sustained")
ROTATED = 2  # inputs that rotate
TOLERANCE = 0.02  # relative L2 between two bf16 computations of the layer


def add_arguments(tables) -> None:
    one = tables.add_parser("layer", help="a whole MoE layer beside unfused torch, Megatron's layer and cuBLAS")
    one.add_argument("--shape", choices=NAMES, required=True)
    one.add_argument("--ep", type=int, default=1, help="ranks, one GPU each; started here unless torchrun did")
    one.add_argument("--tokens", type=int, help="T of a rank (8192)")
    one.add_argument("--experts-local", type=int, help="L, instead of the shape's")
    one.add_argument("--candidates", nargs="+", choices=candidates.NAMES, default=list(candidates.DEFAULT))
    one.add_argument("--modes", nargs="+", choices=MODES, default=list(MODES))
    one.add_argument("--passes", nargs="+", choices=passes.PASSES, default=list(passes.PASSES))
    one.add_argument("--iterations", type=int, default=30)
    one.add_argument("--seeds", type=int, default=3, help="routings; the worst counts")
    one.add_argument("--json", type=Path, help="also write the rows here")


def main(args: argparse.Namespace, commit: str) -> int:
    """Runs the ranks. 2: this machine or command cannot; 3: ours would not be the fused kernels."""
    if any(name.startswith("ours") for name in args.candidates):
        choice = backends.choose("auto", "cuda")
        if choice.name != "fused":
            print(f"bench layer: {choice.why}", file=sys.stderr)
            return 3
    try:
        ranks.run(_rank, args.ep, args, commit)
    except ValueError as error:
        print(f"bench layer: {error}", file=sys.stderr)
        return 2
    return 0


def _rank(args: argparse.Namespace, commit: str) -> None:
    begin, loud = time.monotonic(), ranks.rank() == 0
    memory = torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory
    shape = shape_of(args.shape, args.ep, memory, tokens=args.tokens, experts_local=args.experts_local)
    bench = Bench(shape, args)
    if loud:
        print(bench.title(), flush=True)
    rows = bench.run(loud)
    if loud:
        print(f"{time.monotonic() - begin:.0f} s")
        if args.json:
            args.json.write_text(json.dumps({**bench.header(commit), "rows": rows}, indent=1))


class Bench:
    """One shape on one rank. Collective from construction on."""

    def __init__(self, shape: Shape, args: argparse.Namespace):
        self.shape, self.args, self.group = shape, args, ranks.group()
        self.weights = Weights.random(shape, ranks.rank())
        made = candidates.make(args.candidates, shape, self.weights, self.group)
        self.candidates, self.absent, self.workspace_bytes = made
        self.schedule = schedule_of(shape) if any(name.startswith("ours") for name in self.candidates) else None

    def title(self) -> str:
        s = self.shape
        scaled = f" (scaled from {s.scaled_from} to fit)" if s.scaled_from else ""
        text = (
            f"{s.name}: EP={s.ranks}, per rank T={s.tokens} K={s.top_k} H={s.hidden} I={s.inter} "
            f"experts={s.experts_local}{scaled}, clamp {s.clamp}; our workspace {self.workspace_bytes / 1e9:.2f} GB\n"
        )
        if self.schedule is not None:
            text += (
                f"even routing: forward in {self.schedule.forward_waves} waves, fc2 {self.schedule.fc2_lag} experts "
                f"behind fc1; backward in {self.schedule.backward_waves}, dgrad1 {self.schedule.dgrad1_lag} and wgrads "
                f"{self.schedule.wgrads_lag} experts behind dgrad2\n"
            )
        text += "".join(f"not measured: {name}: {why}\n" for name, why in self.absent.items())
        return text + (
            f"{'mode':9} {'pass':4} {'candidate':14} {'ms':>7} {'TFLOP/s':>7} {'share':>6} {'NVLink':>6} "
            f"{'host ms':>7} {'kept GB':>7} {'peak GB':>7}   seed"
        )

    def header(self, commit: str) -> dict:
        return {
            "device": torch.cuda.get_device_name(), "torch": torch.__version__, "commit": commit, "clocks": clocks(),
            "backend": "fused", "shape": self.shape.name, "ep": self.shape.ranks, "tokens": self.shape.tokens,
            "experts_local": self.shape.experts_local, "scaled_from": self.shape.scaled_from,
            "workspace_bytes": self.workspace_bytes, "absent": self.absent,
            "schedule": None if self.schedule is None else self.schedule._asdict(),
            "candidates": {name: candidates.MEANING[name] for name in self.candidates if name != "cublas"},
        }  # fmt: skip

    def run(self, loud: bool) -> list[dict]:
        """One row per mode, pass and candidate: that of the seed whose time was worst."""
        worst: dict[tuple, dict] = {}
        for seed in range(self.args.seeds):
            for row in self.measure(seed):
                key = row["mode"], row["pass"], row["candidate"]
                if key not in worst or row["ms"] > worst[key]["ms"]:
                    worst[key] = row
        for row in worst.values():
            if loud:
                print(row_text(row), flush=True)
        return list(worst.values())

    def measure(self, seed: int) -> list[dict]:
        inputs = [Routing.random(self.shape, ROTATED * seed + i, ranks.rank()) for i in range(ROTATED)]
        sizes = {}
        for name, candidate in self.candidates.items():
            for given in inputs:
                candidate.prepare(given)
            for given in inputs:  # the first call makes tables and grows pools
                sizes[name] = passes.memory(candidate, given, "bwd" in self.args.passes)
        self.check(inputs[0])
        off_rank = inputs[0].off_rank(self.shape, ranks.rank())
        rows = []
        for mode in self.args.modes:
            times = passes.alternate(
                self.candidates, inputs, self.args.iterations, self.args.passes, self.group, paced=mode == "paced"
            )
            for (name, one), (ms, host_ms) in times.items():
                if name != "cublas":
                    found = self.row(name, one, ms, times["cublas", one][0], off_rank)
                    kept, peak = sizes[name]
                    found |= {"host_ms": host_ms, "kept_bytes": kept, "peak_bytes": peak}
                    rows.append({"mode": mode, "pass": one, "candidate": name, "seed": seed, **found})
        return rows

    def check(self, inputs: Routing) -> None:
        """All candidates compute the same y and dx, up to bf16. Raises RuntimeError: a wrong result has no speed."""
        expected, first = None, ""
        for name, candidate in self.candidates.items():
            if name == "cublas":
                continue
            state = candidate.forward(inputs)
            found = [candidates.output_of(state).detach()]
            if "bwd" in self.args.passes:
                found.append(candidate.backward(inputs, state))
            found = [tensor.float().view(self.shape.tokens, -1) for tensor in found]
            if expected is None:
                expected, first = found, name
            for what, got, want in zip(("y", "dx"), found, expected, strict=False):
                difference = ((got - want).norm() / want.norm()).item()
                if not difference < TOLERANCE:
                    raise RuntimeError(f"{what} of {name} differs from {first}'s by {difference:.2e} (relative L2)")

    def row(self, name: str, one: str, ms: float, cublas_ms: float, off_rank: int) -> dict:
        backward = one == "bwd"
        rate = self.shape.flops(backward) / ms / 1e9
        cublas = self.candidates["cublas"].passes[backward].tflops(cublas_ms)
        moved = off_rank * self.shape.hidden * 2 * self.candidates[name].moves[backward]
        return {
            "ms": ms,
            "tflops": rate,
            "cublas_tflops": cublas,
            "share": rate / cublas,
            "nvlink_gbs": moved / ms / 1e6,
        }


def schedule_of(shape: Shape) -> ops_fused.Schedule:
    """Of an even routing, on all SMs of this GPU."""
    clusters = torch.cuda.get_device_properties(torch.cuda.current_device()).multi_processor_count // 2
    rows = shape.tokens * shape.top_k // shape.experts_local
    return ops_fused.Schedule.of(shape.experts_local, rows, shape.inter, shape.hidden, clusters)


def row_text(row: dict) -> str:
    nvlink = f"{row['nvlink_gbs']:6.0f}" if row["nvlink_gbs"] else "     -"
    return (
        f"{row['mode']:9} {row['pass']:4} {row['candidate']:14} {row['ms']:7.3f} {row['tflops']:7.0f} "
        f"{row['share']:6.1%} {nvlink} {row['host_ms']:7.2f} {row['kept_bytes'] / 1e9:7.3f} "
        f"{row['peak_bytes'] / 1e9:7.3f}   {row['seed']}  (cuBLAS {row['cublas_tflops']:.0f})"
    )


def clocks() -> str:
    """SM clock now and at most, power limit; 'unknown' without nvidia-smi."""
    fields = "clocks.sm,clocks.max.sm,power.limit"
    command = ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return "unknown"
    return f"{fields}: " + "; ".join(answer.stdout.split("\n")).strip("; ") if answer.returncode == 0 else "unknown"

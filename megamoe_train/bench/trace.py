"""`bench trace`: one fused pass on one GPU, as every role of every CTA lived it (a build with MEGAMOE_TRACE=1).

Prints how long a unit of each product spends where (SM cycles, medians), and writes the whole as a Chrome / Perfetto
trace (https://ui.perfetto.dev opens it) and as a picture.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from .. import ops
from . import fused, layer_load
from .trace_picture import draw

# csrc/roles/trace.cuh: Mark, CtaMark, kTraceRows, kTraceMarks.
MARKS = ("unit", "claimed", "ready", "loading", "loaded", "taken", "first_stage", "multiplied", "first_output", "done",
         "first_full", "sent", "signalled")  # fmt: skip
CTA_MARKS = ("clock", "global", "clock_end", "global_end", "pulled", "pulled_second", "summing", "summed",
             "math_summing", "mover_tokens", "math_tokens")  # fmt: skip
TIMES = CTA_MARKS[4:9]
ROWS, COLUMNS = 512, 16
PRODUCTS = {"fwd": ("fc1", "fc2"), "bwd": ("dgrad2", "dgrad1", "wgrad2", "wgrad1")}
# What a unit's time is made of: (from, to), "next" is the math warp's next unit.
SPANS = {
    "operands awaited": ("taken", "first_stage"),
    "products": ("first_stage", "multiplied"),
    "old values awaited": ("multiplied", "first_output"),
    "epilogue": ("multiplied", "done"),
    "until the next unit": ("done", "next"),
    "whole period": ("taken", "next"),
    "sent after": ("done", "sent"),
    "announced after": ("sent", "signalled"),
    "inputs awaited": ("claimed", "ready"),
}


@dataclass
class Recorded:
    """marks: int64 [CTAs, ROWS, COLUMNS] on the CPU, of one launch of `which` ("fwd" or "bwd")."""

    which: str
    marks: Tensor

    @cached_property
    def rows(self) -> list[list[list[int]]]:
        """The marks as Python numbers: they are asked for a hundred thousand times."""
        return self.marks.tolist()

    @cached_property
    def ctas(self) -> list[dict[str, int]]:
        return [dict(zip(CTA_MARKS, rows[0], strict=False)) for rows in self.rows]

    @cached_property
    def begin_ns(self) -> int:
        return min(cta["global"] for cta in self.ctas)

    def units(self, cta: int) -> Iterator[tuple[str, int, dict[str, int]]]:
        """(product, expert, marks by name) of a CTA, in order. "next": when the math warp took its next unit, or 0."""
        units = [dict(zip(MARKS, row, strict=False)) for row in self.rows[cta][1:]]
        for at, following in zip(units, [*units[1:], {"taken": 0}], strict=True):
            if at["taken"] == 0:
                return
            product, expert = divmod(at["unit"], 1 << 32)
            yield PRODUCTS[self.which][product], expert, at | {"next": following["taken"]}

    def spans(self) -> dict[str, dict[str, Tensor]]:
        """Cycles of each of SPANS, by product."""
        found: dict[str, dict[str, list[int]]] = {name: {} for name in PRODUCTS[self.which]}
        for cta in range(len(self.rows)):
            for product, _, at in self.units(cta):
                for name, (begin, end) in SPANS.items():
                    if at[begin] and at[end]:
                        found[product].setdefault(name, []).append(at[end] - at[begin])
        return {product: {name: torch.tensor(v).float() for name, v in of.items()} for product, of in found.items()}

    def microseconds(self, cta: int, clock: int) -> float:
        """A reading of a CTA's SM clock on the GPU's clock, since the first CTA began."""
        own = self.ctas[cta]
        nanoseconds, cycles = own["global_end"] - own["global"], own["clock_end"] - own["clock"]
        return (own["global"] - self.begin_ns + (clock - own["clock"]) * nanoseconds / max(1, cycles)) / 1e3


def record(case: fused.Case, which: str) -> Recorded:
    """One launch, after another one to warm up."""
    call = case.forward if which == "fwd" else case.backward
    for _ in range(3):
        fused.run(call)
        case.restore(which)
    memory = torch.zeros(torch.ops.megamoe.trace_size(), dtype=torch.int64, device="cuda")
    torch.cuda.synchronize()
    torch.ops.megamoe.set_trace(memory.data_ptr())
    try:
        fused.run(call)
        torch.cuda.synchronize()
    finally:
        torch.ops.megamoe.set_trace(0)
    return Recorded(which, memory.view(-1, ROWS, COLUMNS).cpu())


def table(recorded: Recorded) -> str:
    lines = [f"{recorded.which}: cycles, median (90th percentile), units of one CTA"]
    for product, spans in recorded.spans().items():
        parts = [f"{name} {v.median():.0f} ({v.quantile(0.9):.0f})" for name, v in spans.items()]
        lines.append(f"  {product:7} " + "; ".join(parts))
    for name in TIMES:
        times = [recorded.microseconds(cta, own[name]) for cta, own in enumerate(recorded.ctas) if own[name]]
        if times:
            lines.append(f"  {name}: {min(times):.0f} to {max(times):.0f} us")
    for name in CTA_MARKS[9:]:
        lines.append(f"  {name}, of one warp a CTA: {sum(own[name] for own in recorded.ctas)}")
    ends = [recorded.microseconds(cta, own["clock_end"]) for cta, own in enumerate(recorded.ctas)]
    return "\n".join([*lines, f"  end of the math warps: {min(ends):.0f} to {max(ends):.0f} us"])


def chrome(recorded: Recorded) -> dict:
    """Events of the Chrome trace format: one process a CTA, one thread a role. Microseconds."""
    events = []

    def add(cta: int, role: str, name: str, begin: int, end: int) -> None:
        if begin and end:
            start = recorded.microseconds(cta, begin)
            duration = recorded.microseconds(cta, end) - start
            events.append({"name": name, "ph": "X", "pid": cta, "tid": role, "ts": start, "dur": duration})

    for cta, row in enumerate(recorded.ctas):
        for product, expert, at in recorded.units(cta):
            label = f"{product} of expert {expert}"
            add(cta, "scheduler", f"inputs of {label}", at["claimed"], at["ready"])
            add(cta, "loader", f"operands of {label}", at["loading"], at["loaded"])
            add(cta, "math", f"operands of {label} awaited", at["taken"], at["first_stage"])
            add(cta, "math", label, at["first_stage"], at["multiplied"])
            add(cta, "math", f"epilogue of {label}", at["multiplied"], at["done"])
            add(cta, "storer", f"results of {label}", at["first_full"], at["sent"])
        add(cta, "mover", "pull", row["clock"], row["pulled"])
        add(cta, "mover", "second pull", row["pulled"], row["pulled_second"])
        add(cta, "mover", "sums", row["summing"], row["summed"])
        add(cta, "math", "sums", row["math_summing"], row["clock_end"])
    return {"traceEvents": events, "displayTimeUnit": "ns"}


def add_arguments(tables: argparse._SubParsersAction) -> None:
    parser = tables.add_parser("trace", help="when every role of a fused pass did what, one GPU (MEGAMOE_TRACE=1)")
    parser.add_argument("--shape", choices=layer_load.NAMES, default="flash")
    parser.add_argument("--passes", nargs="+", choices=tuple(PRODUCTS), default=list(PRODUCTS))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="folder for PASS.json (Perfetto) and PASS.png")


def main(args: argparse.Namespace) -> int:
    ops.load()
    if torch.ops.megamoe.trace_size() == 0:
        how = "MEGAMOE_TRACE=1 python setup.py build_ext --inplace"
        print(f"bench trace: these kernels record nothing; build them with: {how}", file=sys.stderr)
        return 2
    memory = torch.cuda.get_device_properties(0).total_memory
    case = fused.Case(layer_load.shape_of(args.shape, 1, memory), args.seed)
    for which in args.passes:
        recorded = record(case, which)
        print(table(recorded), flush=True)
        if args.out:
            args.out.mkdir(parents=True, exist_ok=True)
            events = chrome(recorded)
            (args.out / f"{which}.json").write_text(json.dumps(events))
            draw(events["traceEvents"], args.out / f"{which}.png", f"{args.shape}, {which}, EP = 1")
    case.workspace.close()
    return 0

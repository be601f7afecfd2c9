"""`bench trace`: one fused pass on one GPU, as every role of every CTA lived it (a build with MEGAMOE_TRACE=1).

Prints how long a unit of each product spends where (SM cycles, medians), and writes the whole as a Chrome / Perfetto
trace (https://ui.perfetto.dev opens it) and as a picture.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from dataclasses import dataclass
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

    def units(self, cta: int) -> Iterator[tuple[str, int, Tensor, int]]:
        """(product, expert, marks, when the math warp took its next unit or 0) of a CTA, in order."""
        rows = self.marks[cta]
        for row in range(1, ROWS):
            if rows[row, MARKS.index("taken")] == 0:
                return
            product, expert = divmod(int(rows[row, 0]), 1 << 32)
            following = int(rows[row + 1, MARKS.index("taken")]) if row + 1 < ROWS else 0
            yield PRODUCTS[self.which][product], expert, rows[row], following

    def spans(self) -> dict[str, dict[str, Tensor]]:
        """Cycles of each of SPANS, by product."""
        found: dict[str, dict[str, list[int]]] = {name: {} for name in PRODUCTS[self.which]}
        for cta in range(len(self.marks)):
            for product, _, marks, following in self.units(cta):
                for name, (begin, end) in SPANS.items():
                    first = int(marks[MARKS.index(begin)])
                    last = following if end == "next" else int(marks[MARKS.index(end)])
                    if first and last:
                        found[product].setdefault(name, []).append(last - first)
        return {product: {name: torch.tensor(v).float() for name, v in of.items()} for product, of in found.items()}

    def microseconds(self, cta: int, clock: int) -> float:
        """A reading of a CTA's SM clock on the GPU's clock, since the first CTA began."""
        begin, begin_ns, end, end_ns = (int(v) for v in self.marks[cta, 0, :4])
        since = (clock - begin) * (end_ns - begin_ns) / max(1, end - begin)
        return (begin_ns - int(self.marks[:, 0, 1].min()) + since) / 1e3


def record(case: fused.Case, which: str) -> Recorded:
    """One launch, after another one to warm up."""
    size = torch.ops.megamoe.trace_size()
    if size == 0:
        how = "MEGAMOE_TRACE=1 python setup.py build_ext --inplace"
        raise ValueError(f"bench trace: these kernels record nothing; build them with: {how}")
    call = case.forward if which == "fwd" else case.backward
    for _ in range(3):
        fused.run(call)
    memory = torch.zeros(size, dtype=torch.int64, device="cuda")
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
    rows = recorded.marks[:, 0]
    for name in TIMES:
        column = CTA_MARKS.index(name)
        times = [recorded.microseconds(cta, int(row[column])) for cta, row in enumerate(rows) if row[column]]
        if times:
            lines.append(f"  {name}: {min(times):.0f} to {max(times):.0f} us")
    for name in CTA_MARKS[9:]:
        lines.append(f"  {name}, of one warp a CTA: {int(rows[:, CTA_MARKS.index(name)].sum())}")
    ends = [recorded.microseconds(cta, int(row[2])) for cta, row in enumerate(rows)]
    return "\n".join([*lines, f"  end of the math warps: {min(ends):.0f} to {max(ends):.0f} us"])


def chrome(recorded: Recorded) -> dict:
    """Events of the Chrome trace format: one process a CTA, one thread a role. Microseconds."""
    events = []

    def add(cta: int, role: str, name: str, begin: int, end: int) -> None:
        if begin and end:
            start = recorded.microseconds(cta, begin)
            duration = recorded.microseconds(cta, end) - start
            events.append({"name": name, "ph": "X", "pid": cta, "tid": role, "ts": start, "dur": duration})

    for cta in range(len(recorded.marks)):
        for product, expert, marks, _ in recorded.units(cta):
            at = {name: int(marks[i]) for i, name in enumerate(MARKS)}
            label = f"{product} of expert {expert}"
            add(cta, "scheduler", f"inputs of {label}", at["claimed"], at["ready"])
            add(cta, "loader", f"operands of {label}", at["loading"], at["loaded"])
            add(cta, "math", f"operands of {label} awaited", at["taken"], at["first_stage"])
            add(cta, "math", label, at["first_stage"], at["multiplied"])
            add(cta, "math", f"epilogue of {label}", at["multiplied"], at["done"])
            add(cta, "storer", f"results of {label}", at["first_full"], at["sent"])
        row = {name: int(recorded.marks[cta, 0, i]) for i, name in enumerate(CTA_MARKS)}
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
    memory = torch.cuda.get_device_properties(0).total_memory
    case = fused.Case(layer_load.shape_of(args.shape, 1, memory), args.seed)
    for which in args.passes:
        recorded = record(case, which)
        print(table(recorded), flush=True)
        if args.out:
            args.out.mkdir(parents=True, exist_ok=True)
            (args.out / f"{which}.json").write_text(json.dumps(chrome(recorded)))
            draw(chrome(recorded)["traceEvents"], args.out / f"{which}.png", f"{args.shape}, {which}, EP = 1")
    case.workspace.close()
    return 0

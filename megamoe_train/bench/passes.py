"""Alternating timing of forward and backward passes over one or several ranks.

Every candidate runs once per iteration, forward and then backward, in rotated order. Before a pass the ranks meet on
the device, so that a late host does not count as communication. `paced`: 40 ms idle before each forward, whose clock
starts after a spin of 0.2 ms on every rank: what the host needs longer than that counts. `sustained`: back to back.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
import torch.distributed as dist

from .candidates import Candidate, output_of
from .layer_load import Routing
from .timing import IDLE_S, LEAD_CYCLES

WARM_UP = 2
PASSES = ("fwd", "bwd")


@dataclass
class Spans:
    """Of one candidate's pass."""

    events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = field(default_factory=list)
    host_ms: list[float] = field(default_factory=list)  # until the call returned

    def milliseconds(self) -> list[float]:
        return [start.elapsed_time(end) for start, end in self.events]


class Clock:
    """Starts passes of all ranks together."""

    def __init__(self, group: dist.ProcessGroup | None, paced: bool):
        self.group, self.paced = group, paced
        self.token = torch.zeros(1, device="cuda")

    def align(self, rested: bool) -> None:
        rested = rested and self.paced
        if rested:
            torch.cuda.synchronize()
            time.sleep(IDLE_S)
        if self.group is not None:
            dist.all_reduce(self.token, group=self.group)  # no stream goes on before every rank's is here
        if rested:
            torch.cuda._sleep(LEAD_CYCLES)  # after it: launching the all-reduce takes as long

    def time(self, spans: Spans, rested: bool, call, *args):
        """rested: in the paced mode, idle before."""
        self.align(rested)
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        begin = time.perf_counter()
        result = call(*args)
        spans.host_ms.append(1e3 * (time.perf_counter() - begin))
        end.record()
        spans.events.append((start, end))
        return result


def alternate(
    candidates: Mapping[str, Candidate], inputs: list[Routing], iterations: int, passes: list[str],
    group: dist.ProcessGroup | None, *, paced: bool,
) -> dict[tuple[str, str], tuple[float, float]]:  # fmt: skip
    """Median (device, host) milliseconds by (candidate, pass), the worst rank's. `inputs` rotate. Collective."""
    names, clock = list(candidates), Clock(group, paced)
    found = {(name, one): Spans() for name in names for one in passes}
    for iteration in range(-WARM_UP, iterations):
        turn = iteration % len(names)
        given = inputs[iteration % len(inputs)]
        for name in names[turn:] + names[:turn]:
            spans = {one: found.get((name, one), Spans()) if iteration >= 0 else Spans() for one in PASSES}
            state = clock.time(spans["fwd"], True, candidates[name].forward, given)
            if "bwd" in passes:
                clock.time(spans["bwd"], False, candidates[name].backward, given, state)
            del state
    torch.cuda.synchronize()
    medians = [[statistics.median(spans.milliseconds()), statistics.median(spans.host_ms)] for spans in found.values()]
    worst = torch.tensor(medians, device="cuda", dtype=torch.float64)
    if group is not None:
        dist.all_reduce(worst, dist.ReduceOp.MAX, group=group)
    return {key: (device, host) for key, (device, host) in zip(found, worst.tolist(), strict=True)}


def memory(candidate: Candidate, inputs: Routing, backward: bool) -> tuple[int, int]:
    """Bytes kept for backward (beyond inputs, weights and y), and the peak of both passes above what was there."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    state = candidate.forward(inputs)
    torch.cuda.synchronize()
    y = output_of(state)
    kept = torch.cuda.memory_allocated() - before - (0 if y is None else y.numel() * y.element_size())
    del y
    if backward:
        candidate.backward(inputs, state)
        torch.cuda.synchronize()
    return kept, torch.cuda.max_memory_allocated() - before

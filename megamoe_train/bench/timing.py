"""Alternating timing: every candidate once per iteration, in rotated order, so that all see the same clocks.

`paced`: 40 ms idle before each measurement, the clock recovers. `sustained`: back to back, the power limit acts.
One implementation alone in its own loop can differ by 14% from clocks alone; hence no such mode.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch

IDLE_S = 0.040
LEAD_CYCLES = 400_000  # ~0.2 ms of spinning before a paced measurement: the launch is queued when the clock starts


def alternate(
    candidates: dict[str, Callable[[int], None]], iterations: int, *, paced: bool,
    before: Callable[[str], None] = lambda _: None,
) -> dict[str, float]:  # fmt: skip
    """Median milliseconds of each candidate; it is called with the iteration's number, to rotate its inputs. `before`
    is called with its name, untimed."""
    for warm in range(2):
        for name, run in candidates.items():
            before(name)
            run(warm)
    torch.cuda.synchronize()
    names = list(candidates)
    spans: dict[str, list] = {name: [] for name in names}
    for iteration in range(iterations):
        turn = iteration % len(names)
        for name in names[turn:] + names[:turn]:
            before(name)
            if paced:
                torch.cuda.synchronize()
                time.sleep(IDLE_S)
                torch.cuda._sleep(LEAD_CYCLES)
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            candidates[name](iteration)
            end.record()
            spans[name].append((start, end))
    torch.cuda.synchronize()
    return {name: statistics.median(a.elapsed_time(b) for a, b in pairs) for name, pairs in spans.items()}


class CuBLAS:
    """The denominator of every share: torch.mm(a, b.t()) at 8192^3 in bf16, repeated to about a given duration."""

    SIZE = 8192
    FLOPS = 2 * SIZE**3

    def __init__(self, flops: float, like: CuBLAS | None = None):
        """like: one whose matrices this one uses too."""
        if like is None:
            self.a, self.b = (torch.randn(self.SIZE, self.SIZE, device="cuda").bfloat16() for _ in range(2))
            self.out = torch.empty_like(self.a)
        else:
            self.a, self.b, self.out = like.a, like.b, like.out
        self.repeats = max(1, round(flops / self.FLOPS))

    def __call__(self, iteration: int) -> None:
        for _ in range(self.repeats):
            torch.mm(self.a, self.b.t(), out=self.out)

    def tflops(self, milliseconds: float) -> float:
        return self.FLOPS * self.repeats / milliseconds / 1e9

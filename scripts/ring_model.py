"""A wgrad's tile in cycles: a model of one CTA's roles over the operand ring, to try a schedule before it is built.

    python scripts/ring_model.py            # what traces of one H200 say, and what the model makes of it

The roles are those of csrc/roles: a loader, two math warpgroups, a storer. What they share is modelled as servers that
take jobs in their order: the tensor cores, shared memory as the epilogues use it, the way in, and the TMA unit, behind
whose stores loads wait. The peer CTA is taken to do the same at the same time. Constants are fitted to the traces,
which are of the order up to 515965f: the spare filled and sent last, all old values loaded. Since then L2 adds what
lies there.
"""

from __future__ import annotations

import heapq
import itertools
import statistics
from collections.abc import Callable, Generator
from dataclasses import dataclass, field

STAGES, K_STEP_BYTES, PART_BYTES, BOX_BYTES = 4, 48 * 1024, 16 * 1024, 8 * 1024
WGMMA, WGMMAS = 128, 4  # cycles of the tensor cores for m64n256k16; of them in a step of 64 rows
LOAD_LATENCY, SENT_LATENCY = 1600, 300  # from L2 or memory; until a store is known to have read shared memory
IN, OUT, ISSUE = 64, 28, 128  # bytes a cycle: arriving, leaving, and as fast as the TMA unit takes up loads
PART_ACCESS = 64  # cycles of shared memory for one warpgroup's rows of a part, once through, without bank conflicts
PART_FIXED, STAGE_FIXED, UNIT_FIXED = 60, 320, 800  # waits, fences and barriers of the epilogue; between two units


@dataclass(frozen=True)
class Design:
    """parts: of 32 columns in each output stage; the last stage lies in the spare. window: boxes in flight, 0: any.
    lag: steps by which the second warpgroup stays behind the first."""

    k_steps: int = 16
    adds: bool = True
    conflicts: bool = True
    parts: tuple[int, ...] = (3, 3, 2)
    window: int = 0
    lag: int = 0


@dataclass(frozen=True)
class Cycles:
    """Medians over units, of the first warpgroup and of the storer; as `bench trace` names them."""

    products: float
    awaited: float
    epilogue: float
    sent: float
    whole: float

    def __str__(self) -> str:
        return " ".join(f"{round(value):>9}" for value in vars(self).values())


# wgrad1 of `bench gemm`, MEGAMOE_TRACE=1, one H200, 861bb65; the same with changes that were tried.
MEASURED = {
    "Pro, added": (Design(), Cycles(16735, 292, 4996, 6390, 22847)),
    "Pro, stored": (Design(adds=False), Cycles(20495, 168, 2699, 5422, 24008)),
    "Flash, added": (Design(24), Cycles(25007, 263, 4979, 6404, 31122)),
    "Flash, stored": (Design(24, adds=False), Cycles(26981, 167, 2707, 4643, 30514)),
    "Pro, no conflicts": (Design(conflicts=False), Cycles(18217, 632, 3293, 6148, 23202)),
    "Pro, no conflicts, two boxes": (Design(conflicts=False, window=2), Cycles(18150, 436, 3245, 6412, 22739)),
    "Pro, no conflicts, one box": (Design(conflicts=False, window=1), Cycles(20279, 360, 3200, 8665, 24672)),
}

# What nobody has built.
IMAGINED = {
    "Pro, two boxes": Design(window=2),
    "Pro, a lag of one step": Design(lag=1),
    "Pro, a lag of two": Design(lag=2),
    "Flash, no conflicts": Design(24, conflicts=False),
}

Role = Generator[Callable[[Callable[[], None]], None], None, None]


class Clock:
    """Runs roles: generators that yield what they wait for, a function that takes the call to make when it is over."""

    def __init__(self):
        self.now, self._due, self._order = 0.0, [], itertools.count()

    def at(self, when: float, call: Callable[[], None]) -> None:
        heapq.heappush(self._due, (when, next(self._order), call))

    def start(self, role: Role) -> None:
        wait = next(role, None)
        if wait is not None:
            wait(lambda: self.start(role))

    def after(self, cycles: float) -> Callable:
        return lambda call: self.at(self.now + cycles, call)

    def run(self) -> None:
        while self._due:
            self.now, _, call = heapq.heappop(self._due)
            call()


@dataclass
class Server:
    """Serves one job after another, in the order in which they come."""

    clock: Clock
    free: float = 0.0

    def serve(self, cycles: float) -> Callable:
        def wait(call: Callable[[], None]) -> None:
            self.free = max(self.free, self.clock.now) + cycles
            self.clock.at(self.free, call)

        return wait


@dataclass
class Barrier:
    """Counts arrivals; never reset: each use of a place has its own."""

    clock: Clock
    count: int = 0
    waiting: list[tuple[int, Callable]] = field(default_factory=list)

    def arrive(self, count: int = 1) -> None:
        self.count += count
        ready = [call for needed, call in self.waiting if needed <= self.count]
        self.waiting = [one for one in self.waiting if one[0] > self.count]
        for call in ready:
            self.clock.at(self.clock.now, call)

    def reach(self, needed: int) -> Callable:
        return lambda call: (
            self.clock.at(self.clock.now, call) if self.count >= needed else self.waiting.append((needed, call))
        )


class Cta:
    """One CTA through `units` tiles."""

    def __init__(self, design: Design, units: int):
        self.design, self.units, self.clock = design, units, Clock()
        self.tensor, self.shared, self.way_in, self.tma = (Server(self.clock) for _ in range(4))
        self.barriers: dict[tuple, Barrier] = {}
        self.marks: dict[tuple, float] = {}
        for role in (self.loader(), self.math(0), self.math(1), self.storer()):
            self.clock.start(role)
        self.clock.run()

    def barrier(self, *name) -> Barrier:
        return self.barriers.setdefault(name, Barrier(self.clock))

    def place(self, unit: int, output: int | None = None, k: int = 0) -> tuple[str, int]:
        """Which use of the ring, or of the spare, a unit's step k or output stage is."""
        if output == len(self.design.parts) - 1:
            return "spare", unit
        ring_outputs = len(self.design.parts) - 1
        first = unit * (self.design.k_steps + ring_outputs)
        return "ring", first + (k if output is None else self.design.k_steps + output)

    def freed(self, place: tuple[str, int]) -> Callable:
        """Both warpgroups, or the storer for them, have handed back what lay here before."""
        kind, use = place
        before = use - (STAGES if kind == "ring" else 1)
        return self.barrier("free", kind, before).reach(2 if before >= 0 else 0)

    def arrival(self, place: tuple[str, int], size: int) -> Role:
        yield self.clock.after(LOAD_LATENCY)
        yield self.way_in.serve(size / IN)
        self.barrier("full", *place).arrive()

    def loader(self) -> Role:
        for unit in range(self.units):
            for k in range(self.design.k_steps):
                place = self.place(unit, k=k)
                yield self.freed(place)
                yield self.tma.serve(K_STEP_BYTES / ISSUE)
                self.clock.start(self.arrival(place, K_STEP_BYTES))
            for output, parts in enumerate(self.design.parts):
                place = self.place(unit, output)
                yield self.freed(place)
                if not self.design.adds:
                    self.barrier("full", *place).arrive()
                    continue
                yield self.tma.serve(parts * PART_BYTES / ISSUE)
                self.clock.start(self.arrival(place, parts * PART_BYTES))

    def multiply(self, place: tuple[str, int], done: Barrier) -> Role:
        for _ in range(WGMMAS):
            yield self.tensor.serve(WGMMA)
        done.arrive()

    def math(self, warpgroup: int) -> Role:
        def mark(name: str) -> None:
            self.marks.setdefault((warpgroup, unit, name), self.clock.now)

        access = PART_ACCESS * (2 if self.design.adds else 1) * (2 if self.design.conflicts else 1)
        for unit in range(self.units):
            mark("taken")
            yield self.clock.after(UNIT_FIXED)
            running: list[tuple[Barrier, tuple[str, int]]] = []
            for k in range(self.design.k_steps + 1):  # a step is handed back when the next has been issued
                if k < self.design.k_steps:
                    place = self.place(unit, k=k)
                    if warpgroup == 1:
                        yield self.barrier("begun", unit).reach(min(k + self.design.lag, self.design.k_steps))
                    yield self.barrier("full", *place).reach(1)
                    mark("first stage")
                    if warpgroup == 0:
                        self.barrier("begun", unit).arrive()
                    running.append((Barrier(self.clock), place))
                    self.clock.start(self.multiply(place, running[-1][0]))
                if len(running) == 2 or k == self.design.k_steps:
                    done, place = running.pop(0)
                    yield done.reach(1)
                    self.barrier("free", *place).arrive()
            mark("multiplied")
            for output, parts in enumerate(self.design.parts):
                yield self.barrier("full", *self.place(unit, output)).reach(1)
                mark("first output")
                for _ in range(parts):
                    yield self.clock.after(PART_FIXED)
                    for _ in range(4):
                        yield self.shared.serve(access / 4)
                yield self.clock.after(STAGE_FIXED)
                self.barrier("output", warpgroup, unit, output).arrive()
            mark("done")

    def send(self, sent: Barrier) -> Role:
        yield self.tma.serve(BOX_BYTES / OUT)
        yield self.clock.after(SENT_LATENCY)
        sent.arrive()

    def hand_back(self, place: tuple[str, int], sent: Barrier, boxes: int) -> Role:
        yield sent.reach(boxes)
        self.barrier("free", *place).arrive(2)

    def storer(self) -> Role:
        """Stage by stage; where nothing is added a stage is handed back when the next is on its way."""
        for unit in range(self.units):
            on_the_way: list[Role] = []
            for output, parts in enumerate(self.design.parts):
                sent = Barrier(self.clock)
                for warpgroup in range(2):
                    yield self.barrier("output", warpgroup, unit, output).reach(1)
                    self.marks.setdefault(("storer", unit, "first full"), self.clock.now)
                    for part in range(parts):
                        box = warpgroup * parts + part
                        if self.design.window and box >= self.design.window:
                            yield sent.reach(box - self.design.window + 1)
                        self.clock.start(self.send(sent))
                on_the_way.append(self.hand_back(self.place(unit, output), sent, 2 * parts))
                if self.design.adds or len(on_the_way) == 2:
                    yield from on_the_way.pop(0)
            for stage in on_the_way:
                yield from stage
            self.marks["storer", unit, "sent"] = self.clock.now


def cycles(design: Design, units: int = 40) -> Cycles:
    """What the model says of a design, once it has settled."""
    marks, settled = Cta(design, units).marks, range(units // 4, units - 2)

    def median(who, begin: str, end: str, later: int = 0) -> float:
        return statistics.median(marks[who, unit + later, end] - marks[who, unit, begin] for unit in settled)

    return Cycles(
        median(0, "first stage", "multiplied"), median(0, "multiplied", "first output"),
        median(0, "first output", "done"), median("storer", "first full", "sent"), median(0, "taken", "taken", 1),
    )  # fmt: skip


def main() -> None:
    columns = ("products", "awaited", "epilogue", "sent", "whole")
    print(f"{'cycles of a unit':40} " + " ".join(f"{name:>9}" for name in columns))
    for name, (design, measured) in MEASURED.items():
        print(f"{name:40} {measured}")
        print(f"{'  by the model':40} {cycles(design)}")
    print("by the model alone:")
    for name, design in IMAGINED.items():
        print(f"{name:40} {cycles(design)}")


if __name__ == "__main__":
    main()

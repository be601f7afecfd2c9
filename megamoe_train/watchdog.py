"""What the host does about a wait that ended badly: print its record, keep it in a file, raise MegaMoETimeout.

A kernel that gives up writes a record into pinned host memory, raises the abort word at every rank and traps. Then
any CUDA call fails with an error that names nothing; a thread here reads the record whatever fails first.
"""

from __future__ import annotations

import atexit
import contextlib
import sys
import threading
import weakref
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from .config import env

POLL_S = 0.05

# csrc/comm/wait.cuh: enum class Waiting.
WAITS = {
    1: "the next unit of work",
    2: "a free place in the queue of units",
    3: "an operand in shared memory",
    4: "a free stage in shared memory",
    5: "a result in shared memory",
    6: "rows of a tile to be dispatched",
    7: "the tiles that a product is made from",
    8: "the units that rows are to be pulled for",
    9: "the loader to near the end of its unit",
    32: "the routing counts",
    33: "the list of routed slots",
    34: "the announcement (ready word) of the operation",
    35: "the acknowledgement that staged rows were pulled",
    36: "the pushed rows of a combine",
    37: "a row copied to shared memory",
    38: "the rows of a token in its combine slots",
    39: "the tokens of the second pull to be staged",
}
# csrc/comm/wait.cuh: enum class Failure.
FAILURES = {1: "deadline passed", 2: "the peer is in another operation", 3: "another rank has failed"}
OPS = {1: "dispatch", 2: "combine", 3: "dispatch of backward", 4: "combine of backward", 5: "forward", 6: "backward"}
READY = 34
RECORD_INTS = 6  # int64: eight ints, two 64-bit numbers


class MegaMoETimeout(RuntimeError):
    """A kernel's wait on another warp, CTA or rank failed. The process's CUDA context is lost: restart it."""


@dataclass(frozen=True)
class Record:
    """csrc/comm/wait.cuh: struct WaitRecord."""

    failure: int
    what: int
    block: int
    thread: int
    rank: int
    peer: int  # -1: a wait inside the rank
    expected: int
    seen: int

    @classmethod
    def read(cls, memory: np.ndarray) -> Record | None:
        """None while no failure is completely written. memory: int64 [RECORD_INTS]."""
        if not memory[0] >> 32:
            return None
        ints = memory.view(np.int32)[2:8].tolist()
        return cls(*ints, *(value & (2**64 - 1) for value in memory[4:6].tolist()))

    def __str__(self) -> str:
        peer = f" of rank {self.peer}" if self.peer >= 0 else ""
        return (
            f"megamoe: rank {self.rank} gave up waiting for {WAITS.get(self.what, self.what)}{peer}: "
            f"{FAILURES.get(self.failure, self.failure)}; expected {self._show(self.expected)}, "
            f"saw {self._show(self.seen)} (block {self.block}, thread {self.thread})"
        )

    def _show(self, word: int) -> str:
        if self.what < 32 or self.what == 37:
            return str(word)
        text = f"epoch {word >> 32}"
        if self.what != READY or not word & 0xFFFFFFFF:
            return text
        return f"{text} {OPS.get(word >> 24 & 0x3F, 'unknown')} of plan {word & 0xFFFFFF}"


class Guard:
    """The record of one rank's waits, and the thread that watches it for as long as the guard lives."""

    def __init__(self, rank: int, *, pinned: bool = True):
        self.rank = rank
        self.record = torch.zeros(RECORD_INTS, dtype=torch.int64, pin_memory=pinned)
        self._record = self.record.numpy()
        self._words = memoryview(self._record)  # the same memory, read at a fraction of the cost
        self._stop = threading.Event()
        self._seen = threading.Event()
        arguments = (weakref.ref(self), self._stop)
        self._thread = threading.Thread(target=_watch, args=arguments, name=f"megamoe-watchdog-{rank}", daemon=True)
        self._thread.start()
        _alive.add(self)

    def stop(self) -> None:
        """Ends the thread, after a last look at the record."""
        self._stop.set()
        self._thread.join(1.0)
        if (record := self.failure()) is not None:
            self.report(record)

    def failure(self) -> Record | None:
        return Record.read(self._record) if self._words[0] else None

    def check(self) -> None:
        """Raises MegaMoETimeout if a wait has failed."""
        if (record := self.failure()) is not None:
            self.report(record)
            raise MegaMoETimeout(str(record))

    def report(self, record: Record) -> None:
        """Prints the record and writes it to this rank's file, once."""
        if self._seen.is_set():
            return
        self._seen.set()
        print(record, file=sys.stderr, flush=True)
        with contextlib.suppress(OSError):
            path = Path(env("MEGAMOE_RECORD_DIR") or ".") / f"megamoe-timeout-rank{self.rank}.txt"
            path.write_text(f"{record}\n")

    def watch(self) -> _Watch:
        """Around calls that launch or synchronise: an error that follows a failed wait becomes MegaMoETimeout."""
        return _Watch(self)

    def check_soon(self, error: BaseException) -> None:
        record = self.failure()
        if record is not None:
            self.report(record)
            raise MegaMoETimeout(str(record)) from error


class _Watch:
    """Guard.watch: a class, as every call of a layer enters several and a generator costs twice as much."""

    __slots__ = ("guard",)

    def __init__(self, guard: Guard):
        self.guard = guard

    def __enter__(self) -> None:
        self.guard.check()

    def __exit__(self, _, error: BaseException | None, __) -> None:
        if isinstance(error, RuntimeError):  # torch.AcceleratorError is one
            self.guard.check_soon(error)


# A daemon thread that is inside torch when the interpreter ends takes the process down with it (std::terminate).
_alive: weakref.WeakSet[Guard] = weakref.WeakSet()


@atexit.register
def _stop_all() -> None:
    for guard in list(_alive):
        guard.stop()


def _watch(guard_of: weakref.ref, stop: threading.Event) -> None:
    while not stop.wait(POLL_S):
        guard = guard_of()
        if guard is None:
            return
        if (record := guard.failure()) is not None:
            guard.report(record)
            return
        del guard

"""Virtual ranks on the emulator; what the package asks of CUDA, answered for it.

The library defines the operators that the CUDA extension defines elsewhere: both cannot be loaded in one process.
"""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Iterator

import torch

from megamoe_train import backends, fused, fused_plan, ops, ops_plan, plain
from tests.gpu.virtual import Load, Ranks

QUIET_MS = 50  # a late rank waits until the others got nowhere for so long
DEADLINE_S = 60.0  # threads of two cores take turns; nothing here should ever wait so long


class EmulatedRanks(Ranks):
    """Ranks on the CPU, every rank on its own stream. Tensors are kept: no allocator here knows of streams."""

    device = "cpu"
    runtime: ctypes.CDLL
    deadline_s = DEADLINE_S
    current = 1
    count = 0

    def __init__(self, load: Load, hidden: int = 256):
        self.kept = []
        super().__init__(load, hidden, streams=True, deadline_s=self.deadline_s)

    def new_stream(self) -> int:
        EmulatedRanks.count += 1
        return EmulatedRanks.count

    def synchronize(self) -> None:
        failed = self.runtime.emulator_synchronize()
        for workspace in self.workspaces:
            workspace.guard.check()
        assert not failed, "a kernel trapped and left no record"

    def delay(self, rank: int) -> None:
        self.runtime.emulator_hold(ctypes.c_uint64(self.streams[rank]), QUIET_MS)

    def on(self, rank: int):
        return on_stream(self.streams[rank])

    def each(self, call, *lists) -> list:
        results = super().each(call, *lists)
        self.kept.append((results, lists))
        return results


@contextlib.contextmanager
def on_stream(stream: int) -> Iterator[None]:
    before, EmulatedRanks.current = EmulatedRanks.current, stream
    yield
    EmulatedRanks.current = before


def at_once():
    """Kernels are done when their launch returns: for what keeps no tensors. One rank only."""
    return on_stream(0)


def load(library: str, seed: int, deadline_s: float = DEADLINE_S) -> None:
    """Takes the operators from `library` and stands in for the CUDA runtime in this process."""
    torch.set_num_threads(1)
    torch.ops.load_library(library)
    EmulatedRanks.runtime, EmulatedRanks.deadline_s = ctypes.CDLL(library), deadline_s
    EmulatedRanks.runtime.emulator_configure(2, 30 + seed * 17 % 60, ctypes.c_uint64(1000 * seed + 1))
    ops.load, ops.raw_stream = lambda: None, lambda device: EmulatedRanks.current
    ops.pinned_bytes = lambda *size: torch.empty(*size, dtype=torch.uint8)
    ops_plan.stream_of = lambda workspace: EmulatedRanks.current
    torch.cuda.is_current_stream_capturing = lambda: False
    fused.in_order = fused_plan.in_order = lambda _: contextlib.nullcontext(EmulatedRanks.current)
    plain.unchanged_stream = lambda _: EmulatedRanks.current
    backends.register(fused.FusedBackend())
    backends.resolve = lambda *_: "fused"
    torch.use_deterministic_algorithms(True, warn_only=True)  # torch.empty comes filled with NaN

"""Where plans put their verdicts: host memory that the device writes, and the host reads when it gets there."""

from __future__ import annotations

import torch
from torch import Tensor

SLOTS = 1024  # plans whose verdict the host has not read yet
INTS = 8  # of a verdict; the first is 0 until the device has written the others


class Verdicts:
    """int64 [8] of pinned memory for each of a workspace's last 1024 plans."""

    def __init__(self, pinned: bool):
        memory = torch.zeros(SLOTS, INTS, dtype=torch.int64, pin_memory=pinned)
        self.statuses = memory.unbind(0)  # cut once, not in every call
        self._words, self._address = memoryview(memory.view(-1).numpy()), memory.data_ptr()
        self.plans = 0
        self.kept: set[int] = set()  # slots that captured graphs write again at every replay
        self.unread: list[tuple[Tensor, bool]] = []  # statuses nobody waits for, and whether a graph has captured them

    def next(self, *, captured: bool) -> Tensor:
        """For the next plan, its first word 0. captured: by a graph, which then keeps it; others come again 1024 plans
        later."""
        self.offer()
        if captured:
            self.kept.add(self.plans % SLOTS)
        return self.take()

    def offer(self) -> int:
        """Its address, for a plan that may not come about: only take, once it has, goes on to the next."""
        if len(self.kept) == SLOTS:
            raise RuntimeError(f"workspace: captured graphs hold all {SLOTS} verdicts; capture with another one")
        while self.plans % SLOTS in self.kept:
            self.plans += 1
        first = self.plans % SLOTS * INTS
        self._words[first] = 0
        return self._address + 8 * first

    def take(self) -> Tensor:
        """The memory offered last, not cleared again."""
        slot, self.plans = self.plans % SLOTS, self.plans + 1
        return self.statuses[slot]

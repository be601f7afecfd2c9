"""Cases on the emulator, in a process of their own: `python -m tests.csrc.emulator.run LIBRARY SEED CASE ...`."""

from __future__ import annotations

import os
import sys

from . import fused_cases, ranks, staged_cases

CASES = staged_cases.CASES | fused_cases.CASES


def main(library: str, seed: str, *names: str, deadline_s: float = ranks.DEADLINE_S) -> None:
    ranks.load(library, int(seed), deadline_s)
    for name in names:
        CASES[name]()
        print("passed", name, flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
    sys.stdout.flush()
    os._exit(0)  # the emulator's workers wait for ever

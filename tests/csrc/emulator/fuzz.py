"""Random shapes, routings and numbers of ranks and SMs through the fused passes, until one fails:
`python -m tests.csrc.emulator.fuzz LIBRARY SEED SECONDS`."""

from __future__ import annotations

import os
import random
import sys
import time

import torch

from tests.gpu.layer_case import Case, compare, worst_of
from tests.gpu.virtual import Load
from tests.workloads import ROUTINGS

from . import ranks
from .fused_cases import run_twice

MOST_SLOTS = 500  # of all ranks: what two cores do in a few seconds
FEWEST_WEIGHTS = 32


def random_case(pick: random.Random) -> Case:
    count = pick.choice((1, 1, 2, 2, 3, 4, 8))
    experts = count * pick.choice((1, 2, 4) if count >= 4 else (1, 2, 3, 5, 8))
    top_k = min(pick.choice((1, 1, 2, 3, 4, 6, 8, 16)), experts)
    most = max(1, MOST_SLOTS // top_k // count)
    tokens = tuple(min(pick.choice((0, 1, 7, 31, 33, 64, 65, pick.randint(0, most))), most) for _ in range(count))
    load = Load(pick.choice(list(ROUTINGS)), tokens, top_k, experts)
    hidden, inner = pick.choice((256, 256, 512, 768, 1024)), pick.choice((128, 128, 256, 384, 640))
    return Case(load, hidden, inner, pick.choice((None, 1.0, 10.0)), pick.choice((1.0, 3.0)))


def check(case: Case, num_sms: int) -> None:
    """By the 2x rule, and the same bits whoever is late."""
    layer, found = run_twice(case, num_sms, late=(0, case.load.ranks - 1))
    # All ranks' dp together, and not few: the plain computation may have hit those by chance.
    dweights = torch.cat([result.dweights for result in found.values()])
    parts = [part for part in worst_of(layer, found) if part.name != "dweights"]
    if dweights.numel() >= FEWEST_WEIGHTS:
        parts.append(compare("dweights", "all ranks", dweights, layer.plain.dweights, layer.exact.dweights))
    wrong = [str(part) for part in parts if not part.used <= 1]
    assert not wrong, "\n".join(wrong)


def main(library: str, seed: str, seconds: str) -> None:
    ranks.load(library, int(seed))
    pick, end = random.Random(int(seed)), time.monotonic() + float(seconds)
    while time.monotonic() < end:
        case, num_sms = random_case(pick), pick.choice((2, 4, 6, 8))
        print(f"{case}, {num_sms} SMs", flush=True)
        check(case, num_sms)


if __name__ == "__main__":
    main(*sys.argv[1:])
    os._exit(0)  # the emulator's workers wait for ever

"""Tests of several processes, one GPU each: how many, and what each of them has."""

from __future__ import annotations

import torch

RANKS = [ranks for ranks in (2, 4, 8) if ranks <= max(2, torch.cuda.device_count())]


def spread(values: tuple, ranks: int) -> tuple:
    """A value for each rank, over and over."""
    return tuple(values[rank % len(values)] for rank in range(ranks))

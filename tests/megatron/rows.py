"""Many checks in one process group: importing Megatron takes longer than most of them.

A test module has `ROWS = {name: check}`; every rank of one group calls the checks one after another. Each row is its
own test: it passes when all ranks have finished it; the row that broke the group shows the error; those after it fail
as not reached.

    ran = rows.fixture(__name__, world_size=4)

    @pytest.mark.parametrize("row", ROWS)
    def test_row(ran, row):
        ran.check(row)
"""

import importlib
from pathlib import Path

import pytest

from tests.distributed import run_ranks


def fixture(module: str, world_size: int, timeout: float = 240, table: str = "ROWS"):
    """A module-scoped fixture that runs the rows of `module`'s `table` on a group of `world_size` gloo ranks."""

    @pytest.fixture(scope="module")
    def ran(tmp_path_factory):
        return Ran(module, table, world_size, tmp_path_factory.mktemp("rows"), timeout)

    return ran


class Ran:
    """The outcome: which rows every rank finished, and the error that ended the group early."""

    def __init__(self, module: str, table: str, world_size: int, folder: Path, timeout: float):
        self.error = None
        log = folder / "finished"
        log.touch()
        try:
            run_ranks(_work, world_size, module, table, str(folder), timeout=timeout)
        except (AssertionError, TimeoutError) as error:
            self.error = error
        self.finished = log.read_text().splitlines()
        left = [row for row in getattr(importlib.import_module(module), table) if row not in self.finished]
        self.broken = left[0] if left else None
        assert bool(left) == bool(self.error), (left, self.error)

    def check(self, row: str) -> None:
        if row == self.broken:
            raise self.error
        assert row in self.finished, f"not reached: {self.broken} failed before"


def _work(rank: int, world_size: int, module: str, table: str, folder: str) -> None:
    """Every check gets an empty folder that all ranks share."""
    import torch
    import torch.distributed as dist

    for name, check in getattr(importlib.import_module(module), table).items():
        torch.manual_seed(100 + rank)
        place = Path(folder) / name.replace("/", "-")
        place.mkdir(exist_ok=True)
        check(place)
        dist.barrier()
        if rank == 0:
            with (Path(folder) / "finished").open("a") as log:
                log.write(name + "\n")

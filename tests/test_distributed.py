"""The runner itself: a failing, dying or hanging rank ends the test with a clear error and leaves no process."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from tests.distributed import RankFailed, run_ranks


def _sum_over_ranks(rank: int, world_size: int, start: torch.Tensor) -> torch.Tensor:
    assert dist.get_rank() == rank and dist.get_world_size() == world_size
    value = start + rank
    dist.all_reduce(value)
    return value


def test_results_come_back_by_rank():
    results = run_ranks(_sum_over_ranks, 3, torch.ones(2))
    assert [value.tolist() for value in results] == [[6.0, 6.0]] * 3


def _environment(rank: int, world_size: int) -> tuple[str | None, str]:
    return os.environ.get("MEGAMOE_OF_THIS_TEST"), os.getcwd()


def test_ranks_see_the_callers_environment(monkeypatch):
    for value in ("one", "two"):  # the second call finds the server of the first running
        monkeypatch.setenv("MEGAMOE_OF_THIS_TEST", value)
        assert run_ranks(_environment, 1) == [(value, os.getcwd())]


def _one_fails(rank: int, world_size: int) -> None:
    if rank == 1:
        raise KeyError("the reason")
    dist.barrier()


def test_the_first_failure_is_raised_with_its_rank():
    with pytest.raises(RankFailed, match=r"(?s)rank 1 of 3 failed first:.*KeyError: 'the reason'"):
        run_ranks(_one_fails, 3)


def _one_dies(rank: int, world_size: int) -> None:
    if rank == 0:
        os._exit(3)
    time.sleep(60)


def test_a_rank_that_dies_is_named():
    started = time.monotonic()
    with pytest.raises(RankFailed, match=r"rank 0 of 2 failed first:\nthe process ended without an answer"):
        run_ranks(_one_dies, 2)
    assert time.monotonic() - started < 50  # the sleeping rank was ended, not waited for


def _all_hang(rank: int, world_size: int, folder: str) -> None:
    with open(os.path.join(folder, str(rank)), "w") as file:
        file.write(str(os.getpid()))
    time.sleep(600)


def _is_running(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


def test_ranks_that_hang_are_named_and_ended(tmp_path):
    with pytest.raises(TimeoutError, match=r"ranks \[0, 1\] of 2 did not finish within 6 s"):
        run_ranks(_all_hang, 2, str(tmp_path), timeout=6)
    assert [_is_running(int((tmp_path / str(rank)).read_text())) for rank in range(2)] == [False, False]


def _one_never_joins(rank: int, world_size: int) -> None:
    if rank == 1:
        time.sleep(600)
    dist.barrier()


def test_a_collective_that_hangs_says_where():
    with pytest.raises(RankFailed, match=r"(?s)rank 0 of 2 failed first:.*in _one_never_joins\n    dist.barrier\(\)"):
        run_ranks(_one_never_joins, 2, timeout=20)

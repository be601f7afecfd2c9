"""Real gloo process groups for tests: `run_ranks(fn, world_size, *args)` runs `fn` in that many processes."""

from __future__ import annotations

import datetime
import multiprocessing
import multiprocessing.connection
import os
import pickle
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from megamoe_train.training import launch

GRACE_S = 2.0  # after the first failure, before the other ranks are ended

# Ranks are forked by one server per pytest run, which imports these once: seconds less a rank than importing in each.
# A conftest may add modules, before the first call of run_ranks.
PRELOAD = ["torch", "torch.distributed"]


class RankFailed(AssertionError):
    """One rank raised; the message holds its number and its traceback."""


def run_ranks(
    fn: Callable[..., Any], world_size: int, *args: Any, timeout: float = 240, backend: str = "gloo"
) -> list[Any]:
    """Runs `fn(rank, world_size, *args)` in `world_size` processes joined by a group; returns what each returned.

    `fn` must be importable (top level of a module), arguments and results picklable (tensors
    travel by value). Raises RankFailed for the rank that failed first, TimeoutError after `timeout` seconds.
    """
    # A process forked from one that has asked CUDA for anything cannot use it; what is preloaded may ask.
    context = multiprocessing.get_context("spawn" if torch.cuda.is_available() else "forkserver")
    if context.get_start_method() == "forkserver":
        context.set_forkserver_preload(PRELOAD)
    with tempfile.TemporaryDirectory(prefix="megamoe-ranks-") as folder:
        store = os.path.join(folder, "store")
        pipes, workers = [], []
        for rank in range(world_size):
            receiver, sender = context.Pipe(duplex=False)
            call = (fn, rank, world_size, args, backend, store, timeout, dict(os.environ), sender)
            worker = context.Process(target=_rank_main, args=call)  # no daemon: a rank may start processes itself
            worker.start()
            sender.close()
            pipes.append(receiver)
            workers.append(worker)
        try:
            return _collect(pipes, time.monotonic() + timeout, timeout)
        finally:
            _end(workers)


def _rank_main(
    fn: Callable, rank: int, world_size: int, args: tuple, backend: str, store: str, timeout: float,
    environment: dict, sender,
) -> None:  # fmt: skip
    launch.follow_parent(signal.SIGKILL)  # no rank outlives a killed pytest
    os.environ.clear()  # the server's environment is that of the first call, this one is the caller's
    os.environ.update(environment)
    torch.set_num_threads(1)
    try:
        # A collective that hangs fails first, with a traceback that says where.
        slack = max(0.2 * timeout, min(10, 0.5 * timeout))  # seconds in which a busy machine gets that traceback out
        limit = datetime.timedelta(seconds=timeout - slack)
        dist.init_process_group(backend, init_method=f"file://{store}", rank=rank, world_size=world_size, timeout=limit)
        # Plain pickle sends tensors by value: a shared-memory handle would die with this process.
        answer = (True, time.monotonic(), pickle.dumps(fn(rank, world_size, *args)))
        dist.barrier()
        dist.destroy_process_group()
    except BaseException:
        answer = (False, time.monotonic(), traceback.format_exc())
    sender.send(answer)
    sender.close()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0 if answer[0] else 1)  # interpreter shutdown with torch loaded takes seconds, and nothing is left to do


def _collect(pipes: list, deadline: float, timeout: float) -> list[Any]:
    results: dict[int, Any] = {}
    failures: list[tuple[float, int, str]] = []
    waiting = {pipe: rank for rank, pipe in enumerate(pipes)}
    while waiting:
        ready = multiprocessing.connection.wait(list(waiting), timeout=max(0.0, deadline - time.monotonic()))
        if not ready:
            break
        for pipe in ready:
            rank = waiting.pop(pipe)
            try:
                ok, moment, answer = pipe.recv()
            except EOFError:
                ok, moment, answer = False, time.monotonic(), "the process ended without an answer (killed?)"
            if ok:
                results[rank] = pickle.loads(answer)
            else:
                failures.append((moment, rank, answer))
                deadline = min(deadline, time.monotonic() + GRACE_S)
    if failures:
        _, rank, text = min(failures)
        raise RankFailed(f"rank {rank} of {len(pipes)} failed first:\n{text}")
    if waiting:
        raise TimeoutError(f"ranks {sorted(waiting.values())} of {len(pipes)} did not finish within {timeout} s")
    return [results[rank] for rank in range(len(pipes))]


def _end(workers: list) -> None:
    """All have answered and are about to exit, or the run has failed."""
    for worker in workers:
        worker.join(0.2)
        worker.kill()
    for worker in workers:
        worker.join()

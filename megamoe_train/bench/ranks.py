"""Processes of an expert-parallel group on this machine, one GPU each: started here, or found under torchrun."""

from __future__ import annotations

import os
from collections.abc import Callable

import torch
import torch.distributed as dist
import torch.multiprocessing

HOST = "127.0.0.1"


def run(function: Callable[..., None], ranks: int, *args) -> None:
    """Calls `function(*args)` in `ranks` processes joined by NCCL (`dist.group.WORLD`); with one rank, right here.

    Under torchrun the processes are there already: each calls it once. `function` must be importable. Raises
    ValueError where the machine or torchrun has another number of GPUs or processes, and what a rank raised.
    """
    if "TORCHELASTIC_RUN_ID" in os.environ:
        started = int(os.environ["WORLD_SIZE"])
        if started != ranks:
            raise ValueError(f"ep: got {ranks}; allowed: {started}, the processes that torchrun has started")
        _call(int(os.environ["LOCAL_RANK"]), int(os.environ["RANK"]), ranks, None, function, args)
        return
    if ranks > torch.cuda.device_count():
        raise ValueError(f"ep: got {ranks}; allowed: 1..{torch.cuda.device_count()}, the GPUs of this machine")
    if ranks == 1:
        torch.cuda.set_device(0)
        function(*args)
        return
    store = dist.TCPStore(HOST, 0, is_master=True, wait_for_workers=False)
    torch.multiprocessing.spawn(_spawned, (ranks, store.port, function, args), nprocs=ranks)


def _spawned(rank: int, ranks: int, port: int, function: Callable[..., None], args: tuple) -> None:
    _call(rank, rank, ranks, dist.TCPStore(HOST, port, is_master=False), function, args)


def _call(device: int, rank: int, ranks: int, store: dist.Store | None, function: Callable, args: tuple) -> None:
    torch.cuda.set_device(device)
    where = {} if store is None else {"store": store, "rank": rank, "world_size": ranks}
    dist.init_process_group("nccl", device_id=torch.device("cuda", device), **where)
    function(*args)
    torch.cuda.synchronize()
    dist.barrier()
    dist.destroy_process_group()


def join_alone() -> None:
    """A group of one where `run` joined none: Megatron asks for groups with one rank too."""
    if not dist.is_initialized():
        dist.init_process_group("nccl", store=dist.HashStore(), rank=0, world_size=1)


def group() -> dist.ProcessGroup | None:
    """The group of the processes that `run` joined; None where there is one."""
    return dist.group.WORLD if dist.is_initialized() and dist.get_world_size() > 1 else None


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0

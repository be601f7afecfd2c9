"""Measures the fabric between this machine's GPUs: symmetric memory, and the bandwidth of pulls over it.

`python -m megamoe_train.fabric` prints one JSON object; doctor runs it apart, since a bad fabric may hang or crash it.
One process per GPU; rank r pulls from rank r + 1 by SMs (a kernel that reads the peer's memory), as the layer does, and
by copy engines, all ranks at once.
"""

from __future__ import annotations

import json
import os
import socket
import sys
from datetime import timedelta

import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing

BYTES = 256 << 20  # per pull
REPEATS = 10
TIMEOUT_S = 60


def measure(rank: int, ranks: int, port: int, results) -> None:
    """One rank. Puts (rank, {what: figure}) into `results`; an error is a figure too."""
    found: dict[str, str] = {}
    try:
        torch.cuda.set_device(rank)
        address = f"tcp://localhost:{port}"
        limit = timedelta(seconds=TIMEOUT_S)
        dist.init_process_group("nccl", init_method=address, rank=rank, world_size=ranks, timeout=limit)
        from torch.distributed import _symmetric_memory as symmetric

        mine = symmetric.empty(BYTES, dtype=torch.uint8, device=torch.device("cuda", rank))
        mine.fill_(rank + 1)
        handle = symmetric.rendezvous(mine, dist.group.WORLD)
        found["symmetric memory"] = f"{BYTES >> 20} MiB shared by {ranks} ranks"
        source = (rank + 1) % ranks
        peer = handle.get_buffer(source, (BYTES // 4,), torch.int32)
        target = torch.empty(BYTES // 4, dtype=torch.int32, device="cuda")
        dist.barrier()
        ways = {
            "pull by SMs": lambda: torch.add(peer, 0, out=target),
            "pull by copy engines": lambda: target.copy_(peer),
        }
        for name, pull in ways.items():
            found[f"{name} from {source}"] = f"{_gigabytes_per_s(pull):.0f} GB/s while every GPU pulls"
        expected = 0x01010101 * (source + 1)
        if not bool((target == expected).all()):
            found["pulled bytes"] = f"WRONG: GPU {rank} did not read what GPU {source} wrote"
        dist.barrier()
    except Exception as error:  # whatever it is, it is the answer
        found["failed"] = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
    results.put((rank, found))


def _gigabytes_per_s(pull) -> float:
    """The median rate of a pull, one warm-up first; ranks start together."""
    pull()
    rates = []
    for _ in range(REPEATS):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        dist.barrier()
        begin.record()
        pull()
        end.record()
        torch.cuda.synchronize()
        rates.append(BYTES / begin.elapsed_time(end) / 1e6)
    return sorted(rates)[REPEATS // 2]


def main() -> int:
    ranks = torch.cuda.device_count()
    if ranks < 2:
        print(json.dumps({"fabric": f"none: {ranks} GPUs"}))
        return 0
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    context = multiprocessing.get_context("spawn")
    results = context.SimpleQueue()
    workers = [context.Process(target=measure, args=(rank, ranks, port, results), daemon=True) for rank in range(ranks)]
    for worker in workers:
        worker.start()
    answers = dict(results.get() for _ in workers)
    print(json.dumps({f"GPU {rank}: {name}": value for rank in range(ranks) for name, value in answers[rank].items()}))
    sys.stdout.flush()
    os._exit(0)  # a worker whose peer failed may hang in its shutdown


if __name__ == "__main__":
    sys.exit(main())

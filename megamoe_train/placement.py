"""Where ranks sit: an expert-parallel group must lie inside one NVLink domain, each rank on a GPU of its own.

A domain is a host, or what MEGAMOE_NVLINK_DOMAIN names (a rack whose hosts share NVLink). `meet` compares all ranks of
a job over the rendezvous store before a process group exists; `check_group` does it for one existing group.
"""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

from . import comm, config

_KEY = "megamoe/placement"
_AGREED = "ok"


@dataclass(frozen=True)
class Place:
    """What one rank says about itself."""

    domain: str
    gpu: str = ""  # UUID; empty on the CPU
    number: int = -1  # of the GPU among those that the process sees
    reaches: tuple[int, ...] = ()  # numbers of the GPUs it can read directly

    @classmethod
    def mine(cls, device: int | None = None) -> Place:
        """This process; `device` is the number of its GPU, None on the CPU."""
        domain = config.env("MEGAMOE_NVLINK_DOMAIN") or socket.gethostname()
        if device is None:
            return cls(domain)
        others = (other for other in range(torch.cuda.device_count()) if other != device)
        reached = tuple(other for other in others if torch.cuda.can_device_access_peer(device, other))
        return cls(domain, str(torch.cuda.get_device_properties(device).uuid), device, reached)


def problem(places: Sequence[Place], ep_size: int) -> str | None:
    """What is wrong with `places` (one for each rank), or None. Groups are `ep_size` ranks in a row, as Megatron's.

    GPUs are compared by number only where both ranks see more than one: a process may be shown its own alone.
    """
    for rank, place in enumerate(places):
        twin = next((other for other in range(rank) if place.gpu and places[other].gpu == place.gpu), None)
        if twin is not None:
            return f"GPU {place.gpu}: ranks {twin} and {rank} both use it; start one process for each GPU"
    for first in range(0, len(places), ep_size):
        group = range(first, first + ep_size)
        domains = dict.fromkeys(places[rank].domain for rank in group)
        if len(domains) > 1:
            where = "; ".join(f"{_ranks([r for r in group if places[r].domain == d])} on {d}" for d in domains)
            return (
                f"expert-model-parallel-size {ep_size}: the group of {_ranks(list(group))} spans NVLink domains: "
                f"{where}. Experts are reached over NVLink: choose a size that divides the ranks of a host"
            )
        for a in group:
            for b in group:
                seen = places[a].reaches and places[b].reaches and places[a].number != places[b].number
                if seen and places[b].number not in places[a].reaches:
                    return (
                        f"expert-model-parallel-size {ep_size}: rank {a} (GPU {places[a].number}) cannot read the "
                        f"memory of rank {b} (GPU {places[b].number}) on {places[a].domain}: no peer access"
                    )
    return None


def _ranks(numbers: list[int]) -> str:
    """ "ranks 0-3", "rank 4", "ranks 0, 2"."""
    if len(numbers) == 1:
        return f"rank {numbers[0]}"
    row = numbers == list(range(numbers[0], numbers[-1] + 1))
    return f"ranks {numbers[0]}-{numbers[-1]}" if row else f"ranks {', '.join(map(str, numbers))}"


def meet(ep_size: int, place: Place, *, refused: str | None = None, timeout_s: float = 600) -> dist.Store:
    """Collective over all ranks of the job, by torchrun's environment variables. Raises the same ValueError on all.

    refused: why this rank cannot take part, which then is everybody's error.
    Returns the store: it has to live until the process group exists, which finds it again at the same address.
    """
    store, rank, ranks = next(dist.rendezvous("env://", timeout=timedelta(seconds=timeout_s)))
    store.set(f"{_KEY}/{rank}", json.dumps({"refused": refused, **asdict(place)}))
    if rank == 0:
        told = [json.loads(store.get(f"{_KEY}/{other}")) for other in range(ranks)]
        refusals = [f"rank {other}: {why}" for other, one in enumerate(told) if (why := one.pop("refused"))]
        places = [Place(**one | {"reaches": tuple(one["reaches"])}) for one in told]
        store.set(f"{_KEY}/verdict", "; ".join(refusals) or problem(places, ep_size) or _AGREED)
    verdict = store.get(f"{_KEY}/verdict").decode()
    if verdict != _AGREED:
        raise ValueError(verdict)
    return store


_checked: set[int] = set()


def check_group(group: dist.ProcessGroup | None) -> None:
    """Collective over an expert-parallel group, the first time it is called for it. Raises ValueError on every rank."""
    size = comm.size_of(group)
    if size == 1 or id(group) in _checked:
        return
    on_gpu = torch.cuda.is_available() and os.environ.get("CUDA_VISIBLE_DEVICES") != ""
    everyone: list[Place] = [None] * size  # type: ignore[list-item]
    dist.all_gather_object(everyone, Place.mine(torch.cuda.current_device() if on_gpu else None), group=group)
    found = problem(everyone, size)
    if found:
        raise ValueError(f"{found} (ranks of the group: {dist.get_process_group_ranks(group)} of the job)")
    _checked.add(id(group))

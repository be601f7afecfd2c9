"""Where ranks sit: groups across NVLink domains, GPUs used twice, GPUs that cannot reach each other."""

from __future__ import annotations

import os
import socket

import pytest
import torch.distributed as dist

from megamoe_train import placement
from megamoe_train.placement import Place
from tests.distributed import run_ranks


def gpus(*domains: str) -> list[Place]:
    """Ranks on these hosts, each with a GPU of its own that reaches the others of its host."""
    numbers = [domains[:rank].count(domain) for rank, domain in enumerate(domains)]
    return [
        Place(domain, f"GPU-{rank}", number, tuple(n for n in range(domains.count(domain)) if n != number))
        for rank, (domain, number) in enumerate(zip(domains, numbers, strict=True))
    ]


@pytest.mark.parametrize("ep_size", [1, 2, 4])
def test_groups_inside_a_host_are_fine(ep_size):
    assert placement.problem(gpus(*"aaaabbbb"), ep_size) is None


@pytest.mark.parametrize(
    ("domains", "ep_size", "where"),
    [
        ("aaaabbbb", 8, "the group of ranks 0-7 spans NVLink domains: ranks 0-3 on a; ranks 4-7 on b."),
        ("aabc", 2, "the group of ranks 2-3 spans NVLink domains: rank 2 on b; rank 3 on c."),
        ("abab", 4, "the group of ranks 0-3 spans NVLink domains: ranks 0, 2 on a; ranks 1, 3 on b."),
    ],
)
def test_a_group_across_hosts_names_who_sits_where(domains, ep_size, where):
    assert f"expert-model-parallel-size {ep_size}: {where}" in placement.problem(gpus(*domains), ep_size)


def test_two_ranks_on_one_gpu():
    places = gpus("a", "a")
    places[1] = Place("a", places[0].gpu, 0)
    assert placement.problem(places, 1) == "GPU GPU-0: ranks 0 and 1 both use it; start one process for each GPU"


def test_no_peer_access():
    places = gpus("a", "a", "a")
    places[2] = Place("a", "GPU-2", 2, (0,))
    assert placement.problem(places, 1) is None
    assert "rank 2 (GPU 2) cannot read the memory of rank 1 (GPU 1) on a: no peer access" in placement.problem(
        places, 3
    )
    # a process that is shown its own GPU alone cannot tell
    assert placement.problem([Place("a", f"GPU-{rank}", 0) for rank in range(3)], 3) is None


def test_a_domain_is_the_host_or_what_the_variable_says(monkeypatch):
    monkeypatch.delenv("MEGAMOE_NVLINK_DOMAIN", raising=False)
    assert Place.mine() == Place(socket.gethostname())
    monkeypatch.setenv("MEGAMOE_NVLINK_DOMAIN", "rack7")
    assert Place.mine() == Place("rack7")


def _errors(rank: int, ranks: int, port: int) -> list[str]:
    """What this rank is told, by the group and over the store, for several domains of two ranks."""
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(ranks), MASTER_ADDR="localhost", MASTER_PORT=str(port))
    told = []
    for domains in (("one", "one"), ("one", "other")):
        os.environ["MEGAMOE_NVLINK_DOMAIN"] = domains[rank]
        try:
            placement.check_group(dist.new_group(list(range(ranks))))
            told.append("fine")
        except ValueError as error:
            told.append(str(error))
    try:
        placement.meet(1, Place("one"), refused="the GPU is taken" if rank == 1 else None, timeout_s=60)
    except ValueError as error:
        told.append(str(error))
    return told


def test_every_rank_gets_the_same_error():
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    first, second = run_ranks(_errors, 2, port)
    assert first == second
    assert first[0] == "fine"
    assert "rank 0 on one; rank 1 on other" in first[1] and "[0, 1] of the job" in first[1]
    assert first[2] == "rank 1: the GPU is taken"

"""What the plan and the reference ask of a process group. `group=None` is a group of one: no call is made."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor


def size_of(group: dist.ProcessGroup | None) -> int:
    """Number of ranks; 1 for `group=None`."""
    return 1 if group is None else dist.get_world_size(group)


def rank_in(group: dist.ProcessGroup | None) -> int:
    """This process's rank in `group`; 0 for `group=None`. Raises ValueError where it is no member."""
    if group is None:
        return 0
    rank = dist.get_rank(group)
    if rank < 0:
        raise ValueError("group: this process is not a member of the one given; allowed: None or a group it is in")
    return rank


def gather(vector: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """`vector [n]` of every rank as `[R, n]`, on every rank. All ranks must bring the same n."""
    ranks = size_of(group)
    if ranks == 1:
        return vector[None]
    parts = [torch.empty_like(vector) for _ in range(ranks)]
    dist.all_gather(parts, vector.contiguous(), group=group)
    return torch.stack(parts)


def exchange(values: Tensor, send: list[int], receive: list[int], group: dist.ProcessGroup | None) -> Tensor:
    """All-to-all of rows: `values [sum(send), ...]`, rows for rank 0 first, becomes `[sum(receive), ...]`, rows of
    rank 0 first. `send[r]` and `receive[r]` are the rows that go to and come from rank r."""
    if size_of(group) == 1:
        return values
    received = values.new_empty((sum(receive), *values.shape[1:]))
    dist.all_to_all_single(received, values.contiguous(), receive, send, group=group)
    return received

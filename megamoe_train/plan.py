"""RoutingPlan: which row of which rank every routed slot becomes. The torch twin of the plan kernel.

A stable counting sort, made of prefix sums only, so that equal ids give equal bits on any number of processes and
threads. The rows of an expert lie on the rank that owns it, in the order (source rank, token, k), and every expert's
segment begins at a multiple of ROW_TILE rows.

Letters: T tokens on this rank, K experts per token, E experts in all, R ranks, L = E/R local experts, M rows held by
this rank's experts (segments padded to ROW_TILE). A *slot* is one (token, k); its flat number is `t * K + k`.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
import torch.distributed as dist
from torch import Tensor

from . import comm

ROW_TILE = 128
SOURCE_SHIFT = 40  # source_of = source rank << 40 | flat slot; -1 = padding
DROPPED = -1


@dataclass(frozen=True, eq=False)
class RoutingPlan:
    """One rank's view of one routing. Built once; forward and backward use the same.

    counts, expert_rows and expert_offset live on the host (they give sizes); the others on the device of the ids.
    """

    rank: int
    ep_size: int
    num_experts: int
    top_k: int
    num_tokens: int
    counts: Tensor  # [R, E] int64, kept slots of source rank r for expert e
    slot_of: Tensor  # [T, K] int64, row at the owner of the expert; -1 = dropped
    topk_ids: Tensor  # [T, K] int64, global expert numbers; -1 = dropped
    expert_rows: Tensor  # [L] int64, rows of each local expert without padding
    expert_offset: Tensor  # [L+1] int64, first row of each local expert's segment; the last one is M
    source_of: Tensor  # [M] int64, source rank << 40 | t * K + k; -1 = padding

    def to_routing_plan(self) -> RoutingPlan:
        """Itself: what a plan of any backend can be turned into."""
        return self

    @property
    def num_local_experts(self) -> int:
        return self.num_experts // self.ep_size

    @property
    def first_expert(self) -> int:
        """Global number of this rank's first expert."""
        return self.rank * self.num_local_experts

    @cached_property
    def num_rows(self) -> int:
        """M: rows of this rank's experts, padding included."""
        return int(self.expert_offset[-1])

    @cached_property
    def segments(self) -> list[tuple[int, int]]:
        """(first row, end of the rows that hold a token) of each local expert."""
        starts = self.expert_offset[:-1]
        return list(zip(starts.tolist(), (starts + self.expert_rows).tolist(), strict=True))

    @cached_property
    def rows(self) -> Tensor:
        """`[sum(expert_rows)]` int64: the rows that hold a token, ascending."""
        return (self.source_of >= 0).nonzero().flatten()

    @cached_property
    def send_slots(self) -> Tensor:
        """Flat slots in the order in which they leave this rank: by owner, then by row at the owner."""
        slot_of, ids = self.slot_of.flatten(), self.topk_ids.flatten()
        kept = (slot_of >= 0).nonzero().flatten()
        owner = owner_of(ids[kept], self.num_local_experts)
        return kept[torch.argsort(owner << SOURCE_SHIFT | slot_of[kept])]

    @cached_property
    def receive_rows(self) -> Tensor:
        """Rows in the order in which they arrive at this rank: by source rank, then by row."""
        source_rank, _ = decode_source(self.source_of[self.rows])
        return self.rows[torch.argsort(source_rank, stable=True)]

    @cached_property
    def send_splits(self) -> list[int]:
        """Rows that leave for each rank, `[R]`."""
        return self.counts[self.rank].view(self.ep_size, -1).sum(1).tolist()

    @cached_property
    def receive_splits(self) -> list[int]:
        """Rows that arrive from each rank, `[R]`."""
        first = self.first_expert
        return self.counts[:, first : first + self.num_local_experts].sum(1).tolist()


def is_kept(topk_ids: Tensor) -> Tensor:
    """True where a slot takes part in the routing: same shape as `topk_ids`."""
    return topk_ids >= 0


def owner_of(ids: Tensor, num_local_experts: int) -> Tensor:
    """Rank that owns each (kept) expert number."""
    return ids // num_local_experts


def decode_source(source_of: Tensor) -> tuple[Tensor, Tensor]:
    """(source rank, flat slot t * K + k) of rows that hold a token."""
    return source_of >> SOURCE_SHIFT, source_of & ((1 << SOURCE_SHIFT) - 1)


def segment_offsets(counts: Tensor, ep_size: int) -> Tensor:
    """`counts [R, E]` -> `[R, L+1]`: first row of each expert's segment at its owner, and M of that owner last."""
    rows = counts.sum(0).view(ep_size, -1)
    padded = (rows + ROW_TILE - 1) // ROW_TILE * ROW_TILE
    return torch.nn.functional.pad(padded.cumsum(1), (1, 0))


def build_plan(topk_ids: Tensor, num_experts: int, *, group: dist.ProcessGroup | None = None) -> RoutingPlan:
    """The plan of this rank for `topk_ids [T, K]` int (global expert numbers, -1 = dropped). Collective over `group`.

    T may differ between ranks (0 included); K and num_experts may not. Reads the counts on the host.
    Raises ValueError for a shape or dtype here; on every rank alike for ids outside [-1, num_experts) on any of them,
    and for ranks that disagree.
    """
    ranks, rank = comm.size_of(group), comm.rank_in(group)
    _check_local(topk_ids, num_experts, ranks)
    ids = topk_ids.to(torch.int64, copy=True)  # the plan is its own, whatever the caller does with the ids
    _check_everywhere(comm.gather(_summary(ids, num_experts), group).tolist())
    by_expert = _by_expert(ids, num_experts)
    counts = comm.gather(_counts(ids, num_experts), group).cpu()
    send = counts[rank].view(ranks, -1).sum(1).tolist()
    local = counts[:, _local_experts(rank, counts)]
    codes = comm.exchange(by_expert | rank << SOURCE_SHIFT, send, local.sum(1).tolist(), group)
    return _assemble(rank, ids, by_expert, counts, codes)


def plans_of(topk_ids_per_rank: list[Tensor], num_experts: int) -> list[RoutingPlan]:
    """The plans of all ranks from one process, the same bits as `build_plan` over a group of that many ranks."""
    ranks = len(topk_ids_per_rank)
    for ids in topk_ids_per_rank:
        _check_local(ids, num_experts, ranks)
    ids_of = [ids.to(torch.int64, copy=True) for ids in topk_ids_per_rank]
    _check_everywhere([_summary(ids, num_experts).tolist() for ids in ids_of])
    by_expert = [_by_expert(ids, num_experts) for ids in ids_of]
    counts = torch.stack([_counts(ids, num_experts) for ids in ids_of]).cpu()
    sends = counts.view(ranks, ranks, -1).sum(2).tolist()
    parts = [(slots | r << SOURCE_SHIFT).split(sends[r]) for r, slots in enumerate(by_expert)]
    return [
        _assemble(rank, ids_of[rank], by_expert[rank], counts, torch.cat([part[rank] for part in parts]))
        for rank in range(ranks)
    ]


def _assemble(rank: int, ids: Tensor, by_expert: Tensor, counts: Tensor, codes: Tensor) -> RoutingPlan:
    """`by_expert`: this rank's kept slots, expert by expert; `codes`: those that arrived, source by source."""
    ranks, num_experts = counts.shape
    offsets = segment_offsets(counts, ranks)
    # First row of (source rank r, expert e) at e's owner: the segment, then the rows of the sources before r.
    first_row = offsets[:, :-1].reshape(1, -1) + counts.cumsum(0) - counts
    slot_of = torch.full((ids.numel(),), DROPPED, dtype=torch.int64, device=ids.device)
    slot_of[by_expert] = _runs(first_row[rank], counts[rank], ids.device)
    mine = _local_experts(rank, counts)
    source_of = torch.full((int(offsets[rank, -1]),), -1, dtype=torch.int64, device=ids.device)
    source_of[_runs(first_row[:, mine].flatten(), counts[:, mine].flatten(), ids.device)] = codes
    return RoutingPlan(
        rank=rank,
        ep_size=ranks,
        num_experts=num_experts,
        top_k=ids.shape[1],
        num_tokens=ids.shape[0],
        counts=counts,
        slot_of=slot_of.view_as(ids),
        topk_ids=ids,
        expert_rows=counts[:, mine].sum(0),
        expert_offset=offsets[rank].clone(),
        source_of=source_of,
    )


def _local_experts(rank: int, counts: Tensor) -> slice:
    ranks, num_experts = counts.shape
    return slice(rank * (num_experts // ranks), (rank + 1) * (num_experts // ranks))


def _runs(starts: Tensor, lengths: Tensor, device: torch.device) -> Tensor:
    """Concatenation of `starts[i], starts[i] + 1, ...`, `lengths[i]` numbers each."""
    before = lengths.cumsum(0) - lengths
    return (torch.repeat_interleave(starts - before, lengths) + torch.arange(int(lengths.sum()))).to(device)


def _by_expert(ids: Tensor, num_experts: int) -> Tensor:
    """Flat numbers of the kept slots in the order (expert, token, k)."""
    key = torch.where(is_kept(ids), ids, num_experts).flatten()
    return torch.argsort(key, stable=True)[: int((key < num_experts).sum())]


def _counts(ids: Tensor, num_experts: int) -> Tensor:
    return torch.bincount(ids[is_kept(ids)], minlength=num_experts)


def _summary(ids: Tensor, num_experts: int) -> Tensor:
    """What the ranks must know of each other before they exchange anything: E, K, lowest and highest id."""
    low, high = (int(ids.min()), int(ids.max())) if ids.numel() else (DROPPED, DROPPED)
    return torch.tensor([num_experts, ids.shape[1], low, high], device=ids.device)


def _check_local(ids: Tensor, num_experts: int, ranks: int) -> None:
    if ids.dim() != 2 or ids.shape[1] < 1:
        raise ValueError(f"topk_ids: got shape {tuple(ids.shape)}; allowed: [T, K] with K >= 1")
    if ids.dtype not in (torch.int16, torch.int32, torch.int64):
        raise ValueError(f"topk_ids: got dtype {ids.dtype}; allowed: int16, int32, int64")
    if num_experts < 1 or num_experts % ranks:
        raise ValueError(f"num_experts: got {num_experts}; allowed: a positive multiple of the {ranks} EP ranks")


def _check_everywhere(summaries: list[list[int]]) -> None:
    """Every rank sees the summaries of all, so that all raise the same error and none is left waiting."""
    for rank, (num_experts, top_k, low, high) in enumerate(summaries):
        for name, got, first in (("num_experts", num_experts, summaries[0][0]), ("top-k", top_k, summaries[0][1])):
            if got != first:
                raise ValueError(f"{name}: rank {rank} of the EP group has {got}, rank 0 has {first}; they must agree")
        bad = low if low < DROPPED else high
        if bad < DROPPED or bad >= num_experts:
            allowed = f"-1 (dropped) and 0..{num_experts - 1}"
            raise ValueError(f"topk_ids: got expert {bad} on rank {rank}; allowed: {allowed}")

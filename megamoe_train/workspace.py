"""The symmetric workspace of an expert-parallel group: its size, its memory, who may write where (csrc/layout/).

One Workspace per EP group, made once at model build; collective where the group has several ranks. Letters: T most
tokens of a rank, K top-k, E experts in all, R ranks, H hidden.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
import torch.distributed as dist
from torch import Tensor

from . import comm, extension, ops, versions, watchdog
from .config import HIDDEN_MULTIPLE, MAX_TOP_K, MegaMoEConfig, check_choice
from .plan import ROW_TILE
from .verdicts import Verdicts

ALIGNMENT = 1024
STAGING_BUFFERS = 2
READY_SLOTS = 4
STATE_WORDS = 5 + STAGING_BUFFERS
HEADER_INTS = 8
MAX_RANKS = 64
MAX_EXPERTS = 1024
ABORT_S = 1.0  # for the peers to be told
SIZINGS = ("high_water", "fixed", "exact")
LAYOUT_VERSION = 4  # to be raised with any change of csrc/layout/workspace.cuh


@dataclass(frozen=True)
class Shape:
    """What fixes the layout. The same on every rank of the group."""

    ranks: int  # R
    experts: int  # E
    top_k: int  # K
    hidden: int  # H
    tokens: int  # T: the most tokens any rank brings to one call

    @classmethod
    def of(cls, config: MegaMoEConfig, tokens: int) -> Shape:
        return cls(config.ep_size, config.num_experts, config.top_k, config.hidden_size, tokens)

    def validate(self) -> None:
        """Raises ValueError naming the field, its value and what is allowed."""
        rules = {
            "ranks": (1 <= self.ranks <= MAX_RANKS, f"1..{MAX_RANKS}"),
            "experts": (
                0 < self.experts <= MAX_EXPERTS and self.experts % max(self.ranks, 1) == 0,
                f"a multiple of the {self.ranks} ranks, at most {MAX_EXPERTS}",
            ),
            "top_k": (1 <= self.top_k <= MAX_TOP_K, f"1..{MAX_TOP_K}"),
            "hidden": (self.hidden > 0 and self.hidden % HIDDEN_MULTIPLE == 0, f"a multiple of {HIDDEN_MULTIPLE}"),
            "tokens": (
                self.tokens >= 0 and self.ranks * self.tokens * self.top_k + 128 * self.experts < 2**31,
                ">= 0 with ranks * tokens * top_k + 128 * experts < 2^31",
            ),
        }
        for name, (good, allowed) in rules.items():
            if not good:
                raise ValueError(f"{name}: got {getattr(self, name)}; allowed: {allowed}")


@dataclass(frozen=True)
class Layout:
    """First byte of each region, and the bytes in all: workspace_layout() of csrc/layout/workspace.cuh."""

    state: int  # u64 [STATE_WORDS]
    abort: int  # u64 [1]
    counted: int  # u64 [R]
    listed: int  # u64 [R]
    ready: int  # u64 [READY_SLOTS, R]
    pulled: int  # u64 [2, R]
    pushed: int  # u64 [R]
    staged: int  # u64 [R]
    counts: int  # i32 [2, R, E + header]
    row_sources: int  # i32 [2, T*K]
    weights: int  # f32 [2, T*K]
    dweights: int  # f32 [T*K]
    staging: int  # bf16 [2, T, H]
    slots: int  # bf16 [K, T, H]
    tile_flags: int  # u32 [R, tiles]
    bytes: int

    def offsets(self) -> list[int]:
        return [getattr(self, field.name) for field in fields(self)]


def layout_of(shape: Shape) -> Layout:
    """Pure: the offsets that csrc/layout/workspace.cuh computes for the same shape."""
    flat, row = shape.tokens * shape.top_k, 2 * shape.hidden
    stride = -(-(shape.experts + HEADER_INTS) // 32) * 32
    tiles = -(-shape.ranks * flat // ROW_TILE) + shape.experts // shape.ranks
    sizes = {
        "state": 8 * STATE_WORDS,
        "abort": 8,
        "counted": 8 * shape.ranks,
        "listed": 8 * shape.ranks,
        "ready": 8 * READY_SLOTS * shape.ranks,
        "pulled": 8 * STAGING_BUFFERS * shape.ranks,
        "pushed": 8 * shape.ranks,
        "staged": 8 * shape.ranks,
        "counts": 4 * 2 * shape.ranks * stride,
        "row_sources": 4 * 2 * flat,
        "weights": 4 * STAGING_BUFFERS * flat,
        "dweights": 4 * flat,
        "staging": STAGING_BUFFERS * shape.tokens * row,
        "slots": shape.top_k * shape.tokens * row,
        "tile_flags": 4 * shape.ranks * tiles,
    }
    offsets, end = {}, 0
    for name, size in sizes.items():
        offsets[name] = end
        end += -(-size // ALIGNMENT) * ALIGNMENT
    return Layout(**offsets, bytes=end)


def bytes_needed(config: MegaMoEConfig, tokens: int) -> int:
    """Bytes of one rank's workspace for up to `tokens` tokens a call. Pure; raises ValueError for a bad shape."""
    shape = Shape.of(config, tokens)
    shape.validate()
    return layout_of(shape).bytes


def check_agreement(shape: Shape, group: dist.ProcessGroup | None, device: torch.device, **more: int) -> None:
    """Collective. Raises the same ValueError on every rank, naming rank and field, where the ranks differ."""
    mine = {field.name: getattr(shape, field.name) for field in fields(shape)} | more
    mine |= {"layout version": LAYOUT_VERSION, "torch version": _number(torch.__version__)}
    mine |= {"package version": _number(versions.__version__)}
    everyone = comm.gather(torch.tensor(list(mine.values()), dtype=torch.int64, device=device), group).tolist()
    for index, name in enumerate(mine):
        for rank, theirs in enumerate(everyone):
            if theirs[index] != everyone[0][index]:
                got, first = theirs[index], everyone[0][index]
                raise ValueError(
                    f"workspace {name}: rank {rank} of the EP group has {got}, rank 0 has {first}; they must agree"
                )


def _number(version: str) -> int:
    """2.11.0+cu130 -> 2011000."""
    parts = [int("".join(filter(str.isdigit, part)) or 0) for part in version.split("+")[0].split(".")[:3]]
    return sum(part * 1000 ** (2 - i) for i, part in enumerate(parts))


class Workspace:
    """One rank's view: its own memory, the addresses of all, and where waits and plans report to the host.

    `Workspace.create` for a real group (or EP = 1, `group=None`), `virtual_ranks` for several on one GPU.
    """

    def __init__(self, shape: Shape, rank: int, memory: Tensor, bases: Tensor, *, deadline_s: float, owner=None):
        self.shape, self.rank, self.memory, self.bases = shape, rank, memory, bases
        self.layout = layout_of(shape)
        self.owner = owner  # what keeps peers' memory mapped
        self.group: dist.ProcessGroup | None = None
        self.closed = False
        self.guard = watchdog.Guard(rank, pinned=memory.is_cuda)
        self.sizing, self.capacity = "high_water", 0  # how many rows pools are allocated for; see create
        self.high_water = 0  # rows that pools are allocated for
        self.most_rows = 0  # M of the largest load so far
        self.verdicts = Verdicts(pinned=memory.is_cuda)
        self.handle = torch.tensor(
            [
                bases.data_ptr(), rank, shape.ranks, shape.experts, shape.top_k, shape.hidden, shape.tokens,
                int(deadline_s * 1e9), self.guard.record.data_ptr(),
            ],
            dtype=torch.int64,
        )  # fmt: skip
        check_layout(shape)
        if memory.is_cuda:
            with torch.cuda.device(memory.device):
                torch.ops.megamoe.preload_kernels()

    @classmethod
    def create(
        cls, shape: Shape, *, group: dist.ProcessGroup | None = None, device: torch.device | str = "cuda",
        deadline_s: float = ops.DEFAULT_DEADLINE_S, sizing: str = "high_water", capacity: int = 0,
    ) -> Workspace:  # fmt: skip
        """Allocates and, with a group, meets the peers. Collective over `group`.

        Rows of a rank's experts have no bound but memory; `sizing` says how many each call allocates room for:
        "high_water": as many as the largest load so far needed, and a little more. A larger one is found on the
        device, skipped by all ranks, and launched again. "fixed": `capacity` rows. The host reads nothing, so that
        CUDA graphs can capture the call; too small is an error (`check_workspace` raises it, or the next call).
        "exact": the host waits for the counts before it allocates and launches.

        Raises ValueError on every rank alike for ranks that disagree on the shape or on versions.
        """
        device = torch.device(device)
        check_sizing(sizing, capacity)
        check_agreement(shape, group, device, sizing=SIZINGS.index(sizing), capacity=capacity)
        workspace = cls._meet(shape, group, device, deadline_s)
        workspace.sizing, workspace.capacity = sizing, capacity
        return workspace

    @classmethod
    def _meet(cls, shape: Shape, group: dist.ProcessGroup | None, device: torch.device, deadline_s: float) -> Workspace:
        if comm.size_of(group) != shape.ranks:
            raise ValueError(f"ranks: got {shape.ranks}; allowed: the size of the group, {comm.size_of(group)}")
        shape.validate()
        size = layout_of(shape).bytes
        if shape.ranks == 1:
            memory = torch.zeros(size, dtype=torch.uint8, device=device)
            return cls(shape, 0, memory, _addresses([memory.data_ptr()], device), deadline_s=deadline_s)
        from torch.distributed import _symmetric_memory as symmetric

        memory = symmetric.empty(size, dtype=torch.uint8, device=device)
        memory.zero_()
        torch.cuda.synchronize(device)
        handle = symmetric.rendezvous(memory, group)
        dist.barrier(group)  # nobody signals before every rank's words are zero
        bases = _addresses(list(handle.buffer_ptrs), device)
        workspace = cls(shape, comm.rank_in(group), memory, bases, deadline_s=deadline_s, owner=handle)
        workspace.group = group
        return workspace

    @classmethod
    def virtual_ranks(cls, shape: Shape, *, device: str = "cuda", deadline_s: float = 5.0) -> list[Workspace]:
        """All ranks of a group in this process, on one GPU: for tests."""
        shape.validate()
        memories = [torch.zeros(layout_of(shape).bytes, dtype=torch.uint8, device=device) for _ in range(shape.ranks)]
        bases = _addresses([memory.data_ptr() for memory in memories], torch.device(device))
        return [
            cls(shape, r, memory, bases, deadline_s=deadline_s, owner=memories) for r, memory in enumerate(memories)
        ]

    def region(self, name: str, dtype: torch.dtype, *size: int) -> Tensor:
        """A view of one region of this rank's own memory. Kernels may be writing it: for tests and debugging."""
        begin = getattr(self.layout, name)
        return self.memory[begin:].view(dtype)[: int(torch.Size(size).numel())].view(size)

    def launching(self) -> _Launching:
        """Around one rank's part of a collective call. A rank that fails in it (out of memory) ends the others' waits
        at once, by name; what follows a failed wait of its own is raised as MegaMoETimeout."""
        return _Launching(self)

    def abort(self) -> None:
        """This rank's host has failed: every wait of every rank ends at once. Nothing works afterwards.

        Returns when the peers have been told, or after a second: the process may end then.
        """
        ops.load()
        stream = torch.cuda.Stream(self.memory.device)
        torch.ops.megamoe.abort_peers(self.handle, stream.cuda_stream)
        limit = time.monotonic() + ABORT_S
        while not stream.query() and time.monotonic() < limit:
            time.sleep(1e-3)

    def close(self) -> None:
        """Gives the memory back. Collective: no rank unmaps what another may still touch. Safe to call twice."""
        if self.closed:
            return
        self.closed = True
        torch.cuda.synchronize(self.memory.device)
        if self.group is not None:
            dist.barrier(self.group)
        self.guard.stop()
        self.memory = self.bases = self.owner = None


class _Launching:
    """Workspace.launching."""

    __slots__ = ("watch", "workspace")

    def __init__(self, workspace: Workspace):
        self.workspace, self.watch = workspace, workspace.guard.watch()

    def __enter__(self) -> None:
        self.watch.__enter__()

    def __exit__(self, kind, error: BaseException | None, trace) -> None:
        workspace = self.workspace
        failed_here = isinstance(error, Exception) and not isinstance(error, watchdog.MegaMoETimeout)
        if failed_here and workspace.shape.ranks > 1 and workspace.guard.failure() is None:
            try:
                workspace.abort()
            finally:
                self.watch.__exit__(kind, error, trace)
            return
        self.watch.__exit__(kind, error, trace)


def check_sizing(sizing: str, capacity: int) -> None:
    """Raises ValueError naming the field, its value and what is allowed."""
    check_choice("sizing", sizing, SIZINGS)
    if (capacity > 0) != (sizing == "fixed") or capacity % ROW_TILE:
        allowed = f'with sizing="fixed" a multiple of {ROW_TILE} above 0, else 0'
        raise ValueError(f"capacity: got {capacity} with sizing={sizing!r}; allowed: {allowed}")


def _addresses(pointers: Sequence[int], device: torch.device) -> Tensor:
    return torch.tensor(pointers, dtype=torch.int64).to(device)


def check_layout(shape: Shape) -> None:
    """Raises RuntimeError where the built extension lays the workspace out differently: it is of another version."""
    ops.load()
    built = torch.empty(len(fields(Layout)), dtype=torch.int64)
    request = torch.tensor([shape.ranks, shape.experts, shape.top_k, shape.hidden, shape.tokens])
    torch.ops.megamoe.workspace_layout(request, built)
    if built.tolist() != layout_of(shape).offsets():
        raise RuntimeError(
            f"{extension.built_files()[0].name} lays out the workspace differently: rebuild the extension"
        )

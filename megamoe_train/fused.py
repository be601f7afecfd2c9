"""The fused backend: one kernel forward, one backward, on CUDA tensors of any group whose ranks share a Workspace.

Nothing here is a collective of torch.distributed, and the host reads one pinned word per forward (none in the fixed
mode): ids and whether all rows fit are judged on the device. Letters as in plan.py.
"""

from __future__ import annotations

import struct
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from . import ops, ops_fused, plain, reference
from .agreement import wants
from .config import HIDDEN_MULTIPLE, INTERMEDIATE_MULTIPLE, MAX_TOP_K
from .experts import StackedExperts, places_of
from .fused_plan import FusedPlan, workspace_for
from .launch_order import in_order
from .plan import RoutingPlan
from .workspace import Workspace

ALIGNMENT = 16  # bytes, of every row that a bulk copy moves and every matrix that a tensor map describes
NO_GRADIENT = reference.Need(False, False, False, False)
CACHED_LAYERS = 1024
CACHED_GRADIENTS = 512
Entry = TypeVar("Entry")
Group = dist.ProcessGroup | None


class _Recent:
    """The most recently used tables of device memory, each made once for a key that says all that is in it."""

    def __init__(self, most: int):
        self.most, self.entries = most, OrderedDict()
        self.captured: list = []  # a graph reads its tables at every replay: these are never freed

    def get(self, key: Hashable, device: torch.device, make: Callable[[], Entry]) -> Entry:
        capturing, stream = torch.cuda.is_current_stream_capturing(), ops.raw_stream(device)
        key = key, device.index
        entry, home = self.entries.get(key, (None, None))
        if entry is None:
            if capturing:
                raise RuntimeError(
                    "tensor maps of weights or gradients would have to be made while a CUDA graph is captured: call "
                    "once before capturing, with the same weights, and with a wgrad_sink whose buffers stay"
                )
            entry = make()
            self.entries[key] = entry, stream
        elif capturing:
            self.captured.append(entry)
        elif home != stream:  # its memory may be given out again only after this use
            entry.table.record_stream(torch.cuda.current_stream(device))
        self.entries.move_to_end(key)
        if len(self.entries) > self.most:
            self.entries.popitem(last=False)
        return entry


def bf16_holds(number: float) -> bool:
    """Whether rounding to bf16, the upper half of an fp32, leaves the number as it is."""
    try:
        bits = struct.pack("<f", number)
    except OverflowError:
        return False
    return bits[:2] == b"\0\0" and struct.unpack("<f", bits)[0] == number


class FusedBackend:
    """backends.Backend on the kernels of ops_fused."""

    name = "fused"
    backward_once = True
    writes_bf16 = True

    def __init__(self):
        self._maps, self._tables = _Recent(CACHED_LAYERS), _Recent(CACHED_GRADIENTS)

    def check(
        self, x: Tensor, topk_ids: Tensor, weights: Tensor, fc1: tuple[Tensor, ...], fc2: tuple[Tensor, ...],
        *, clamp: float | None,
    ) -> None:  # fmt: skip
        """What the kernels take. Raises ValueError."""
        inner, (hidden, top_k) = fc2[0].shape[-1], (x.shape[1], topk_ids.shape[1])
        if x.dtype != torch.bfloat16:
            raise ValueError(f'x: got dtype {x.dtype}; allowed: torch.bfloat16 (any float with backend="reference")')
        for name, value, multiple in (("H", hidden, HIDDEN_MULTIPLE), ("I", inner, INTERMEDIATE_MULTIPLE)):
            if value == 0 or value % multiple:
                allowed = f'a multiple of {multiple} (any with backend="reference")'
                raise ValueError(f"{name}: got {value}; allowed: {allowed}")
        if not 1 <= top_k <= MAX_TOP_K:
            raise ValueError(f'top_k: got {top_k}; allowed: 1..{MAX_TOP_K} (any with backend="reference")')
        if topk_ids.dtype not in (torch.int16, torch.int32, torch.int64):
            raise ValueError(f"topk_ids: got dtype {topk_ids.dtype}; allowed: int16, int32, int64")
        if clamp is not None and not bf16_holds(clamp):
            raise ValueError(f"clamp: got {clamp}; allowed: None or a number that bf16 holds exactly, as h is bf16")
        for name, experts in (("fc1", fc1), ("fc2", fc2)):
            for number, expert in enumerate(experts):
                if not _is_plain(expert):
                    where = name if expert.dim() == 3 else f"{name}[{number}]"
                    got = f"strides {tuple(expert.stride())} at address {expert.data_ptr():#x}"
                    raise ValueError(f"{where}: got {got}; allowed: contiguous, {ALIGNMENT}-byte aligned")

    def plan(
        self, topk_ids: Tensor, num_experts: int, group: Group, workspace: Workspace | None, *, hidden_size: int
    ) -> FusedPlan:
        """Collective over the group of the workspace. workspace None: with one rank, a shared one."""
        return FusedPlan.build(workspace_for(workspace, topk_ids, num_experts, hidden_size, group), topk_ids)

    def accept(
        self, plan: FusedPlan | RoutingPlan, topk_ids: Tensor, num_experts: int, group: Group,
        workspace: Workspace | None, *, hidden_size: int,
    ) -> FusedPlan:  # fmt: skip
        """A plan that the caller has. A RoutingPlan is built again on the device, from its ids."""
        if isinstance(plan, RoutingPlan):
            return self.plan(plan.topk_ids, num_experts, group, workspace, hidden_size=hidden_size)
        if workspace is not None and workspace is not plan.workspace:
            raise ValueError("workspace: got another one than the plan's; allowed: None or that one")
        workspace_for(plan.workspace, topk_ids, num_experts, hidden_size, group)
        return plan

    def need(self, x: Tensor, weights: Tensor, fc1: tuple[Tensor, ...], fc2: tuple[Tensor, ...], **_) -> reference.Need:
        """What this rank wants; the others may want something else."""
        if not torch.is_grad_enabled():
            return NO_GRADIENT
        return reference.Need(x.requires_grad, weights.requires_grad, wants(fc1), wants(fc2))

    def forward(
        self, x: Tensor, plan: FusedPlan, weights: Tensor, fc1: list[Tensor], fc2: list[Tensor],
        *, clamp: float | None, group: Group,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """y `[T,H]`, h `[capacity,2I]`, of which the plan's M rows are written."""
        with plan.workspace.launching():  # peers wait from the plan on
            maps, x, p = self._maps_of(fc1, fc2, x.device), _rows(x), _fp32(weights)
        with plan.workspace.guard.watch(), in_order(x.device) as stream:
            done = plan.run(lambda device_plan: ops_fused.forward(device_plan, x, p, maps, clamp=clamp))
        plain.remember(plan.workspace, group, fc1, fc2, maps, clamp, stream)
        return done

    def backward(
        self, dy: Tensor, x: Tensor, h: Tensor | None, plan: FusedPlan, weights: Tensor,
        fc1: list[Tensor], fc2: list[Tensor], *, clamp: float | None, group: Group, need: reference.Need,
        dfc1: list[Tensor | None] | None, dfc2: list[Tensor | None] | None, overwrite: tuple[bool, bool],
    ) -> reference.Grads:  # fmt: skip
        """Gradients into dfc1, dfc2 where any is wanted; `overwrite`: they hold nothing yet. All fp32, or where none
        holds anything, all bf16."""
        device_plan = plan.device_plan
        with plan.workspace.launching():
            maps = self._maps_of(fc1, fc2, x.device)
            x, dy, p = _rows(x), _rows(dy if dy.dtype == x.dtype else dy.to(x.dtype)), _fp32(weights)
            # Ranks cannot know whether another one has frozen fc1. Where there are several, each stages x and pulls it,
            # and one that wants no dfc1 has it computed into a spare matrix.
            dfc1, dfc2 = dfc1 if need.fc1 else None, dfc2 if need.fc2 else None
            dtype = _dtype_of(dfc1, dfc2)
            if dtype != torch.float32 and not (dtype == torch.bfloat16 and all(overwrite)):
                raise ValueError(f"wgrad_sink: got a buffer of {dtype}; allowed: {torch.float32}, which is added to")
            first = _Targets(dfc1, fc1, overwrite[0], dtype, always=plan.ep_size > 1)
            second = _Targets(dfc2, fc2, overwrite[1], dtype)
            tables = self._table_of(first, x.device), self._table_of(second, x.device)
        with in_order(x.device) as stream:
            if h is None:
                h = ops_fused.fc1_again(device_plan, x, p, maps)
            dx, dweights = ops_fused.backward(
                device_plan, dy, x, h, p, maps, *tables,
                clamp=clamp, accumulate1=first.accumulate, accumulate2=second.accumulate,
            )  # fmt: skip
        first.deliver()
        second.deliver()
        if first.whole_adds and second.whole_adds:
            plain.remember_gradients(first.buffers, second.buffers, *tables, stream)
        return reference.Grads(
            dx=dx if need.x else None,
            dweights=dweights if need.weights else None,
            dfc1=dfc1,
            dfc2=dfc2,
        )

    def _maps_of(self, fc1: Sequence[Tensor], fc2: Sequence[Tensor], device: torch.device) -> ops_fused.WeightMaps:
        """A layer's tensor maps, others where any of its weights has moved."""
        key = places_of(fc1), places_of(fc2)
        return self._maps.get(key, device, lambda: ops_fused.WeightMaps.of(fc1, fc2))

    def _table_of(self, targets: _Targets, device: torch.device) -> ops.GradientTable | None:
        buffers = targets.buffers
        if buffers is None:
            return None
        return self._tables.get(places_of(buffers), device, lambda: ops.GradientTable.of(buffers))


class _Targets:
    """The buffers of one weight kind that the kernel writes: those given, or stand-ins where it cannot write them."""

    def __init__(
        self, given: Sequence[Tensor | None] | None, weights: Sequence[Tensor], overwrite: bool,
        dtype: torch.dtype, *, always: bool = False,
    ):  # fmt: skip
        whole = isinstance(given, StackedExperts) and _is_plain(given.stack)
        nothing = not whole and (given is None or all(buffer is None for buffer in given))
        self.accumulate = not overwrite and not nothing
        self.all_given = whole or not (given is None or any(buffer is None for buffer in given))
        self.stand_ins: list[tuple[Tensor, Tensor]] = []  # (given, what was written in its place)
        self.buffers: Sequence[Tensor] | None = None
        if whole:
            self.buffers = given
            return
        if nothing and not always:
            return
        given = [None] * len(weights) if nothing else given
        spare = None  # takes the gradients of frozen experts, which nobody reads
        self.buffers = []
        for buffer, weight in zip(given, weights, strict=True):
            if buffer is None:
                spare = torch.empty(weight.shape, dtype=dtype, device=weight.device) if spare is None else spare
                self.buffers.append(spare)
            elif _is_plain(buffer):
                self.buffers.append(buffer)
            else:
                # TMA writes neither strided nor unaligned matrices: a fresh one takes the gradient of this call and
                # is added (or copied) afterwards, at the price of its memory and one more pass over it.
                fresh = torch.empty if overwrite else torch.zeros
                self.stand_ins.append((buffer, fresh(weight.shape, dtype=dtype, device=weight.device)))
                self.buffers.append(self.stand_ins[-1][1])

    @property
    def whole_adds(self) -> bool:
        """Whether the kernel adds to given buffers, of every expert."""
        return self.accumulate and not self.stand_ins and self.all_given

    def deliver(self) -> None:
        for given, stand_in in self.stand_ins:
            given.add_(stand_in) if self.accumulate else given.copy_(stand_in)


def _is_plain(matrix: Tensor) -> bool:
    """What a tensor map can describe."""
    return matrix.is_contiguous() and matrix.data_ptr() % ALIGNMENT == 0


def _dtype_of(*targets: Sequence[Tensor | None] | None) -> torch.dtype:
    """Of the gradients that a backward computes, fp32 where nobody wants any."""
    for given in targets:
        if isinstance(given, StackedExperts):
            return given.stack.dtype
        for buffer in given or ():
            if buffer is not None:
                return buffer.dtype
    return torch.float32


def _rows(rows: Tensor) -> Tensor:
    """Contiguous and aligned, a copy only where it must be."""
    rows = rows.contiguous()
    return rows if rows.data_ptr() % ALIGNMENT == 0 else rows.clone()


def _fp32(weights: Tensor) -> Tensor:
    return weights.float().contiguous()

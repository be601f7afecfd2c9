"""The plain call: what a layer does every step, launched by one operator a pass.

Before a launch the GPU is idle and peers wait, and most of what passes then is Python that finds neither its code nor
its data in a cache (docs/performance.md, "Host time of a call"). So once a layer has gone the long way, its next calls
hand their arguments straight to an operator, which compares them with what tensor maps were made for, allocates and
launches (csrc/bindings_fused.cpp: Plain). Objects, verdict and autograd follow while the GPU works. Where anything is
unusual nothing has been launched, and the call goes the long way, which also raises what there is to raise.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from . import fused_plan, ops, ops_fused, ops_plan
from .experts import StackedExperts
from .fused_plan import FusedPlan
from .launch_order import in_order
from .workspace import Workspace

REMEMBERED = 1024  # layers, and as many sets of gradients
Weights = Tensor | Sequence[Tensor]


@dataclass(slots=True)
class _Layer:
    """What the long way has found out about a layer."""

    workspace: Workspace
    is_shared: bool  # the workspace is one that callers do not bring
    clamp: float | None
    limit: float
    maps: ops_fused.WeightMaps
    addresses: Tensor  # int64 [2L] on the CPU: where the maps expect fc1 and fc2
    stream: int  # that the maps were made on


@dataclass(slots=True)
class _Gradients:
    """The same about the buffers that a layer's gradients are added to."""

    addresses: Tensor
    dfc1: Tensor  # ops.GradientTable's
    dfc2: Tensor
    stream: int


class PlainCalls:
    """What FusedBackend knows of layers, by one tensor of each: the operators find out where it is no longer true."""

    def __init__(self):
        self._layers: dict[int, _Layer] = {}
        self._gradients: dict[int, _Gradients] = {}

    def remember(
        self, workspace: Workspace, fc1: Sequence[Tensor], fc2: Sequence[Tensor], maps: ops_fused.WeightMaps,
        clamp: float | None, stream: int | None,
    ) -> None:  # fmt: skip
        """A layer whose forward has gone the long way on `stream`; fc1, fc2 as experts.per_expert gives them."""
        if stream is None:
            return
        limit, shared = ops_fused.limit_of(clamp), fused_plan.is_shared(workspace)
        layer = _Layer(workspace, shared, clamp, limit, maps, _addresses(fc1, fc2), stream)
        _keep(self._layers, _key(fc1), layer)

    def remember_gradients(
        self, dfc1: Sequence[Tensor], dfc2: Sequence[Tensor], table1: ops.GradientTable, table2: ops.GradientTable,
        stream: int | None,
    ) -> None:  # fmt: skip
        """Buffers that a backward has added to the long way."""
        if stream is None:
            return
        _keep(self._gradients, _key(dfc1), _Gradients(_addresses(dfc1, dfc2), table1.table, table2.table, stream))

    def forward(
        self, x: Tensor, ids: Tensor, weights: Tensor, fc1: Weights, fc2: Weights, *, clamp: float | None,
        group: dist.ProcessGroup | None, workspace: Workspace | None,
    ) -> tuple[FusedPlan, tuple[Tensor, Tensor]] | None:  # fmt: skip
        """The plan of these ids, and (y, h). None: not plain, nothing is launched."""
        fc1, fc2 = _as_tensors(fc1), _as_tensors(fc2)
        layer = self._layers.get(id(fc1[0])) if fc1 and fc2 else None
        if layer is None or clamp != layer.clamp or not _all_tensors((x, ids, weights)):
            return None
        home = layer.workspace
        if home.closed or group is not home.group or home.sizing == "exact":
            return None
        if workspace is not home and not (workspace is None and layer.is_shared):
            return None
        device = home.memory.device
        if x.device != device:
            return None
        with home.launching(), in_order(device) as stream, torch._C._AutoDispatchBelowAutograd():
            if stream != layer.stream:  # another one, or captured by a graph
                return None
            capacity, status = fused_plan.capacity_for(home, ids.numel()), home.next_status()
            done = torch.ops.megamoe.plan_and_forward(
                home.handle, x, ids, weights, fc1, fc2, layer.addresses, layer.maps.table, layer.maps.inter, capacity,
                status.data_ptr(), layer.limit, stream,
            )  # fmt: skip
        if not done:
            return None
        y, h, tables = done
        plan = FusedPlan(home, ids, ops_plan.DevicePlan(home, ids, capacity, status, tables, stream))

        def again(device_plan: ops_plan.DevicePlan) -> tuple[Tensor, Tensor]:
            return ops_fused.forward(device_plan, x, weights, layer.maps, clamp=clamp)

        with home.guard.watch(), torch.no_grad():
            return plan, plan.judged((y, h), again)

    def backward(
        self, first: Tensor, plan: FusedPlan, dy: Tensor, x: Tensor, h: Tensor | None, weights: Tensor,
        experts: Sequence[Tensor], buffers: Sequence[Tensor | None], *, clamp: float | None,
    ) -> tuple[Tensor, Tensor] | None:  # fmt: skip
        """dx, dweights; the experts' gradients are added to the buffers. None: not plain, nothing is launched.

        first: the tensor by which forward knew the layer. experts, buffers: fc1's tensors, then as many of fc2.
        """
        layer, gradients = self._layers.get(id(first)), self._gradients.get(id(buffers[0]))
        workspace, device_plan = plan.workspace, plan.device_plan
        if layer is None or gradients is None or h is None or not _all_tensors(buffers):
            return None
        if layer.workspace is not workspace or layer.clamp != clamp or device_plan.own_source_of is not None:
            return None
        n = len(experts) // 2
        with workspace.launching(), in_order(workspace.memory.device) as stream, torch._C._AutoDispatchBelowAutograd():
            if not stream == layer.stream == gradients.stream == device_plan.home:
                return None
            done = torch.ops.megamoe.plain_backward(
                workspace.handle, device_plan.capacity, device_plan.tables, dy, x, weights, h, layer.maps.table,
                experts[:n], experts[n:], layer.addresses, buffers[:n], buffers[n:], gradients.addresses,
                gradients.dfc1, gradients.dfc2, layer.limit, stream,
            )  # fmt: skip
        return tuple(done) if done else None


def _keep(table: dict[int, object], key: int, entry: object) -> None:
    if len(table) >= REMEMBERED:
        table.clear()
    table[key] = entry


def _key(matrices: Sequence[Tensor]) -> int:
    return id(matrices.stack if isinstance(matrices, StackedExperts) else matrices[0])


def _addresses(first: Sequence[Tensor], second: Sequence[Tensor]) -> Tensor:
    return ops.addresses([*first, *second])


def _as_tensors(weight: Weights) -> tuple[Tensor, ...] | Sequence[Tensor]:
    """As checks.as_tuple; empty where it is no such thing."""
    if isinstance(weight, Tensor):
        return (weight,)
    return weight if isinstance(weight, list | tuple) and _all_tensors(weight) else ()


def _all_tensors(values: Sequence) -> bool:
    return all(map(torch.is_tensor, values))

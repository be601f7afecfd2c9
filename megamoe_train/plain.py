"""The plain call: what a layer does every step, launched by one operator a pass.

Before a launch the GPU is idle and peers wait, and most of what passes then is Python that finds neither its code nor
its data in a cache (docs/performance.md, "Host time of a call"). So once a layer has gone the long way, its next calls
hand their arguments straight to an operator, which compares them with what tensor maps were made for, allocates and
launches (csrc/bindings_fused.cpp: Plain). Objects, verdict and autograd follow while the GPU works. Where anything is
unusual nothing has been launched, and the call goes the long way, which also raises what there is to raise. What stands
before the operators here is short for the same reason.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import Parameter

from . import backends, fused_plan, ops, ops_fused, ops_plan
from .experts import StackedExperts
from .fused_plan import FusedPlan
from .launch_order import unchanged_stream
from .workspace import Workspace

REMEMBERED = 1024  # layers, and as many sets of gradients
TENSORS = {Tensor, Parameter}  # no subclass whose operators do something else


@dataclass(slots=True)
class Layer:
    """What the long way has found out about a layer."""

    workspace: Workspace
    is_shared: bool  # the workspace is one that callers do not bring
    group: dist.ProcessGroup | None
    clamp: float | None
    limit: float
    maps: ops_fused.WeightMaps
    addresses: Tensor  # int64 [2L] on the CPU: where the maps expect fc1 and fc2
    stream: int  # that the maps were made on
    device: int


@dataclass(slots=True)
class _Gradients:
    """The same about the buffers that a layer's gradients are added to."""

    addresses: Tensor
    dfc1: Tensor  # ops.GradientTable's
    dfc2: Tensor
    stream: int


# By id of a layer's first tensor (and of the group): the operators find out where that is another one by now.
_layers: dict[tuple[int, int], Layer] = {}
_gradients: dict[int, _Gradients] = {}


def remember(
    workspace: Workspace, group: dist.ProcessGroup | None, fc1: Sequence[Tensor], fc2: Sequence[Tensor],
    maps: ops_fused.WeightMaps, clamp: float | None, stream: int | None,
) -> None:  # fmt: skip
    """A layer whose forward has gone the long way on `stream` (None: captured, not remembered); fc1, fc2 as
    experts.per_expert gives them."""
    if stream is None or workspace.sizing == "exact":
        return
    key = _key(fc1), id(group)
    if (found := _layers.get(key)) and found.maps is maps and found.workspace is workspace and found.clamp == clamp:
        return  # known, and yet something is unusual
    where, limit, shared = workspace.memory.get_device(), ops_fused.limit_of(clamp), fused_plan.is_shared(workspace)
    layer = Layer(workspace, shared, group, clamp, limit, maps, ops.addresses([*fc1, *fc2]), stream, where)
    _keep(_layers, key, layer)


def remember_gradients(
    dfc1: Sequence[Tensor], dfc2: Sequence[Tensor], table1: ops.GradientTable, table2: ops.GradientTable,
    stream: int | None,
) -> None:  # fmt: skip
    """Buffers that a backward has added to the long way."""
    if stream is not None:
        found = _Gradients(ops.addresses([*dfc1, *dfc2]), table1.table, table2.table, stream)
        _keep(_gradients, _key(dfc1), found)


def forward(
    x: Tensor, ids: Tensor, weights: Tensor, fc1: Tensor | Sequence[Tensor], fc2: Tensor | Sequence[Tensor],
    clamp: float | None, group: dist.ProcessGroup | None, workspace: Workspace | None, plan: backends.Plan | None,
) -> tuple[Layer, FusedPlan, tuple[Tensor, Tensor]] | None:  # fmt: skip
    """The layer, the plan of these ids (the given one, if any), (y, h). None: not plain, nothing is launched."""
    fc1, fc2 = _experts(fc1), _experts(fc2)
    layer = _layers.get((id(fc1[0]), id(group))) if fc1 and fc2 else None
    if layer is None or layer.clamp != clamp or not {type(x), type(ids), type(weights)} <= TENSORS:
        return None
    home, stream = layer.workspace, unchanged_stream(layer.device)
    if stream is None or stream != layer.stream or home.closed:
        return None
    if plan is None:
        if workspace is not home and not (workspace is None and layer.is_shared):
            return None
        tables, capacity = None, fused_plan.capacity_for(home, ids.numel())
    else:
        if type(plan) is not FusedPlan or plan.workspace is not home or workspace not in (None, home):
            return None
        tables, capacity = plan.device_plan.tables, plan.device_plan.capacity
        if plan.device_plan.home != stream or plan.topk_ids.shape != ids.shape:
            return None
    home.guard.check()
    try:
        done = torch.ops.megamoe.plain_forward(
            home.handle, x, ids, weights, fc1, fc2, layer.addresses, layer.maps.table, layer.maps.inter, tables,
            capacity, home.offer_status(), layer.limit, stream,
        )  # fmt: skip
    except Exception:
        with home.launching():
            raise
    if not done:
        return None
    y, h, tables = done
    if plan is None:
        plan = FusedPlan(home, ids, ops_plan.DevicePlan(home, ids, capacity, home.take_status(), tables, stream))
        fused_plan.note_launch(plan)

    def again(device_plan: ops_plan.DevicePlan) -> tuple[Tensor, Tensor]:
        return ops_fused.forward(device_plan, x, weights, layer.maps, clamp=clamp)

    with home.guard.watch(), torch.no_grad():
        return layer, plan, plan.judged((y, h), again)


def backward(
    layer: Layer, plan: FusedPlan, dy: Tensor, x: Tensor, h: Tensor | None, weights: Tensor,
    experts: Sequence[Tensor], buffers: Sequence[Tensor | None],
) -> tuple[Tensor, Tensor] | None:  # fmt: skip
    """dx, dweights; the experts' gradients are added to the buffers. None: not plain, nothing is launched.

    layer: forward's. experts, buffers: fc1's tensors, then as many of fc2.
    """
    gradients, home, device_plan = _gradients.get(id(buffers[0])), layer.workspace, plan.device_plan
    if gradients is None or h is None or not set(map(type, buffers)) <= TENSORS:
        return None
    stream, n = unchanged_stream(layer.device), len(experts) // 2
    if stream is None or not stream == layer.stream == gradients.stream == device_plan.home:
        return None
    home.guard.check()
    try:
        done = torch.ops.megamoe.plain_backward(
            home.handle, device_plan.capacity, device_plan.tables, dy, x, weights, h, layer.maps.table, experts[:n],
            experts[n:], layer.addresses, buffers[:n], buffers[n:], gradients.addresses, gradients.dfc1,
            gradients.dfc2, layer.limit, stream,
        )  # fmt: skip
    except Exception:
        with home.launching():
            raise
    return tuple(done) if done else None


def _keep(table: dict, key: object, entry: object) -> None:
    if len(table) >= REMEMBERED:
        table.clear()
    table[key] = entry


def _key(matrices: Sequence[Tensor]) -> int:
    return id(matrices.stack if isinstance(matrices, StackedExperts) else matrices[0])


def _experts(weight: Tensor | Sequence[Tensor]) -> Sequence[Tensor]:
    """As checks.as_tuple; empty where it is no such thing."""
    if type(weight) in TENSORS:
        return (weight,)
    return weight if isinstance(weight, list | tuple) and set(map(type, weight)) <= TENSORS else ()

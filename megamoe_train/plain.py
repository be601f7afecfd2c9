"""The plain call: what a layer does every step, launched by one operator a pass.

Before a launch the GPU is idle and peers wait, and most of what passes then is Python that finds neither its code nor
its data in a cache (docs/performance.md, "Host time of a call"). So once a layer has gone the long way, its next calls
hand their arguments straight to an operator, which compares them with what tensor maps were made for, allocates and
launches (csrc/bindings_fused.cpp: Plain). Objects, verdict and autograd follow while the GPU works. Where anything is
unusual nothing has been launched, and the call goes the long way, which also raises what there is to raise. What stands
before the operators here is short for the same reason.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import dataclass, replace

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
    """What the long way has found out about a layer. Keeps neither its weights nor its workspace alive."""

    first: weakref.ref[Tensor]  # of its tensors
    workspace: weakref.ref[Workspace]
    is_shared: bool  # the workspace is one that callers do not bring
    group: dist.ProcessGroup | None
    clamp: float | None
    limit: float
    maps: ops_fused.WeightMaps
    places: Tensor  # what the maps were made for
    stream: int  # on which the long way was gone
    device: int


@dataclass(slots=True)
class _Gradients:
    """The same about the buffers that a layer's gradients are added to."""

    first: weakref.ref[Tensor]
    places: Tensor
    dfc1: Tensor  # ops.GradientTable's
    dfc2: Tensor
    stream: int


# By id of the first tensor (and of the group), for as long as it lives.
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
    first = _first_of(fc1)
    key = id(first), id(group)
    known = _layers.get(key)
    if known is not None and known.first() is first and known.workspace() is workspace and known.maps is maps:
        if (known.clamp, known.stream) != (clamp, stream):  # another one: calls in flight keep theirs
            _layers[key] = replace(known, clamp=clamp, limit=ops_fused.limit_of(clamp), stream=stream)
        return
    where, limit, shared = workspace.memory.get_device(), ops_fused.limit_of(clamp), fused_plan.is_shared(workspace)
    ref, space, places = _until_it_dies(_layers, key, first), weakref.ref(workspace), _places(fc1, fc2)
    _keep(_layers, key, Layer(ref, space, shared, group, clamp, limit, maps, places, stream, where))


def remember_gradients(
    dfc1: Sequence[Tensor], dfc2: Sequence[Tensor], table1: ops.GradientTable, table2: ops.GradientTable,
    stream: int | None,
) -> None:  # fmt: skip
    """Buffers that a backward has added to the long way."""
    if stream is not None:
        first = _first_of(dfc1)
        ref = _until_it_dies(_gradients, id(first), first)
        _keep(_gradients, id(first), _Gradients(ref, _places(dfc1, dfc2), table1.table, table2.table, stream))


def forward(
    x: Tensor, ids: Tensor, weights: Tensor, fc1: Tensor | Sequence[Tensor], fc2: Tensor | Sequence[Tensor],
    clamp: float | None, group: dist.ProcessGroup | None, workspace: Workspace | None, plan: backends.Plan | None,
) -> tuple[Layer, FusedPlan, tuple[Tensor, Tensor] | None] | None:  # fmt: skip
    """The layer, the plan of these ids (the given one, if any), (y, h). None: not plain, nothing is launched.

    (y, h) is None where memory for them is short: nothing but the plan is launched, and the long way goes on with it.
    """
    fc1, fc2 = _experts(fc1), _experts(fc2)
    layer = _layers.get((id(fc1[0]), id(group))) if fc1 and fc2 else None
    if layer is None or layer.clamp != clamp or not {type(x), type(ids), type(weights)} <= TENSORS:
        return None
    home, stream = layer.workspace(), unchanged_stream(layer.device)
    if home is None or home.closed or layer.first() is not fc1[0] or x.get_device() != layer.device:
        return None
    if stream is None or stream != layer.stream:
        return None
    if plan is None:
        if workspace is not home and not (workspace is None and layer.is_shared):
            return None
        tables, capacity, status = None, fused_plan.capacity_for(home, ids.numel()), home.verdicts.offer()
    else:
        if type(plan) is not FusedPlan or plan.workspace is not home or workspace not in (None, home):
            return None
        tables, capacity, status = plan.device_plan.tables, plan.device_plan.capacity, 0
        if plan.device_plan.home != stream or plan.topk_ids.shape != ids.shape:
            return None
    home.guard.check()
    try:
        done = torch.ops.megamoe.plain_forward(
            home.handle, x, ids, weights, fc1, fc2, layer.places, layer.maps.table, layer.maps.inter, tables,
            capacity, status, layer.limit, stream,
        )  # fmt: skip
    except Exception:
        with home.launching():
            raise
    if not done:
        return None
    *results, tables = done
    if plan is None:
        plan = FusedPlan(home, ids, ops_plan.DevicePlan(home, ids, capacity, home.verdicts.take(), tables, stream))
        fused_plan.note_launch(plan.device_plan)
    if not results:
        return layer, plan, None

    def again(device_plan: ops_plan.DevicePlan) -> tuple[Tensor, Tensor]:
        return ops_fused.forward(device_plan, x, weights, layer.maps, clamp=clamp)

    with home.guard.watch(), torch.no_grad():
        return layer, plan, plan.judged(tuple(results), again)


def backward(
    layer: Layer, plan: FusedPlan, dy: Tensor, x: Tensor, h: Tensor | None, weights: Tensor,
    experts: Sequence[Tensor], buffers: Sequence[Tensor | None],
) -> tuple[Tensor, Tensor] | None:  # fmt: skip
    """dx, dweights; the experts' gradients are added to the buffers. None: not plain, nothing is launched.

    layer: forward's. experts, buffers: fc1's tensors, then as many of fc2.
    """
    gradients, home, device_plan = _gradients.get(id(buffers[0])), plan.workspace, plan.device_plan
    if gradients is None or gradients.first() is not buffers[0] or not set(map(type, buffers)) <= TENSORS:
        return None
    if h is None or home.closed:
        return None
    stream, n = unchanged_stream(layer.device), len(experts) // 2
    if stream is None or not stream == layer.stream == gradients.stream == device_plan.home:
        return None
    home.guard.check()
    try:
        done = torch.ops.megamoe.plain_backward(
            home.handle, device_plan.capacity, device_plan.tables, dy, x, weights, h, layer.maps.table, experts[:n],
            experts[n:], layer.places, buffers[:n], buffers[n:], gradients.places, gradients.dfc1,
            gradients.dfc2, layer.limit, stream,
        )  # fmt: skip
    except Exception:
        with home.launching():
            raise
    return tuple(done) if done else None


def _keep(table: dict, key: object, entry: Layer | _Gradients) -> None:
    if len(table) >= REMEMBERED:
        table.clear()
    table[key] = entry


def _until_it_dies(table: dict, key: object, first: Tensor) -> weakref.ref[Tensor]:
    """To `first`; takes its entry out of the table when it dies, since another tensor may get its id."""

    def forget(ref: weakref.ref[Tensor]) -> None:
        if key in table and table[key].first is ref:
            del table[key]

    return weakref.ref(first, forget)


def _first_of(matrices: Sequence[Tensor]) -> Tensor:
    return matrices.stack if isinstance(matrices, StackedExperts) else matrices[0]


def _places(first: Sequence[Tensor], second: Sequence[Tensor]) -> Tensor:
    """int64 on the CPU: L, rows and columns of the first kind, the addresses of both. What operators compare."""
    numbers = [len(first), *first[0].shape, *[matrix.data_ptr() for matrix in (*first, *second)]]
    return torch.tensor(numbers, dtype=torch.int64)


def _experts(weight: Tensor | Sequence[Tensor]) -> Sequence[Tensor]:
    """As checks.as_tuple; empty where it is no such thing."""
    if type(weight) in TENSORS:
        return (weight,) if weight.dim() == 3 else ()
    plain = isinstance(weight, list | tuple) and weight and set(map(type, weight)) <= TENSORS
    return weight if plain and weight[0].dim() == 2 else ()

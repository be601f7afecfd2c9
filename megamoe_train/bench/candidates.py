"""What `bench layer` times: ours, the unfused composition, the layers of Megatron and SonicMoE, cuBLAS; both passes.

All share the experts' weights and their fp32 gradients (SonicMoE has a copy of fc1 in its own order).
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from ..functional import moe
from ..workspace import Shape as WorkspaceShape
from ..workspace import Workspace
from . import megatron_layer, sonic_layer
from .layer_load import Routing, Shape, Weights
from .timing import CuBLAS
from .unfused import Kept, Unfused, route

NAMES = ("ours", "ours-written", "ours-recomputed", "unfused", "unfused-routed", "unfused-fp32", "megatron", "sonicmoe")
DEFAULT = ("ours", "unfused", "unfused-routed", "megatron")
MEANING = {
    "ours": "megamoe_train.moe(), fp32 weight gradients added to main_grad",
    "ours-written": "megamoe_train.moe(), weight gradients written once in bf16",
    "ours-recomputed": "as ours, h not kept but computed again in backward (recompute='fc1')",
    "unfused": "torch._grouped_mm, all_to_all_single and index operations, weight gradients written once in bf16",
    "unfused-routed": "the same, routing and its host sync done before the clock starts",
    "unfused-fp32": "as unfused, weight gradients added to fp32 main_grad",
    "megatron": "Megatron's MoELayer: TEGroupedMLP, alltoall, fused permutation, fp32 main_grad; without clamp",
    "sonicmoe": "SonicMoE's kernels, autotuned, weight gradients written once in bf16; without clamp",
}


class Candidate(Protocol):
    moves: tuple[int, int]  # how often a slot's row of H travels in forward, in backward

    def prepare(self, inputs: Routing) -> None:
        """Before anything is timed on these inputs. Collective."""

    def forward(self, inputs: Routing) -> Any:
        """Timed. Returns what backward takes, y among it."""

    def backward(self, inputs: Routing, state: Any) -> Tensor | None:
        """Timed. Returns dx."""


class MainGrads:
    """autograd.WeightGradSink: the two stacks' gradients go to fp32 buffers that are there."""

    def __init__(self, pairs: list[tuple[Tensor, Tensor]]):
        self.buffers = {id(weight): gradient for weight, gradient in pairs}

    def buffer(self, weight: Tensor) -> Tensor:
        return self.buffers[id(weight)]

    def finish(self, weight: Tensor, grad: Tensor | None) -> None:
        return None


class Ours:
    moves = (2, 3)  # x, y; dy, x again, dx

    def __init__(
        self, shape: Shape, weights: Weights, group: dist.ProcessGroup | None, *, written: bool, recompute: str | None,
        workspace,
    ):  # fmt: skip
        self.shape, self.group, self.workspace, self.recompute = shape, group, workspace, recompute
        if recompute:
            self.moves = (2, 4)  # x once more
        self.fc1, self.fc2 = (torch.nn.Parameter(weight) for weight in (weights.fc1, weights.fc2))
        self.sink = None if written else MainGrads([(self.fc1, weights.grad1), (self.fc2, weights.grad2)])

    def prepare(self, inputs: Routing) -> None:
        inputs.x.requires_grad_()
        inputs.weights.requires_grad_()

    def forward(self, inputs: Routing) -> Tensor:
        return moe(
            inputs.x, inputs.ids, inputs.weights, self.fc1, self.fc2, clamp=self.shape.clamp, group=self.group,
            workspace=self.workspace, wgrad_sink=self.sink, recompute=self.recompute,
        )  # fmt: skip

    def backward(self, inputs: Routing, state: Tensor) -> Tensor:
        leaves = inputs.x, inputs.weights, self.fc1, self.fc2
        return torch.autograd.grad(state, leaves, inputs.dy, allow_unused=True)[0]  # a sink's weights get None


class UnfusedCandidate:
    moves = (2, 2)

    def __init__(
        self, shape: Shape, weights: Weights, group: dist.ProcessGroup | None, *, accumulate: bool, routed: bool
    ):
        self.layer = Unfused(shape, weights, group, accumulate, {} if routed else None)

    def prepare(self, inputs: Routing) -> None:
        if self.layer.routes is not None:
            self.layer.routes[id(inputs)] = route(inputs.ids, self.layer.shape, self.layer.group)

    @torch.no_grad()
    def forward(self, inputs: Routing) -> tuple[Tensor, Kept]:
        return self.layer.forward(inputs)

    @torch.no_grad()
    def backward(self, inputs: Routing, state: tuple[Tensor, Kept]) -> Tensor:
        return self.layer.backward(inputs.dy, state[1])[0]


class MegatronCandidate:
    moves = (2, 2)

    def __init__(self, shape: Shape, weights: Weights):
        self.layer = megatron_layer.MegatronLayer(shape, weights)
        self.given: dict[int, tuple[Tensor, Tensor]] = {}

    def prepare(self, inputs: Routing) -> None:
        inputs.x.requires_grad_()
        with torch.no_grad():
            probs, routing_map = self.layer.dense(inputs)
        self.given[id(inputs)] = probs.requires_grad_(), routing_map

    def forward(self, inputs: Routing) -> Tensor:
        return self.layer.forward(inputs.x, self.given[id(inputs)])

    def backward(self, inputs: Routing, state: Tensor) -> Tensor:
        leaves = inputs.x, self.given[id(inputs)][0], *self.layer.parameters
        return torch.autograd.grad(state, leaves, inputs.dy[:, None], allow_unused=True)[0]


class SonicCandidate:
    moves = (0, 0)

    def __init__(self, shape: Shape, weights: Weights):
        self.layer = sonic_layer.SonicLayer(shape, weights)
        self.ids: dict[int, Tensor] = {}

    def prepare(self, inputs: Routing) -> None:
        inputs.x.requires_grad_()
        inputs.weights.requires_grad_()
        self.ids[id(inputs)] = inputs.ids.int()

    def forward(self, inputs: Routing) -> Tensor:
        return self.layer.forward(inputs, self.ids[id(inputs)])

    def backward(self, inputs: Routing, state: Tensor) -> Tensor:
        return torch.autograd.grad(state, (inputs.x, inputs.weights, self.layer.fc1, self.layer.fc2), inputs.dy)[0]


THEIRS = {"megatron": (megatron_layer, MegatronCandidate), "sonicmoe": (sonic_layer, SonicCandidate)}


class CuBLASCandidate:
    """The denominator, about as long as each pass."""

    moves = (0, 0)

    def __init__(self, shape: Shape):
        first = CuBLAS(shape.flops(backward=False))
        self.passes = first, CuBLAS(shape.flops(backward=True), like=first)

    def prepare(self, inputs: Routing) -> None:
        """Nothing depends on the inputs."""

    def forward(self, inputs: Routing) -> None:
        self.passes[0](0)

    def backward(self, inputs: Routing, state: None) -> None:
        self.passes[1](0)


def make(
    names: list[str], shape: Shape, weights: Weights, group: dist.ProcessGroup | None
) -> tuple[dict[str, Candidate], dict[str, str], int]:
    """(candidates by name, why others are missing, bytes of our workspace). Collective."""
    made: dict[str, Candidate] = {"cublas": CuBLASCandidate(shape)}
    absent: dict[str, str] = {}
    workspace = None
    if any(name.startswith("ours") for name in names):
        size = WorkspaceShape(shape.ranks, shape.experts, shape.top_k, shape.hidden, shape.tokens)
        workspace = Workspace.create(size, group=group, deadline_s=60.0)
    for name in names:
        if name.startswith("ours"):
            options = {"written": name == "ours-written", "recompute": "fc1" if name == "ours-recomputed" else None}
            made[name] = Ours(shape, weights, group, **options, workspace=workspace)
        elif name in THEIRS:
            layer, candidate = THEIRS[name]
            if (why := layer.missing(shape)) is not None:
                absent[name] = why
                continue
            try:
                made[name] = candidate(shape, weights)
            except Exception as error:  # another version of theirs: the others are measured
                absent[name] = f"{type(error).__name__}: {error}"
        else:
            options = {"accumulate": name == "unfused-fp32", "routed": name == "unfused-routed"}
            made[name] = UnfusedCandidate(shape, weights, group, **options)
    return made, absent, workspace.layout.bytes if workspace else 0


def output_of(state: Any) -> Tensor:
    """y of what a forward returned."""
    return state[0] if isinstance(state, tuple) else state

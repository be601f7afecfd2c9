"""SonicMoE's layer (package sonic-moe) as a candidate: EP = 1, weight gradients written once in bf16, without clamp."""

from __future__ import annotations

import torch
from torch import Tensor

from .layer_load import Routing, Shape, Weights


def missing(shape: Shape) -> str | None:
    """Why SonicMoE's layer cannot be measured here; None where it can."""
    if shape.ranks > 1:
        return f"it has no expert parallelism, and EP is {shape.ranks}"
    try:
        import sonicmoe.functional  # noqa: F401
    except ImportError as error:
        return f"{type(error).__name__}: {error}"
    return None


def interleaved(fc1: Tensor) -> Tensor:
    """[L, 2I, H], gate rows first, then up -> SonicMoE's own order, gate and up row by row. A copy."""
    experts, rows, hidden = fc1.shape
    return fc1.view(experts, 2, rows // 2, hidden).transpose(1, 2).reshape(fc1.shape)


class SonicLayer:
    """Its kernels for a fixed number of experts a token, as its `MoE` calls them when its router has chosen.

    `MoE` itself computes the routing too, and `moe_general_routing_inputs` is for numbers of experts that may vary.
    """

    def __init__(self, shape: Shape, weights: Weights):
        from sonicmoe import functional
        from sonicmoe.enums import ActivationType

        self.shape, self.functional, self.activation = shape, functional, ActivationType.SWIGLU
        self.fc1 = torch.nn.Parameter(interleaved(weights.fc1))
        self.fc2 = torch.nn.Parameter(weights.fc2)

    def forward(self, inputs: Routing, ids: Tensor) -> Tensor:
        """ids `[T, K]` int32 -> y."""
        s = self.shape
        slots = s.tokens * s.top_k

        def index(length: int) -> Tensor:
            return torch.empty(length, dtype=torch.int32, device=ids.device)

        counts, ends, gather, scatter, back = (index(n) for n in (s.experts, s.experts + 1, slots, slots, slots))
        self.functional.TC_topk_router_metadata_triton(ids, s.experts, counts, ends, gather, scatter, back)
        routed = gather, scatter, back, None, False  # no number of experts that differs from token to token
        a, h = self.functional._UpProjection.apply(
            inputs.x, self.fc1.permute(1, 2, 0), None, ends, slots, s.top_k, *routed, self.activation, False
        )
        return self.functional._DownProjection.apply(
            a, h, self.fc2.permute(1, 2, 0), None, inputs.weights, ends, s.tokens, s.top_k, *routed, self.activation
        )

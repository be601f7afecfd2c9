"""The layers that `bench layer` measures: shapes, routings and inputs of one rank, and how many experts fit there."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

BYTES_PER_WEIGHT = 2 + 4 + 2  # bf16, its fp32 gradient, the bf16 gradient that a baseline writes
USABLE = 0.85  # of the GPU's memory; the rest is the context, NCCL's buffers, fragmentation


@dataclass(frozen=True)
class Shape:
    """One rank's load. T = tokens of a rank, K, L = experts of a rank, H, I."""

    name: str
    hidden: int
    inter: int
    top_k: int
    experts_local: int
    tokens: int = 8192
    clamp: float | None = None
    ranks: int = 1
    scaled_from: int = 0  # local experts before they were scaled to fit; 0: not scaled

    @property
    def experts(self) -> int:
        """E."""
        return self.experts_local * self.ranks

    @property
    def weight_elements(self) -> int:
        return 3 * self.experts_local * self.hidden * self.inter

    def flops(self, backward: bool) -> float:
        return (12.0 if backward else 6.0) * self.tokens * self.top_k * self.hidden * self.inter

    @property
    def bytes_needed(self) -> int:
        """Roughly: weights and gradients, and the row pools of a baseline in backward, about twelve rows of H and I."""
        rows = self.tokens * self.top_k
        return self.weight_elements * BYTES_PER_WEIGHT + rows * 2 * (6 * self.hidden + 6 * self.inter)


# DeepSeek-V4 Flash and Pro by their local experts at the group sizes they are trained with; the others by E in all.
LOCAL = {
    "flash": Shape("flash", 4096, 2048, 6, 32, clamp=10.0),
    "pro": Shape("pro", 7168, 3072, 6, 48, clamp=10.0),
}
WHOLE = {
    "qwen3-30b": Shape("qwen3-30b", 2048, 768, 8, 128),
    "v3": Shape("v3", 7168, 2048, 8, 256),
    "mixtral": Shape("mixtral", 4096, 14336, 2, 8),
}
NAMES = (*LOCAL, *WHOLE)


def shape_of(
    name: str, ranks: int, memory: int, *, tokens: int | None = None, experts_local: int | None = None
) -> Shape:
    """The shape on one of `ranks` ranks with `memory` bytes each. Experts are halved until it fits, and it says so.

    experts_local: as many, whatever fits. Raises ValueError where E is no multiple of the ranks.
    """
    shape = LOCAL.get(name) or WHOLE[name]
    if name in WHOLE:
        if shape.experts_local % ranks:
            raise ValueError(f"ep: got {ranks}; allowed: a divisor of the {shape.experts_local} experts of {name}")
        shape = replace(shape, experts_local=shape.experts_local // ranks)
    shape = replace(shape, ranks=ranks, tokens=tokens or shape.tokens)
    if experts_local:
        return replace(shape, experts_local=experts_local)
    whole = shape.experts_local
    while shape.bytes_needed > USABLE * memory and shape.experts_local % 2 == 0 and shape.experts >= 2 * shape.top_k:
        shape = replace(shape, experts_local=shape.experts_local // 2, scaled_from=whole)
    return shape


@dataclass
class Routing:
    """One rank's inputs of one call."""

    x: Tensor  # [T, H] bf16 ~ N(0, 1)
    ids: Tensor  # [T, K] int64, uniform random, distinct within a token
    weights: Tensor  # [T, K] fp32, softmax of N(0, 1)
    dy: Tensor  # [T, H] bf16 ~ N(0, 1)

    @classmethod
    def random(cls, shape: Shape, seed: int, rank: int, device: str = "cuda") -> Routing:
        generator = torch.Generator(device).manual_seed(1000 * seed + rank)

        def normal(*size: int) -> Tensor:
            return torch.randn(size, device=device, generator=generator)

        scores = torch.rand(shape.tokens, shape.experts, device=device, generator=generator)
        return cls(
            x=normal(shape.tokens, shape.hidden).bfloat16(),
            ids=scores.topk(shape.top_k, dim=1).indices,
            weights=normal(shape.tokens, shape.top_k).softmax(-1),
            dy=normal(shape.tokens, shape.hidden).bfloat16(),
        )

    def off_rank(self, shape: Shape, rank: int) -> int:
        """Slots of this rank whose expert lies on another one."""
        return int((self.ids // shape.experts_local != rank).sum())


@dataclass
class Weights:
    """The experts of one rank and their fp32 gradients, shared by all candidates; N(0, 1/fan_in)."""

    fc1: Tensor  # [L, 2I, H] bf16
    fc2: Tensor  # [L, H, I] bf16
    grad1: Tensor  # [L, 2I, H] fp32
    grad2: Tensor  # [L, H, I] fp32

    @classmethod
    def random(cls, shape: Shape, rank: int, device: str = "cuda") -> Weights:
        generator = torch.Generator(device).manual_seed(77 + rank)
        L, H, I = shape.experts_local, shape.hidden, shape.inter  # noqa: E741

        def normal(*size: int) -> Tensor:
            weight = torch.empty(size, dtype=torch.bfloat16, device=device)
            return weight.normal_(std=size[-1] ** -0.5, generator=generator)

        fc1, fc2 = normal(L, 2 * I, H), normal(L, H, I)
        return cls(fc1, fc2, *(torch.zeros(w.shape, device=device) for w in (fc1, fc2)))

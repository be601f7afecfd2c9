"""Routings and inputs of one MoE layer for tests: the workloads of DESIGN section 8, for any number of ranks."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

ROUTINGS = (
    "balanced", "uniform", "zipf", "hot_expert", "hot_rank", "empty_experts", "empty_rank", "some_dropped",
    "all_dropped",
)  # fmt: skip


def route(kind: str, tokens: int, top_k: int, num_experts: int, ranks: int, generator: torch.Generator) -> Tensor:
    """`[T, K]` int64 expert numbers, distinct within a token; -1 = dropped."""
    if kind == "first_and_last":  # the ranks between own no row
        return torch.where(torch.arange(tokens * top_k).view(tokens, top_k) % 2 == 0, 0, num_experts - 1)
    if kind == "last":  # every token to one expert of the last rank
        return torch.full((tokens, top_k), num_experts - 1)
    if kind == "balanced":
        slots = torch.arange(tokens * top_k).view(tokens, top_k)
        return slots % num_experts
    weights = torch.ones(num_experts)
    local = num_experts // ranks
    if kind == "zipf":
        weights = 1.0 / torch.arange(1, num_experts + 1)
    elif kind == "hot_expert":
        weights[num_experts // 2] = 1e6
    elif kind == "hot_rank":
        weights[:local] = 1e3
    elif kind == "empty_experts":
        weights[torch.randperm(num_experts, generator=generator)[: num_experts - top_k]] = 0
    elif kind == "empty_rank":
        weights[-local:] = 0 if local < num_experts and num_experts - local >= top_k else 1
    ids = _sample(weights, tokens, top_k, generator)
    if kind == "some_dropped":
        ids[torch.rand(ids.shape, generator=generator) < 0.3] = -1
    elif kind == "all_dropped":
        ids[:] = -1
    return ids


def _sample(weights: Tensor, tokens: int, top_k: int, generator: torch.Generator) -> Tensor:
    if tokens == 0:
        return torch.empty((0, top_k), dtype=torch.int64)
    return torch.multinomial(weights.expand(tokens, -1), top_k, generator=generator)


@dataclass
class Layer:
    """All ranks' inputs and all experts of one layer; `rank(r)` is what rank r holds."""

    xs: list[Tensor]  # R of [T_r, H]
    ids: list[Tensor]  # R of [T_r, K]
    weights: list[Tensor]  # R of [T_r, K]
    dys: list[Tensor]  # R of [T_r, H]
    fc1: Tensor  # [E, 2I, H]
    fc2: Tensor  # [E, H, I]

    def rank(self, rank: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
        """x, ids, weights, dy, fc1, fc2 of one rank, each a fresh copy."""
        local = self.fc1.shape[0] // len(self.xs)
        mine = slice(rank * local, (rank + 1) * local)
        held = (self.xs, self.ids, self.weights, self.dys)
        return *(part[rank].clone() for part in held), self.fc1[mine].clone(), self.fc2[mine].clone()

    def merged(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
        """The same layer on one rank: tokens of rank 0 first."""
        held = (self.xs, self.ids, self.weights, self.dys)
        return *(torch.cat(part) for part in held), self.fc1.clone(), self.fc2.clone()

    def tokens_of(self, rank: int) -> slice:
        """Where rank's tokens lie in `merged()`."""
        before = sum(x.shape[0] for x in self.xs[:rank])
        return slice(before, before + self.xs[rank].shape[0])


def make_layer(
    tokens: list[int],
    *,
    top_k: int = 2,
    num_experts: int = 8,
    hidden: int = 32,
    inner: int = 16,
    routing: str = "uniform",
    dtype: torch.dtype = torch.float64,
    seed: int = 0,
) -> Layer:
    """Random layer for `len(tokens)` ranks: x, dy ~ N(0,1), expert weights ~ N(0, 1/fan_in), p in (0, 1)."""
    generator = torch.Generator().manual_seed(seed)
    wide = torch.float64 if dtype == torch.float64 else torch.float32

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    return Layer(
        xs=[normal(t, hidden) for t in tokens],
        ids=[route(routing, t, top_k, num_experts, len(tokens), generator) for t in tokens],
        weights=[torch.rand((t, top_k), generator=generator, dtype=torch.float64).to(wide) for t in tokens],
        dys=[normal(t, hidden) for t in tokens],
        fc1=normal(num_experts, 2 * inner, hidden) * hidden**-0.5,
        fc2=normal(num_experts, hidden, inner) * inner**-0.5,
    )

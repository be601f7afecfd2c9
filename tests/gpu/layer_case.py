"""One MoE layer of all ranks on the GPU: inputs, the fp64 oracle, the plain bf16 computation, what is compared.

Oracle and plain computation are reference.py on one rank that holds every token and expert: its rows have the order
of the ranks' rows.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from megamoe_train import reference
from megamoe_train.plan import RoutingPlan, build_plan, plans_of
from tests.gpu.virtual import Load
from tests.numerics import relative_error


@dataclass(frozen=True)
class Case:
    """Shape and routing of one layer. scale: factor on fc1, so that a clamp is hit."""

    load: Load
    hidden: int
    inner: int
    clamp: float | None = None
    scale: float = 1.0

    def __str__(self) -> str:
        clamp = "" if self.clamp is None else f"-c{self.clamp:g}"
        return f"{self.load}-H{self.hidden}-I{self.inner}{clamp}"


@dataclass
class RankResult:
    """What one rank computed. None: not computed."""

    y: Tensor | None = None  # [T, H]
    h: Tensor | None = None  # [>= M, 2I]
    dx: Tensor | None = None  # [T, H]
    dweights: Tensor | None = None  # [T, K]
    dfc1: list[Tensor] | None = None  # L of [2I, H]
    dfc2: list[Tensor] | None = None  # L of [H, I]


@dataclass
class Layer:
    """The inputs of every rank and all experts, bf16 on the GPU; equal for equal seeds in every process."""

    case: Case
    seed: int = 0
    device: str = "cuda"
    xs: list[Tensor] = field(init=False)  # R of [T_r, H]
    ids: list[Tensor] = field(init=False)  # R of [T_r, K] int64
    ps: list[Tensor] = field(init=False)  # R of [T_r, K] fp32
    dys: list[Tensor] = field(init=False)  # R of [T_r, H]
    fc1: Tensor = field(init=False)  # [E, 2I, H]
    fc2: Tensor = field(init=False)  # [E, H, I]

    def __post_init__(self):
        case, load = self.case, self.case.load
        generator = torch.Generator(self.device).manual_seed(self.seed)

        def normal(*shape: int, std: float = 1.0) -> Tensor:
            return (torch.randn(shape, device=self.device, generator=generator) * std).bfloat16()

        self.ids = [ids.to(self.device) for ids in load.ids(self.seed)]
        self.xs = [normal(tokens, case.hidden) for tokens in load.tokens]
        self.dys = [normal(tokens, case.hidden) for tokens in load.tokens]
        self.ps = [torch.rand(tokens, load.top_k, device=self.device, generator=generator) for tokens in load.tokens]
        self.fc1 = normal(load.experts, 2 * case.inner, case.hidden, std=case.scale * case.hidden**-0.5)
        self.fc2 = normal(load.experts, case.hidden, case.inner, std=case.inner**-0.5)

    @cached_property
    def twins(self) -> list[RoutingPlan]:
        """Each rank's plan, by plan.py."""
        return plans_of([ids.cpu() for ids in self.ids], self.case.load.experts)

    @property
    def most_rows(self) -> int:
        """M of the rank that has most."""
        return max(twin.num_rows for twin in self.twins)

    def experts_of(self, rank: int) -> tuple[list[Tensor], list[Tensor]]:
        """fc1 and fc2 of one rank's experts."""
        mine = slice(self.twins[rank].first_expert, self.twins[rank].first_expert + self.twins[rank].num_local_experts)
        return list(self.fc1[mine]), list(self.fc2[mine])

    @cached_property
    def exact(self) -> RankResult:
        return self._merged(torch.float64)

    @cached_property
    def plain(self) -> RankResult:
        return self._merged(torch.bfloat16)

    @cached_property
    def _merged_plan(self) -> RoutingPlan:
        return build_plan(torch.cat(self.ids), self.case.load.experts)

    def _merged(self, dtype: torch.dtype) -> RankResult:
        plan = self._merged_plan
        p = torch.cat(self.ps).to(reference.wide(dtype))
        x, dy = torch.cat(self.xs).to(dtype), torch.cat(self.dys).to(dtype)
        args = plan, p, list(self.fc1.to(dtype)), list(self.fc2.to(dtype))
        y, h = reference.forward(x, *args, clamp=self.case.clamp, group=None)
        grads = reference.backward(dy, x, h, *args, clamp=self.case.clamp, group=None)
        return RankResult(y, h, grads.dx, grads.dweights, grads.dfc1, grads.dfc2)

    def tokens_of(self, rank: int) -> slice:
        before = sum(self.case.load.tokens[:rank])
        return slice(before, before + self.case.load.tokens[rank])

    def pairs(self, result: RankResult, rank: int) -> Iterator[tuple[str, str, Tensor, Tensor, Tensor]]:
        """(tensor, where, ours, plain, exact) of everything in `result`: per rank, and per expert for h and dW."""
        here = self.tokens_of(rank)
        for name in ("y", "dx", "dweights"):
            if (ours := getattr(result, name)) is not None:
                yield name, f"rank {rank}", ours, getattr(self.plain, name)[here], getattr(self.exact, name)[here]
        twin = self.twins[rank]
        for local, (begin, end) in enumerate(twin.segments):
            expert = twin.first_expert + local
            where = f"rank {rank} expert {expert}"
            if result.h is not None and end > begin:
                rows = slice(*self._merged_plan.segments[expert])
                yield "h", where, result.h[begin:end], self.plain.h[rows], self.exact.h[rows]
            for name in ("dfc1", "dfc2"):
                if (ours := getattr(result, name)) is not None:
                    plain, exact = getattr(self.plain, name)[expert], getattr(self.exact, name)[expert]
                    yield name, where, ours[local], plain, exact


@dataclass(frozen=True)
class Comparison:
    """One tensor against the oracle, its worst part (expert, rank) first by how much of the 2x rule is used."""

    name: str
    where: str
    ours: float  # relative L2 error
    plain: float
    used: float  # share of what the 2x rule allows, of the L2 or the max error; <= 1 is good

    def __str__(self) -> str:
        verdict = "ok" if self.used <= 1 else "WRONG"
        return (
            f"{self.name:9} {self.ours:9.2e} plain {self.plain:9.2e} {verdict:5} worst {self.used:6.2f}x {self.where}"
        )


def compare(name: str, where: str, ours: Tensor, plain: Tensor, exact: Tensor) -> Comparison:
    """DESIGN section 8: L2 error <= 2x plain's; max error <= 2x plain's + one bf16 ulp of the largest element."""
    assert ours.shape == exact.shape, f"{name} of {where}: shape {tuple(ours.shape)}, expected {tuple(exact.shape)}"
    ours_error, plain_error = relative_error(ours, exact), relative_error(plain, exact)
    used = [_share(ours_error, 2 * plain_error)]
    if exact.numel():
        ulp = exact.abs().max().item() * torch.finfo(torch.bfloat16).eps
        largest = [(value.double() - exact).abs().max().item() for value in (ours, plain)]
        used.append(_share(largest[0], 2 * largest[1] + ulp))
    return Comparison(name, where, ours_error, plain_error, max(used))


def _share(got: float, allowed: float) -> float:
    if got == 0:
        return 0.0
    share = got / allowed if allowed else float("inf")
    return share if share == share else float("inf")


def worst_of(layer: Layer, results: dict[int, RankResult]) -> list[Comparison]:
    """One comparison for each tensor: its worst rank or expert. results: by rank."""
    worst: dict[str, Comparison] = {}
    for rank, result in results.items():
        for part in layer.pairs(result, rank):
            found = compare(*part)
            if found.name not in worst or found.used > worst[found.name].used:
                worst[found.name] = found
    return list(worst.values())


def assert_layer(layer: Layer, results: dict[int, RankResult]) -> None:
    """The 2x rule for every tensor of every rank and expert."""
    wrong = [str(found) for found in worst_of(layer, results) if not found.used <= 1]
    assert not wrong, f"{layer.case} seed {layer.seed}:\n" + "\n".join(wrong)

"""One layer through the fused kernels: this process's rank, or R virtual ranks on streams of one GPU.

tests/csrc/emulator runs the virtual ranks on the CPU.
"""

from __future__ import annotations

import copy

import torch

from megamoe_train import ops, ops_fused, ops_plan
from megamoe_train.bench import ranks as processes
from megamoe_train.workspace import Shape, Workspace
from tests.gpu.layer_case import Layer, RankResult, assert_layer
from tests.gpu.virtual import Ranks


def shape_of(layer: Layer) -> Shape:
    case, load = layer.case, layer.case.load
    return Shape(load.ranks, load.experts, load.top_k, case.hidden, max(load.tokens))


def share_of_sms(ranks: int) -> int:
    """An even number of SMs for each of several virtual ranks."""
    return torch.cuda.get_device_properties(0).multi_processor_count // ranks // 2 * 2


def gradients(
    layer: Layer, rank: int, dtype: torch.dtype = torch.float32
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Gradients of one rank's experts, poisoned: they are to be written, not added to."""
    return tuple(
        [torch.full(weight.shape, torch.nan, device=layer.device, dtype=dtype) for weight in weights]
        for weights in layer.experts_of(rank)
    )


def maps_of(layer: Layer, rank: int) -> ops_fused.WeightMaps:
    return ops_fused.WeightMaps.of(*layer.experts_of(rank))


def one_rank(layer: Layer, rank: int, *, backward: bool = True, num_sms: int = 0) -> dict[int, RankResult]:
    """This process's rank through the whole calls, in the high-water mode. Collective."""
    workspace = Workspace.create(shape_of(layer), group=processes.group(), deadline_s=5.0)
    maps, x, p = maps_of(layer, rank), layer.xs[rank], layer.ps[rank]
    options = {"clamp": layer.case.clamp, "num_sms": num_sms}

    def forward(plan):
        return plan, *ops_fused.forward(plan, x, p, maps, **options)

    with workspace.guard.watch():
        plan, y, h = ops_plan.planned(workspace, layer.ids[rank], forward)
        result = RankResult(y, h)
        if backward:
            result.dfc1, result.dfc2 = gradients(layer, rank)
            tables = ops.GradientTable.of(result.dfc1), ops.GradientTable.of(result.dfc2)
            result.dx, result.dweights = ops_fused.backward(
                plan, layer.dys[rank], x, h.clone(), p, maps, *tables, accumulate1=False, accumulate2=False, **options
            )
        torch.cuda.synchronize()
    workspace.close()
    return {rank: result}


class VirtualRanks:
    """All ranks of a layer in this process, each on its own stream and its share of the SMs."""

    def __init__(self, layer: Layer, num_sms: int = 0, ranks: Ranks | None = None):
        load = layer.case.load
        self.num_sms = num_sms or share_of_sms(load.ranks)
        self.ranks = ranks or Ranks(load, layer.case.hidden, streams=True)
        self._in_flight: list = []  # calls: the default stream, which does not wait, may own tables that they read

    def run(self, layer: Layer, *, backward: bool = True, late: int | None = None) -> dict[int, RankResult]:
        """Forward and backward of all ranks; `late` starts after the others."""
        plans, results = self.forward(layer, late=late)
        if backward:
            self.backward(layer, plans, results, late=late)
        return dict(enumerate(results))

    def forward(self, layer: Layer, *, late: int | None = None, capacity: int = 0) -> tuple[list, list[RankResult]]:
        """Plans and results of all ranks. capacity: rows of a fixed plan; 0: enough."""
        ranks = self.ranks
        for workspace in ranks.workspaces:
            workspace.high_water = max(layer.most_rows, ops.ROW_TILE)
        with ranks.workspaces[0].guard.watch():
            ranks.synchronize()
            plans = ranks.plan(layer.ids, "fixed" if capacity else "high_water", capacity)
            self._poison_staging()
            self._delay(late)
            results = self._forward(layer, plans)
            self._settle()
        return plans, results

    def back_to_back(self, layers: list[Layer], *, late: int) -> list[dict[int, RankResult]]:
        """Forwards of all layers, then backwards from the last to the first, with nothing between them."""
        ranks, size = self.ranks, max(ops.ROW_TILE, *(layer.most_rows for layer in layers))
        with ranks.workspaces[0].guard.watch():
            plans = [ranks.give_plans(layer.ids, [size] * len(ranks.workspaces)) for layer in layers]
            self._poison_staging()
            self._delay(late)
            results = [self._forward(*given) for given in zip(layers, plans, strict=True)]
            for layer, plan, of_layer in reversed(list(zip(layers, plans, results, strict=True))):
                for rank, result in enumerate(of_layer):
                    result.dfc1, result.dfc2 = gradients(layer, rank)
                self._backward(layer, plan, of_layer, [result.h for result in of_layer], add=False)
            self._settle()
        return [dict(enumerate(of_layer)) for of_layer in results]

    def backward(
        self, layer: Layer, plans, results: list[RankResult], *, late: int | None = None, add: bool = False,
        wanted: tuple[bool, bool] = (True, True), dtype: torch.dtype = torch.float32,
    ) -> None:  # fmt: skip
        """Fills in `results`. add: to the gradients they hold; else new ones, of `dtype`. wanted: those of fc1 and of
        fc2."""
        for rank, result in enumerate(results):
            if not add:
                result.dfc1, result.dfc2 = gradients(layer, rank, dtype)
        with self.ranks.workspaces[0].guard.watch():
            self._poison_staging()
            self._delay(late)
            self._backward(layer, plans, results, [result.h.clone() for result in results], add=add, wanted=wanted)
            self._settle()

    def _forward(self, layer: Layer, plans) -> list[RankResult]:
        given = plans, layer.xs, layer.ps, self._maps(layer)
        calls = self.ranks.each(lambda *a: ops_fused.ForwardCall(*a, **self._options(layer)), *given)
        return [RankResult(call.y, call.h) for call in self._launch(calls)]

    def _backward(
        self, layer: Layer, plans, results: list[RankResult], hs: list[torch.Tensor], *, add: bool,
        wanted: tuple[bool, bool] = (True, True),
    ) -> None:  # fmt: skip
        tables = [
            [ops.GradientTable.of(kind) if is_wanted else None for kind, is_wanted in zip(both, wanted, strict=True)]
            for both in ((result.dfc1, result.dfc2) for result in results)
        ]
        calls = self.ranks.each(
            lambda plan, dy, x, h, p, maps, tables: ops_fused.BackwardCall(
                plan, dy, x, h, p, maps, *tables, accumulate1=add, accumulate2=add, **self._options(layer)
            ),
            plans, layer.dys, layer.xs, hs, layer.ps, self._maps(layer), tables,
        )  # fmt: skip
        for result, call in zip(results, self._launch(calls), strict=True):
            result.dx, result.dweights = call.dx, call.dweights

    def _poison_staging(self) -> None:
        """What a pass does not stage, or not yet, shows: NaN in all staging buffers, once all ranks are idle."""
        self.ranks.synchronize()
        for workspace in self.ranks.workspaces:
            shape = workspace.shape
            workspace.region("staging", torch.bfloat16, 2, shape.tokens, shape.hidden).fill_(torch.nan)
        self.ranks.synchronize()

    def _options(self, layer: Layer) -> dict:
        return {"clamp": layer.case.clamp, "num_sms": self.num_sms}

    def _maps(self, layer: Layer) -> list[ops_fused.WeightMaps]:
        return [maps_of(layer, rank) for rank in range(layer.case.load.ranks)]

    def _launch(self, calls: list) -> list:
        self.ranks.each(lambda call: call.begin(), calls)
        self.ranks.each(lambda call: call.launch(), calls)
        self._in_flight += calls
        return calls

    def _settle(self) -> None:
        self.ranks.synchronize()
        self._in_flight.clear()

    def _delay(self, rank: int | None) -> None:
        if rank is not None:
            self.ranks.delay(rank)


def assert_bf16_gradients(layer: Layer, ranks: VirtualRanks) -> None:
    """Written in bf16, weight gradients are the fp32 ones rounded; all else has the same bits, whoever is late."""
    plans, results = ranks.forward(layer)
    ranks.backward(layer, plans, results, late=0)
    wide = [copy.copy(result) for result in results]
    ranks.backward(layer, plans, results, late=len(results) - 1, dtype=torch.bfloat16)
    for narrow, exact in zip(results, wide, strict=True):
        assert torch.equal(narrow.dx, exact.dx) and torch.equal(narrow.dweights, exact.dweights)
        for mine, theirs in zip([*narrow.dfc1, *narrow.dfc2], [*exact.dfc1, *exact.dfc2], strict=True):
            assert mine.dtype == torch.bfloat16 and torch.equal(mine, theirs.bfloat16())


def bits(result: RankResult, layer: Layer, rank: int) -> list[torch.Tensor]:
    """Everything that is defined: rows of h that hold a token, the others whole."""
    rows = [result.h[begin:end] for begin, end in layer.twins[rank].segments]
    return [result.y, result.dx, result.dweights, *rows, *result.dfc1, *result.dfc2]


def assert_same_bits(layer: Layer, one: dict[int, RankResult], other: dict[int, RankResult]) -> None:
    for rank in one:
        pairs = zip(bits(one[rank], layer, rank), bits(other[rank], layer, rank), strict=True)
        for number, (mine, theirs) in enumerate(pairs):
            assert torch.equal(mine, theirs), f"{layer.case}: rank {rank}, tensor {number} differs"


def assert_back_to_back(layers: list[Layer], ranks: VirtualRanks) -> None:
    """Passes with nothing between them, one rank late: right, and the bits of passes one by one."""
    alone = [ranks.run(layer) for layer in layers]
    for late in range(len(ranks.ranks.workspaces)):
        found = ranks.back_to_back(layers, late=late)
        for layer, one, other in zip(layers, alone, found, strict=True):
            for result, had in zip(other.values(), one.values(), strict=True):
                result.h = had.h  # spent: dh lies there
            assert_layer(layer, other)
            assert_same_bits(layer, one, other)

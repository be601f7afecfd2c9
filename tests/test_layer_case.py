"""The comparison that judges the fused kernels, judged itself on the CPU: right results pass, each wrong one fails."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from megamoe_train import reference
from tests.gpu.layer_case import Case, Layer, RankResult, assert_layer, worst_of
from tests.gpu.virtual import Load

CASE = Case(Load("zipf", (40, 0, 70, 3), 3, 8), 64, 32, clamp=1.0, scale=2.0)


@pytest.fixture(scope="module")
def layer() -> Layer:
    return Layer(CASE, device="cpu")


def merged_results(layer: Layer, result: RankResult) -> dict[int, RankResult]:
    """What every rank holds of a result over all ranks."""
    found = {}
    for rank, twin in enumerate(layer.twins):
        tokens = layer.tokens_of(rank)
        experts = slice(twin.first_expert, twin.first_expert + twin.num_local_experts)
        h = torch.full((twin.num_rows, result.h.shape[1]), torch.nan, dtype=result.h.dtype)
        for (begin, end), (start, stop) in zip(twin.segments, layer._merged_plan.segments[experts], strict=True):
            h[begin:end] = result.h[start:stop]
        found[rank] = RankResult(
            result.y[tokens], h, result.dx[tokens], result.dweights[tokens], result.dfc1[experts], result.dfc2[experts]
        )
    return found


def test_the_plain_computation_passes_by_half(layer):
    found = worst_of(layer, merged_results(layer, layer.plain))
    assert {line.name for line in found} == {"y", "h", "dx", "dweights", "dfc1", "dfc2"}
    for line in found:
        assert 0.2 < line.used <= 0.5, str(line)
        assert line.ours == line.plain > 0
    assert_layer(layer, merged_results(layer, layer.exact))


def test_a_rank_alone_is_its_part_of_all_tokens(layer):
    """Rank 2 of a group, by the plans of all ranks and copies in one process: what a kernel has to compute."""
    twin, rank = layer.twins[2], 2
    rows = torch.zeros(twin.num_rows, CASE.hidden, dtype=torch.bfloat16)
    source_rank, flat = twin.source_of >> 40, twin.source_of & (2**40 - 1)
    for r, x in enumerate(layer.xs):
        mine = ((twin.source_of >= 0) & (source_rank == r)).nonzero().flatten()
        rows[mine] = x[flat[mine] // 3]
    h = reference.fc1_forward(rows, twin, layer.experts_of(rank)[0])
    (line,) = worst_of(layer, {rank: RankResult(h=h)})
    assert line.name == "h" and line.used <= 0.5


@pytest.mark.parametrize("name", ["y", "dx", "dweights"])
def test_one_wrong_token_fails(layer, name):
    """The largest one: the rule is about the whole tensor."""
    results = merged_results(layer, layer.exact)
    wrong = getattr(results[2], name).clone()
    wrong[wrong.norm(dim=-1).argmax()] *= 1.5
    results[2] = dataclasses.replace(results[2], **{name: wrong})
    with pytest.raises(AssertionError, match=f"{name} .*WRONG.* rank 2"):
        assert_layer(layer, results)


@pytest.mark.parametrize("value", [float("nan"), 0.0])
@pytest.mark.parametrize("name", ["dfc1", "dfc2"])
def test_one_unwritten_expert_fails(layer, name, value):
    results = merged_results(layer, layer.exact)
    grads = [grad.clone() for grad in getattr(results[0], name)]
    grads[1].fill_(value)
    results[0] = dataclasses.replace(results[0], **{name: grads})
    with pytest.raises(AssertionError, match=f"{name} .*WRONG.* rank 0 expert 1"):
        assert_layer(layer, results)


def test_gradients_of_the_next_expert_and_a_clamp_left_out_fail(layer):
    results = merged_results(layer, layer.exact)
    shifted = {r: dataclasses.replace(result, dfc1=result.dfc1[::-1]) for r, result in results.items()}
    with pytest.raises(AssertionError, match=r"dfc1 .*WRONG"):
        assert_layer(layer, shifted)
    loose = Layer(dataclasses.replace(CASE, clamp=None), device="cpu")
    with pytest.raises(AssertionError, match=r"y .*WRONG"):
        assert_layer(layer, merged_results(layer, loose.exact))

"""The fused kernels against fp64: every workload, one rank and 2, 4, 8 virtual ranks; always the same bits."""

import pytest
import torch

from tests.gpu.fused_run import VirtualRanks, assert_back_to_back, assert_bf16_gradients, assert_same_bits, one_rank
from tests.gpu.layer_case import Case, Layer, assert_layer
from tests.gpu.virtual import Load
from tests.workloads import ROUTINGS

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.usefixtures("poisoned"),
    pytest.mark.filterwarnings("ignore:.*deterministic:UserWarning"),
]

SHAPES = (  # hidden, inter, clamp, scale of fc1
    (256, 128, None, 1.0),
    (512, 384, 1.0, 3.0),  # odd column tiles; the clamp acts
    (1024, 256, 10.0, 1.0),
    (768, 640, 2.0, 2.0),
)
ONE_RANK = [Case(Load(kind, (777,), 3, 16), *SHAPES[i % len(SHAPES)]) for i, kind in enumerate(ROUTINGS)] + [
    Case(Load("uniform", (1,), 1, 1), 256, 128),
    Case(Load("uniform", (128,), 1, 4), 512, 256),
    Case(Load("uniform", (64,), 16, 16), 256, 256, 2.0),
    Case(Load("uniform", (0,), 2, 8), 256, 128),
    Case(Load("uniform", (2048,), 8, 128), 512, 256),
    Case(Load("zipf", (4096,), 6, 32), 2048, 1024, 10.0),
    Case(Load("uniform", (500,), 2, 4), 7168, 3072, 10.0),
]
TOKENS = ((300, 411), (128, 0, 333, 7), (64, 65, 1, 0, 200, 128, 3, 90))
VIRTUAL = [
    Case(Load(kind, TOKENS[i % 3], 1 + i % 4, 16), *SHAPES[i % 4]) for i, kind in enumerate(ROUTINGS + ROUTINGS[1:])
]


@pytest.mark.parametrize("case", ONE_RANK, ids=str)
def test_one_rank(case):
    layer = Layer(case)
    first = one_rank(layer, 0)
    assert_layer(layer, first)
    assert_same_bits(layer, first, one_rank(layer, 0, num_sms=10))


@pytest.mark.parametrize("num_sms", [2, 66, 130])
def test_bits_do_not_depend_on_the_number_of_sms(num_sms):
    layer = Layer(Case(Load("zipf", (1500,), 3, 16), 512, 384, 1.0, 2.0))
    assert_same_bits(layer, one_rank(layer, 0), one_rank(layer, 0, num_sms=num_sms))


@pytest.mark.parametrize("tokens", [(700, 900), (64, 65, 1, 300)], ids=str)
def test_passes_back_to_back(tokens):
    layers = [Layer(Case(Load("zipf", tokens, 3, 16), 1024, 256), seed=seed) for seed in range(3)]
    assert_back_to_back(layers, VirtualRanks(layers[0]))


@pytest.mark.parametrize("case", VIRTUAL, ids=str)
def test_virtual_ranks(case):
    """One rank late, another one each time: right, and the bits of the run in which none was."""
    layer = Layer(case, seed=1)
    ranks = VirtualRanks(layer)
    together = ranks.run(layer)
    assert_layer(layer, together)
    for late in (0, case.load.ranks - 1):
        assert_same_bits(layer, together, ranks.run(layer, late=late))


def test_bf16_gradients():
    """Of one rank and of several; one without tokens, experts without rows."""
    for tokens in ((300,), (128, 0, 77, 5)):
        layer = Layer(Case(Load("zipf", tokens, 3, 16), 512, 384, 1.0, 3.0))
        assert_bf16_gradients(layer, VirtualRanks(layer))


def test_bits_do_not_depend_on_the_number_of_ranks():
    """An expert sees the same rows in the same order whatever the ranks: h and dW of 1, 2 and 4 ranks are equal."""
    found = []
    for tokens in ((600,), (200, 400), (200, 100, 0, 300)):
        layer = Layer(Case(Load("uniform", tokens, 3, 16), 512, 256, 1.0, 2.0))
        if found:  # the same tokens, spread differently
            whole = found[0][0]
            for name in ("xs", "ids", "ps", "dys"):
                setattr(layer, name, list(torch.cat(getattr(whole, name)).split(tokens)))
            layer.fc1, layer.fc2 = whole.fc1, whole.fc2
        results = VirtualRanks(layer, num_sms=16).run(layer) if len(tokens) > 1 else one_rank(layer, 0)
        found.append((layer, results))
    first = found[0][1][0]
    for _, results in found[1:]:
        everyone = [results[rank] for rank in range(len(results))]
        for name in ("y", "dx", "dweights"):
            assert torch.equal(torch.cat([getattr(r, name) for r in everyone]), getattr(first, name)), name
        for name in ("dfc1", "dfc2"):
            mine = [gradient for r in everyone for gradient in getattr(r, name)]
            assert all(torch.equal(a, b) for a, b in zip(mine, getattr(first, name), strict=True)), name


def test_nan_and_inf_stay_with_their_tokens_and_experts():
    """A token of NaN, one of Inf, a dy of NaN: all other tokens and experts have the bits they have without them."""
    case = Case(Load("uniform", (400,), 2, 16), 512, 256, 1.0)
    clean, dirty = Layer(case), Layer(case)
    bad_x, bad_dy = torch.tensor([17, 203], device="cuda"), torch.tensor([99], device="cuda")
    dirty.xs[0][17], dirty.xs[0][203], dirty.dys[0][99] = torch.nan, torch.inf, torch.nan
    right, wrong = one_rank(clean, 0)[0], one_rank(dirty, 0)[0]
    others = torch.ones(400, dtype=torch.bool, device="cuda")
    others[bad_x] = False
    assert torch.equal(right.y[others], wrong.y[others]) and wrong.y[bad_x].isnan().any(1).all()
    others[bad_dy] = False
    assert torch.equal(right.dx[others], wrong.dx[others])
    assert torch.equal(right.dweights[others], wrong.dweights[others])
    assert wrong.dx[bad_dy].isnan().any(1).all() and wrong.dweights[bad_dy].isnan().any(1).all()
    touched = set(dirty.ids[0][torch.cat([bad_x, bad_dy])].flatten().tolist())
    assert 0 < len(touched) < 16
    for expert in range(16):
        for name in ("dfc1", "dfc2"):
            mine, theirs = getattr(wrong, name)[expert], getattr(right, name)[expert]
            assert mine.isnan().any() if expert in touched else torch.equal(mine, theirs), f"{name} of expert {expert}"

"""Every kernel comes to its end while another stream's kernel holds all SMs but the fewest that it can run on."""

import pytest
import torch

from tests.gpu import hold
from tests.gpu.fused_run import VirtualRanks, assert_same_bits
from tests.gpu.layer_case import Case, Layer
from tests.gpu.virtual import Data, Load, Ranks, check_layer, move_layer

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.usefixtures("poisoned"),
    pytest.mark.filterwarnings("ignore:.*deterministic:UserWarning"),
]

ALONE = ((Load("uniform", (1000,), 6, 64), 1024), (Load("some_dropped", (129,), 2, 8), 512))
SEVERAL = ((Load("uniform", (300, 411), 6, 64), 1024), (Load("hot_rank", (7, 0, 128, 1), 6, 64), 512))


def move_held(ranks: Ranks, load: Load, hidden: int, num_sms: int) -> None:
    """A layer by plan, dispatch and combine kernels with one free SM for each rank."""
    move_layer(ranks, Data(load, hidden, 1), num_sms=num_sms)
    data = Data(load, hidden, 2)
    torch.cuda.synchronize()
    with hold.all_but(load.ranks):
        moved = move_layer(ranks, data, num_sms=num_sms)
    check_layer(data, *moved)  # what torch compares with may need more SMs


@pytest.mark.parametrize("num_sms", [0, 1])
@pytest.mark.parametrize("load, hidden", ALONE, ids=str)
def test_one_rank(load, hidden, num_sms):
    move_held(Ranks(load, hidden), load, hidden, num_sms)


@pytest.mark.parametrize("load, hidden", SEVERAL, ids=str)
def test_virtual_ranks(load, hidden):
    """Each on a stream of its own; they wait for each other."""
    move_held(Ranks(load, hidden, streams=True), load, hidden, num_sms=1)


@pytest.mark.parametrize("tokens", [(777,), (300, 411), (128, 0, 333, 7)], ids=str)
def test_fused_layer(tokens):
    """Forward and backward with a cluster of two SMs for each rank; alone also with a grid for all SMs."""
    layer = Layer(Case(Load("zipf", tokens, 3, 16), 512, 384, 1.0, 3.0))
    made = Ranks(layer.case.load, layer.case.hidden, streams=True)
    first = VirtualRanks(layer, ranks=made).run(layer)
    for num_sms in (0, 2) if len(tokens) == 1 else (2,):
        ranks = VirtualRanks(layer, num_sms, made)
        assert_same_bits(layer, first, ranks.run(layer))
        torch.cuda.synchronize()
        with hold.all_but(2 * len(tokens), cluster_size=2):
            held = ranks.run(layer)
        assert_same_bits(layer, first, held)

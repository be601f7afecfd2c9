"""Times of the experts' passes: which passes are timed, and what is made of the times. The clock is the test's."""

from functools import partial

import pytest
import torch

from tests.megatron import layers, rows

TOKENS = 6


class Tick:
    """In place of a CUDA event: each is 2 ms later than the last, so that a pass takes 2 ms."""

    last = 0

    def __init__(self):
        Tick.last += 2
        self.at = Tick.last

    def elapsed_time(self, end) -> float:
        return float(end.at - self.at)


def one_step(layer, passes: int = 1) -> None:
    outputs = [
        layer(torch.randn(TOKENS, 1, layers.HIDDEN, dtype=torch.float64, requires_grad=True))[0] for _ in range(passes)
    ]
    sum(output.sum() for output in outputs).backward()


def timed_layer(folder, ep_size: int):
    from megamoe_train import flops
    from megamoe_train.training import passes

    layers.start(ep_size)
    first, second = (layers.new_layer(layers.config()) for _ in range(2))
    first.set_layer_number(1)
    second.set_layer_number(4)
    passes._now, passes.torch.cuda.synchronize = Tick, lambda: None
    times = passes.PassTimes(
        [torch.nn.ModuleList([first, second])], 8, rate=lambda hidden, width: 1e9 * (hidden / width)
    )
    one_step(first)
    assert times.read() == {}  # nobody asked
    times.active = True
    one_step(first, passes=3)
    ((number, found),) = times.read().items()
    assert number == 0
    # Three passes of each kind and a clock that moves at events alone. In backward the three follow one another.
    assert (found.forward_ms, found.backward_ms) == (2.0, 2.0)
    work = flops.moe_forward(TOKENS, layers.TOP_K, layers.HIDDEN, layers.INTERMEDIATE)
    arithmetic = work / 2e9
    assert found.forward_overlap == pytest.approx(arithmetic / 2e-3)
    assert found.backward_overlap == pytest.approx(2 * arithmetic / 2e-3)
    assert times.read() == {}  # read once
    one_step(second)
    assert list(times.read()) == [3]


def a_link_that_takes_longer(folder):
    from megamoe_train import flops
    from megamoe_train.training import passes

    layers.start(2)
    layer = layers.new_layer(layers.config())
    layer.set_layer_number(1)
    passes._now, passes.torch.cuda.synchronize, passes.LINK = Tick, lambda: None, 1e6
    times = passes.PassTimes([torch.nn.ModuleList([layer])], 8, rate=lambda *_: 1e18)
    times.active = True
    one_step(layer)
    travel = flops.moe_bytes_off_rank(TOKENS, layers.TOP_K, layers.HIDDEN, 2) / 1e6
    found = times.read()[0]
    assert (found.forward_overlap, found.backward_overlap) == pytest.approx((travel / 2e-3, 2 * travel / 2e-3))


def staged_experts_are_not_timed(folder):
    from megamoe_train.training import passes

    layers.start(2, experts="staged")
    assert passes.PassTimes([torch.nn.ModuleList([layers.new_layer(layers.config())])], 8)._layers == {}


ROWS = {
    "EP=1": partial(timed_layer, ep_size=1),
    "EP=2": partial(timed_layer, ep_size=2),
    "the link": a_link_that_takes_longer,
    "staged": staged_experts_are_not_timed,
}
ran = rows.fixture(__name__, world_size=2)


@pytest.mark.parametrize("row", ROWS)
def test_passes(ran, row):
    ran.check(row)


def test_the_table_of_layers_shows_them():
    from megamoe_train.training.load import LayerLoad
    from megamoe_train.training.passes import PassTime
    from megamoe_train.training.watch import layer_table

    load = {0: LayerLoad(0.5, 1.5, 0.25, 0, 3), 1: LayerLoad(0.5, 1.5, 0.25, 0, 3)}
    plain, timed = layer_table(load, {1: PassTime(5.711, 10.2, 0.604, 0.62)})
    assert plain == "  layer   0  expert load 0.50-1.50  cv 0.25  empty 0  dropped 3"
    assert timed.endswith("dropped 3  forward 5.71 ms (overlap 60%)  backward 10.20 ms (overlap 62%)")

"""What plain.py remembers of layers, and for how long; that the short way computes the same is tested on the emulator
and on GPUs (tests/gpu/leaves.py)."""

import gc
import types

import pytest
import torch

from megamoe_train import plain
from megamoe_train.experts import StackedExperts


class Space:
    sizing = "high_water"
    closed = False
    memory = torch.empty(0)


@pytest.fixture(autouse=True)
def nothing_remembered(monkeypatch):
    monkeypatch.setattr(plain, "_layers", {})
    monkeypatch.setattr(plain, "_gradients", {})
    monkeypatch.setattr(plain, "unchanged_stream", lambda _: 1)


def experts(rows: int = 4, columns: int = 2) -> list[torch.Tensor]:
    return [torch.zeros(rows, columns) for _ in range(3)]


def remembered(space, fc1, fc2, **changes):
    options = {"group": None, "maps": types.SimpleNamespace(), "clamp": None, "stream": 1} | changes
    plain.remember(space, options["group"], fc1, fc2, options["maps"], options["clamp"], options["stream"])
    return list(plain._layers.values())


def test_a_layer_is_forgotten_with_its_first_tensor():
    space, fc1, fc2 = Space(), experts(), experts()
    assert len(remembered(space, fc1, fc2)) == 1
    plain.remember_gradients(fc1, fc2, *[types.SimpleNamespace(table=None)] * 2, 1)
    del fc1
    gc.collect()
    assert not plain._layers and not plain._gradients


def test_a_workspace_is_not_kept_alive():
    space, fc1, fc2 = Space(), experts(), experts()
    (layer,) = remembered(space, fc1, fc2)
    del space
    gc.collect()
    assert layer.workspace() is None
    call = torch.zeros(1, 2), torch.zeros(1, 1, dtype=torch.int64), torch.zeros(1, 1), fc1, fc2
    assert plain.forward(*call, None, None, None, None) is None


def test_another_clamp_or_stream_leaves_calls_in_flight_alone():
    space, fc1, fc2, maps = Space(), experts(), experts(), types.SimpleNamespace()
    (first,) = remembered(space, fc1, fc2, maps=maps)
    (second,) = remembered(space, fc1, fc2, maps=maps, clamp=2.0, stream=7)
    assert (first.clamp, first.limit, first.stream) == (None, float("inf"), 1)
    assert (second.clamp, second.limit, second.stream) == (2.0, 2.0, 7)
    assert second.places is first.places


@pytest.mark.parametrize("changes", [{"stream": None}, {"sizing": "exact"}], ids=str)
def test_what_is_never_plain_is_not_remembered(changes):
    space = Space()
    space.sizing = changes.pop("sizing", space.sizing)
    assert not remembered(space, experts(), experts(), **changes)


def test_unusual_arguments_go_the_long_way(monkeypatch):
    """None of these may come to the operator: it takes tensors, and launches."""
    space, stack = Space(), (torch.zeros(3, 4, 2), torch.zeros(3, 2, 2))
    remembered(space, *map(StackedExperts, stack))
    x, ids, weights = torch.zeros(1, 2), torch.zeros(1, 1, dtype=torch.int64), torch.zeros(1, 1)
    fc1, fc2 = experts(), experts()
    _, layer = remembered(space, fc1, fc2)
    monkeypatch.setattr(torch.ops, "megamoe", types.SimpleNamespace(plain_forward=lambda *_: pytest.fail("launched")))

    class Special(torch.Tensor):
        pass

    def forward(x=x, fc1=fc1, fc2=fc2, clamp=None, group=None, workspace=space, plan=None):
        return plain.forward(x, ids, weights, fc1, fc2, clamp, group, workspace, plan)

    for unusual in (
        {"x": [1.0]},
        {"x": x.as_subclass(Special)},
        {"fc1": []},
        {"fc1": "text"},
        {"fc1": fc1[0]},
        {"fc1": [*fc1[:2], None]},
        {"fc1": [stack[0]], "fc2": [stack[1]]},
        {"clamp": 1.0},
        {"clamp": "1"},
        {"group": object()},
        {"workspace": None},
        {"workspace": Space()},
        {"plan": object()},
    ):
        assert forward(**unusual) is None, unusual
    layer.stream = 2
    assert forward() is None
    layer.stream, space.closed = 1, True
    assert forward() is None

"""Workspaces of a Megatron model: sized by Megatron's arguments, one for all layers of a shape, made at build."""

from argparse import Namespace
from functools import partial

import pytest
import torch

from tests.megatron import layers, rows


@pytest.mark.parametrize(
    ("changed", "tokens"),
    [
        ({}, 2 * 4096),
        ({"context_parallel_size": 2}, 2 * 2048),
        ({"tensor_model_parallel_size": 4}, 2 * 4096),  # without sequence parallelism every rank holds all tokens
        ({"tensor_model_parallel_size": 4, "sequence_parallel": True, "context_parallel_size": 2}, 2 * 512),
        ({"eval_micro_batch_size": 3}, 3 * 4096),
        ({"eval_micro_batch_size": 1}, 2 * 4096),
    ],
)
def test_tokens_of_a_rank(changed, tokens):
    from megamoe_train.megatron.workspaces import tokens_of

    settings = {"seq_length": 4096, "micro_batch_size": 2, "eval_micro_batch_size": None, "sequence_parallel": False}
    settings |= {"tensor_model_parallel_size": 1, "context_parallel_size": 1}
    assert tokens_of(Namespace(**settings | changed)) == tokens


class Created:
    """In place of Workspace.create: what was asked for, without CUDA."""

    def __init__(self):
        self.calls = []

    def __call__(self, shape, *, group, device, deadline_s, sizing, capacity):
        from tests.fake_fused import FakeWorkspace

        self.calls.append((shape, torch.distributed.get_world_size(group), device, deadline_s))
        self.sizing = sizing, capacity
        return FakeWorkspace(shape, torch.distributed.get_rank(group))


class PlanningBackend:
    """In place of the fused backend: keeps how a plan was asked for."""

    def plan(self, topk_ids, num_experts, group, workspace, *, hidden_size):
        self.asked = tuple(topk_ids.shape), num_experts, torch.distributed.get_world_size(group), hidden_size
        self.workspace = workspace
        return "the plan"


def on_a_gpu(folder, ep_size):
    """Everything but the device: layers are built as if the fused backend served them."""
    patch = pytest.MonkeyPatch()
    try:
        _built_layers(patch, ep_size)
    finally:
        patch.undo()


def _built_layers(patch, ep_size):
    from megamoe_train import backends, install, ops
    from megamoe_train.megatron import workspaces
    from megamoe_train.workspace import Shape, Workspace

    created, backend = Created(), PlanningBackend()
    layers.start(ep_size, tokens=512, deadline_s=90.0)
    patch.setattr(workspaces, "_made", {})
    patch.setattr(Workspace, "create", created)
    patch.setattr(backends, "resolve", lambda name, *tensors: "fused")
    patch.setattr(backends, "get", lambda name: backend)
    first, second = layers.new_layer(layers.config()), layers.new_layer(layers.config())
    shape = Shape(ep_size, layers.EXPERTS, layers.TOP_K, layers.HIDDEN, 512)
    assert created.calls == [(shape, ep_size, "cuda", 90.0)]
    layers.new_layer(layers.config(moe_router_topk=3))
    assert [call[0].top_k for call in created.calls] == [2, 3] and len(workspaces.made()) == 2
    spaces = []
    for layer in (first, second):
        layer.token_dispatcher._forward = layers_forward = type("Forward", (), {})()
        layers_forward.topk_ids = torch.zeros(5, layers.TOP_K, dtype=torch.int64)
        layer.token_dispatcher.token_dispatch(torch.zeros(5, layers.HIDDEN), torch.zeros(5, layers.TOP_K))
        assert layers_forward.plan == "the plan"
        assert backend.asked == ((5, layers.TOP_K), layers.EXPERTS, ep_size, layers.HIDDEN)
        spaces.append(backend.workspace)
    assert spaces[0] is spaces[1] and spaces[0].shape == shape
    assert created.sizing == ("high_water", 0)
    install(sizing="fixed", capacity=1280)
    layers.new_layer(layers.config())  # another sizing is another workspace
    assert created.sizing == ("fixed", 1280) and len(created.calls) == 3
    install(sizing="high_water", capacity=0)
    patch.setattr(ops, "load", lambda: None)
    install(experts="staged")
    assert layers.new_layer(layers.config()).token_dispatcher.staged.workspace is spaces[0]
    install(tokens=None)
    with pytest.raises(ValueError, match="megamoe: tokens: got None with staged experts; allowed: the most"):
        layers.new_layer(layers.config())
    install(experts="paired")
    install(tokens=None)
    if ep_size > 1:
        with pytest.raises(ValueError, match="megamoe: tokens: got None with expert parallelism; allowed: the most"):
            layers.new_layer(layers.config())
    else:
        layers.new_layer(layers.config())
        assert len(created.calls) == 3  # one rank takes what calls without a workspace share
        install(sizing="exact")
        with pytest.raises(ValueError, match="megamoe: tokens: got None with sizing exact; allowed: the most"):
            layers.new_layer(layers.config())


def test_a_step_whose_rows_had_no_room_is_found_before_it_is_saved(monkeypatch):
    from megamoe_train.megatron import workspaces

    looked_at = []
    spaces = [Namespace(closed=closed, sizing=sizing) for closed in (False, True) for sizing in ("fixed", "high_water")]
    monkeypatch.setattr(workspaces, "_made", dict(enumerate(spaces)))
    monkeypatch.setattr(workspaces, "check_workspace", lambda space, wait: looked_at.append((space, wait)))
    workspaces.check()
    assert looked_at == [(spaces[0], True)]


def without_a_gpu(folder):
    """The reference needs no workspace and plans as ever."""
    from megamoe_train.megatron import workspaces
    from megamoe_train.plan import RoutingPlan

    layers.start(2, tokens=512)
    dispatcher = layers.new_layer(layers.config()).token_dispatcher
    assert isinstance(dispatcher.planner(torch.zeros(3, layers.TOP_K, dtype=torch.int64)), RoutingPlan)
    assert workspaces.made() == []


ROWS = {
    "EP=2": partial(on_a_gpu, ep_size=2),
    "EP=1": partial(on_a_gpu, ep_size=1),
    "reference": without_a_gpu,
}
ran = rows.fixture(__name__, world_size=2)


@pytest.mark.skipif(
    torch.cuda.is_available(), reason="plays a GPU on a machine without one; tests/gpu has the real one"
)
@pytest.mark.parametrize("row", ROWS)
def test_layers(ran, row):
    ran.check(row)

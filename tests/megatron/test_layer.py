"""MoELayer with megamoe against MoELayer with alltoall, same weights, fp64: outputs and every gradient."""

from functools import partial

import pytest
import torch
import torch.distributed as dist

from tests.megatron import layers, rows


def same_as_alltoall(folder, ep_size=2, sizes=(12,), order=None, batch=1, options=(), forward=(), **fields):
    """Both layers on the same input, different on every rank; `sizes`: tokens of each micro-batch in flight."""
    layers.start(ep_size, **dict(options))
    theirs, ours = layers.twins(**fields)
    assert differ_between_ranks(ours, ep_size)
    inputs = [layers.hidden(tokens, seed=i, batch=batch) for i, tokens in enumerate(sizes)]
    seen = [layers.run(layer, *inputs, order=order, **dict(forward)) for layer in (theirs, ours)]
    layers.assert_equal(seen[1], seen[0])
    # An expert without tokens has a gradient of zeros, which alone would check nothing.
    assert all(seen[0][name].any() for name in ("y0", "dx0", "router.weight"))
    assert any(seen[0][name].any() for name in seen[0] if name.startswith("experts"))
    return theirs, ours


def differ_between_ranks(layer, ep_size) -> bool:
    """Equal experts on all ranks would hide an error in the expert offset."""
    first = next(iter(layer.experts.parameters())).detach().sum()
    sums = [torch.zeros_like(first) for _ in range(dist.get_world_size())]
    dist.all_gather(sums, first)
    return len({s.item() for s in sums}) == ep_size


def padding_mask(folder):
    """`[batch, tokens]`, True marks padding: left out of the router's statistics, dispatched like any token."""
    mask = torch.zeros(2, 12, dtype=torch.bool)
    mask[:, 9:] = True
    same_as_alltoall(folder, batch=2, forward={"padding_mask": mask}, **BALANCED)


def eval_between(folder):
    """An evaluation between forward and backward leaves the pending backward as it was."""
    layers.start(2)
    _, layer = layers.twins()
    x, other = layers.hidden(12), layers.hidden(5, seed=9)
    expected = layers.run(layer, x)
    layer.zero_grad(set_to_none=True)
    x = x.detach().clone().requires_grad_()
    y = layer(x)[0]
    layer.eval()
    with torch.no_grad():
        assert not layer(other)[0].requires_grad
    layer.train()
    (y * torch.cos(torch.arange(layers.HIDDEN, dtype=torch.float64))).sum().backward()
    grads = {name: p.grad for name, p in layer.named_parameters()}
    layers.assert_equal({"y0": y.detach(), "dx0": x.grad} | grads, expected, tolerance=0)


def frozen(folder):
    """Frozen experts get no gradient, the rest the same as ever; a frozen router likewise."""
    layers.start(2)
    twins = layers.twins()
    x = layers.hidden(12)
    for part in ("experts", "router"):
        for layer in twins:
            layer.requires_grad_(True)
            getattr(layer, part).requires_grad_(False)
        seen = [layers.run(layer, x) for layer in twins]
        assert not any(name.startswith(part) for name in seen[1])
        layers.assert_equal(seen[1], seen[0])


def foreign_experts(folder):
    """Experts of a class we do not know are run as they are, between a real dispatch and a real combine."""
    from megatron.core.transformer.moe.experts import SequentialMLP

    class Foreign(SequentialMLP):
        """Twice what SequentialMLP gives."""

        def forward(self, tokens, tokens_per_expert, probs):
            output, bias = super().forward(tokens, tokens_per_expert, probs)
            return 2 * output, bias

    layers.start(2)
    theirs, ours = layers.twins(experts=Foreign)
    assert type(ours.experts) is Foreign and not ours.token_dispatcher.paired
    x = layers.hidden(12)
    expected, seen = layers.run(theirs, x), layers.run(ours, x)
    layers.assert_equal({"y": seen["y0"]}, {"y": 2 * expected["y0"]})
    layers.assert_equal({"dx": seen["dx0"]}, {"dx": 2 * expected["dx0"]})


def staged_option(folder):
    """install(experts="staged") keeps Megatron's experts where we could pair; the default pairs."""
    from megatron.core.transformer.moe.experts import SequentialMLP

    from megamoe_train.megatron.experts import MegaMoESequentialMLP

    _, ours = same_as_alltoall(folder, options={"experts": "staged"})
    assert type(ours.experts) is SequentialMLP and not ours.token_dispatcher.paired
    _, ours = same_as_alltoall(folder)
    assert type(ours.experts) is MegaMoESequentialMLP and ours.token_dispatcher.paired


def recompute_h(folder):
    """install(recompute="fc1") reaches the call; same numbers."""
    _, ours = same_as_alltoall(folder, options={"recompute": "fc1"})
    assert ours.experts.recompute == "fc1"


def same_parameters(folder):
    """Adopted in place: the very objects, their names, their flags; and the same sharded checkpoint."""
    from megamoe_train.megatron import experts

    layers.start(2)
    theirs, ours = layers.twins()
    seen = [[(n, p.shape, getattr(p, "allreduce", True)) for n, p in x.named_parameters()] for x in (theirs, ours)]
    assert seen[0] == seen[1]
    assert not any(p.allreduce for p in ours.experts.parameters())
    shards = [layer.sharded_state_dict(prefix="mlp.") for layer in (theirs, ours)]
    assert shards[0].keys() == shards[1].keys() and any("experts" in key for key in shards[0])
    for key, shard in shards[0].items():
        mine = shards[1][key]
        assert (type(mine), mine.key, mine.replica_id) == (type(shard), shard.key, shard.replica_id)
        if hasattr(shard, "global_offset"):
            assert (mine.global_shape, mine.global_offset) == (shard.global_shape, shard.global_offset)
    before = list(theirs.experts.parameters())
    experts.pair(theirs.experts, backend="auto", recompute=None)
    assert all(a is b for a, b in zip(before, theirs.experts.parameters(), strict=True))
    assert ours.backward_dw() is None  # MoELayer's own, which calls the experts'


def hooks_of_children(folder):
    """Pre-hooks fire, hooks that cannot fire are named, a hook that replaces an input is an error."""
    layers.start(2)
    _, layer = layers.twins()
    linear, fired = layer.experts.local_experts[1].linear_fc1, []
    handles = [linear.register_forward_pre_hook(lambda module, args: fired.append(module))]
    handles += [linear.register_forward_pre_hook(lambda module, args, kwargs: fired.append(kwargs), with_kwargs=True)]
    layer(layers.hidden(4))
    assert fired == [linear, {}]
    handles += [linear.register_forward_hook(lambda *unused: None)]
    from megamoe_train.megatron import experts

    layer(layers.hidden(4))
    assert any("local_experts.1.linear_fc1 never fire" in message for message in experts._warned)
    for handle in handles:
        handle.remove()
    linear.register_forward_pre_hook(lambda module, args: (1,))
    with pytest.raises(RuntimeError, match=r"local_experts\.1\.linear_fc1 replaces its input"):
        layer(layers.hidden(4))


REFUSED = {  # what the error must name, and the fields that TransformerConfig itself wants with it
    "moe_pad_expert_input_to_capacity": dict(moe_pad_expert_input_to_capacity=True, moe_expert_capacity_factor=1.0),
    "activation_func": dict(activation_func=torch.nn.functional.gelu),
    "add_bias_linear": dict(add_bias_linear=True),
    "moe_apply_probs_on_input": dict(
        moe_apply_probs_on_input=True, moe_router_topk=1, moe_router_score_function="sigmoid"
    ),
}


def refusals_and_others(folder):
    """A layer that cannot be ours says why, by name; layers of other dispatchers are Megatron's alone."""
    from megatron.core.transformer.moe.experts import SequentialMLP
    from megatron.core.transformer.moe.moe_layer import MoELayer
    from megatron.core.transformer.moe.token_dispatcher import MoEAllGatherTokenDispatcher, MoEAlltoAllTokenDispatcher

    from megamoe_train import install

    layers.start(2)
    for name, fields in REFUSED.items():
        with pytest.raises(ValueError, match=f"TransformerConfig.{name} = "):
            layers.new_layer(layers.config(**fields))
    for kind, dispatcher in (("alltoall", MoEAlltoAllTokenDispatcher), ("allgather", MoEAllGatherTokenDispatcher)):
        layer = layers.new_layer(layers.config(kind))
        assert type(layer.token_dispatcher) is dispatcher and type(layer.experts) is SequentialMLP
    wrapped = MoELayer.__init__
    install()
    assert MoELayer.__init__ is wrapped  # once, however often it is called
    with pytest.raises(ValueError, match=r"backend: got 'cuda'; allowed: 'auto', 'fused', 'reference'"):
        install(backend="cuda")
    with pytest.raises(ValueError, match="Unsupported token dispatcher type: nonsense"):
        layers.new_layer(layers.config("nonsense"))
    refuse_wrappers()
    cfg = layers.config(ffn_hidden_size=512)  # SequentialMLP then keeps a copy of the config
    layer = layers.new_layer(cfg)
    assert layer.config is cfg and layer.experts.config is not cfg
    assert {cfg.moe_token_dispatcher_type, layer.experts.config.moe_token_dispatcher_type} == {"megamoe"}


def refuse_wrappers():
    """Without a command line, the data-parallel wrappers say what cannot work around a model of ours."""
    from megatron.core import distributed

    cfg = layers.config()
    ddp = distributed.DistributedDataParallelConfig(delay_wgrad_compute=True)
    with pytest.raises(ValueError, match=r"DistributedDataParallelConfig\.delay_wgrad_compute = True"):
        distributed.DistributedDataParallel(cfg, ddp, layers.new_layer(cfg))
    for sharded in (distributed.FullyShardedDataParallel, distributed.TorchFullyShardedDataParallel):
        with pytest.raises(ValueError, match=f"{sharded.__name__}: it frees expert weights"):
            sharded(cfg, ddp, layers.new_layer(cfg))


RECOMPUTED = dict(recompute_granularity="selective", recompute_modules=["moe"])
BALANCED = dict(moe_router_load_balancing_type="aux_loss", moe_aux_loss_coeff=0.1)
ROWS = {
    "EP=1": partial(same_as_alltoall, ep_size=1),
    "EP=2": same_as_alltoall,
    "one local expert": partial(same_as_alltoall, num_moe_experts=2),
    "batch of 3": partial(same_as_alltoall, batch=3),
    "K = 1": partial(same_as_alltoall, moe_router_topk=1, moe_router_score_function="sigmoid"),
    "K = 6, scaled": partial(
        same_as_alltoall, moe_router_topk=6, moe_router_score_function="sigmoid", moe_router_topk_scaling_factor=2.5
    ),
    "sqrtsoftplus, expert bias, sequence aux loss": partial(
        same_as_alltoall,
        moe_router_score_function="sqrtsoftplus",
        moe_router_enable_expert_bias=True,
        **BALANCED | {"moe_router_load_balancing_type": "seq_aux_loss"},
    ),
    "aux loss and z loss": partial(same_as_alltoall, moe_z_loss_coeff=0.1, **BALANCED),
    "clamp": partial(same_as_alltoall, activation_func_clamp_value=0.05),
    "shared experts": partial(same_as_alltoall, moe_shared_expert_intermediate_size=128),
    "gated shared experts": partial(
        same_as_alltoall, moe_shared_expert_intermediate_size=128, moe_shared_expert_gate=True
    ),
    "dropped tokens, by probability": partial(same_as_alltoall, moe_expert_capacity_factor=0.5, **BALANCED),
    "dropped tokens, by position": partial(
        same_as_alltoall, moe_expert_capacity_factor=0.5, moe_token_drop_policy="position", **BALANCED
    ),
    "padding mask": padding_mask,
    "recomputed layer": partial(same_as_alltoall, **RECOMPUTED),
    "recomputed h": recompute_h,
    "three micro-batches in flight, the last smaller": partial(same_as_alltoall, sizes=(12, 12, 5)),
    "three in flight, backward in forward order": partial(same_as_alltoall, sizes=(12, 9, 5), order=(0, 1, 2)),
    "three in flight, recomputed": partial(same_as_alltoall, sizes=(12, 9, 5), order=(1, 2, 0), **RECOMPUTED),
    "three in flight, staged": partial(
        same_as_alltoall, sizes=(12, 9, 5), order=(1, 2, 0), options={"experts": "staged"}
    ),
    "eval and no_grad between forward and backward": eval_between,
    "frozen experts, frozen router": frozen,
    "foreign experts": foreign_experts,
    "staged option": staged_option,
    "names, flags, checkpoint shards; nothing copied": same_parameters,
    "hooks of the modules inside": hooks_of_children,
    "refusals; other dispatchers untouched": refusals_and_others,
}
WIDE = {  # two EP groups side by side, and one of 4 ranks
    "EP=2, twice": same_as_alltoall,
    "EP=4": partial(same_as_alltoall, ep_size=4),
    "EP=4, one local expert": partial(same_as_alltoall, ep_size=4, num_moe_experts=4),
}
ran = rows.fixture(__name__, world_size=2)
ran_wide = rows.fixture(__name__, world_size=4, table="WIDE")


@pytest.mark.parametrize("row", ROWS)
def test_layer(ran, row):
    ran.check(row)


@pytest.mark.parametrize("row", WIDE)
def test_layer_on_four_ranks(ran_wide, row):
    ran_wide.check(row)

"""Single MoE layers for the tests: Megatron's MoELayer on a gloo group, with Megatron's dispatcher or ours.

`start` is called once per `run_ranks` process. Layers are in fp64, so that equal mathematics agrees to 1e-12 and any
difference in it shows.
"""

import copy

import torch
import torch.distributed as dist
import torch.nn.functional as F

HIDDEN, INTERMEDIATE = 256, 128
EXPERTS, TOP_K = 8, 2


def start(ep_size: int, seed: int = 7, **options) -> None:
    """megamoe installed, process groups with `ep_size`, RNG tracker seeded: experts differ from rank to rank."""
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    from megamoe_train import install

    install(**{"experts": "paired", "recompute": None} | options)
    parallel_state.destroy_model_parallel()
    parallel_state.initialize_model_parallel(expert_model_parallel_size=ep_size)
    model_parallel_cuda_manual_seed(seed)


def config(dispatcher: str = "megamoe", **fields):
    """A TransformerConfig of one MoE layer, SwiGLU experts without biases."""
    from megatron.core import parallel_state
    from megatron.core.transformer.transformer_config import TransformerConfig

    settings = dict(
        num_layers=1,
        hidden_size=HIDDEN,
        ffn_hidden_size=INTERMEDIATE,
        moe_ffn_hidden_size=INTERMEDIATE,
        num_attention_heads=4,
        num_moe_experts=EXPERTS,
        moe_router_topk=TOP_K,
        moe_router_load_balancing_type="none",
        moe_token_dispatcher_type=dispatcher,
        moe_router_dtype="fp64",
        expert_model_parallel_size=parallel_state.get_expert_model_parallel_world_size(),
        add_bias_linear=False,
        gated_linear_unit=True,
        activation_func=F.silu,
        bias_activation_fusion=False,
        gradient_accumulation_fusion=False,
    )
    return TransformerConfig(**settings | fields)


def new_layer(cfg, experts=None):
    """A fresh MoELayer; `experts` replaces the class of Megatron's local spec."""
    from functools import partial

    from megatron.core.models.gpt.moe_module_specs import get_moe_module_spec

    spec = get_moe_module_spec(use_te=False, num_experts=cfg.num_moe_experts, moe_grouped_gemm=False)
    submodules = copy.copy(spec.keywords["submodules"])
    if experts is not None:
        submodules.experts = partial(experts, **submodules.experts.keywords)
    layer = spec.func(cfg, submodules=submodules)
    layer.set_layer_number(1)
    return layer.double()


def twins(*, experts=None, **fields) -> tuple:
    """(alltoall layer, megamoe layer) with the same weights; experts differ on every rank."""
    theirs = new_layer(config("alltoall", **fields))
    ours = new_layer(config("megamoe", **fields), experts)
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours


def hidden(tokens: int, seed: int = 0, batch: int = 1) -> torch.Tensor:
    """`[tokens, batch, H]` that differs on every rank and requires a gradient."""
    generator = torch.Generator().manual_seed(1000 * seed + dist.get_rank())
    x = torch.randn(tokens, batch, HIDDEN, generator=generator, dtype=torch.float64)
    return x.requires_grad_()


def run(layer, *inputs, order=None, **kwargs) -> dict[str, torch.Tensor]:
    """Forward of every input, then backward in `order` (default: reversed). Outputs and all gradients by name."""
    layer.zero_grad(set_to_none=True)
    inputs = [x.detach().clone().requires_grad_() for x in inputs]
    outputs = [layer(x, **kwargs)[0] for x in inputs]
    for i in order or reversed(range(len(inputs))):
        (outputs[i] * torch.cos(torch.arange(HIDDEN, dtype=torch.float64))).sum().backward()
    grads = {name: p.grad for name, p in layer.named_parameters() if p.grad is not None}
    seen = {f"y{i}": y.detach() for i, y in enumerate(outputs)} | {f"dx{i}": x.grad for i, x in enumerate(inputs)}
    return seen | grads


def assert_equal(ours: dict, theirs: dict, tolerance: float = 1e-11) -> None:
    """The same names, and the same tensors up to fp64 rounding."""
    assert ours.keys() == theirs.keys(), ours.keys() ^ theirs.keys()
    for name, mine in ours.items():
        other = theirs[name]
        assert mine.shape == other.shape, name
        error = (mine - other).abs().max().item() if mine.numel() else 0.0
        assert error <= tolerance * max(1.0, other.abs().max().item() if other.numel() else 1.0), f"{name}: {error}"

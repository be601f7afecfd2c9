"""The FLOP and byte model against Megatron's own count, against torch's counter, and against the measured machine."""

from __future__ import annotations

import argparse

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from megamoe_train import flops, recipes
from megamoe_train.shapes import ModelShape
from tests.test_memory import FLASH, settings_of
from tests.twin import twin


@pytest.mark.parametrize("name", [name for name in recipes.names() if "proxy" not in name])
@pytest.mark.parametrize("engine", [False, True])
def test_a_step_has_the_flops_that_megatron_counts(name, engine):
    """Megatron leaves out routers and the prediction layers' joining matrix, and counts norms of latent attention."""
    from megatron.training.training import num_floating_point_operations

    if name == "debug" and engine:
        pytest.skip("debug has one form")
    given = settings_of(name, engine, {})
    model = ModelShape.of(given)
    args = _megatron_arguments(given, model)
    tokens = 16 * model.sequence
    joins = model.mtp * 2 * tokens * 2 * model.hidden**2
    routers = 2 * tokens * model.hidden * model.experts * (sum(model.moe_layers) + model.mtp)
    ours = flops.step(model, tokens) - 3 * (routers + joins)
    theirs = num_floating_point_operations(args, 16)
    assert ours == pytest.approx(theirs, rel=2e-3)
    assert theirs > 0


def _megatron_arguments(given: dict, model: ModelShape) -> argparse.Namespace:
    """What Megatron's function reads, as its parser would have set it."""
    values = {name.replace("-", "_"): value for name, value in given.items()}
    latent = model.attention.latent
    defaults = {
        "padded_vocab_size": model.vocab,
        "group_query_attention": False,
        "num_query_groups": model.attention.groups,
        "kv_channels": model.attention.qk_dim,
        "ffn_hidden_size": model.dense_width,
        "multi_latent_attention": latent,
        "mtp_num_layers": None,
        "moe_shared_expert_intermediate_size": None,
        "moe_latent_size": None,
        "attention_output_gate": False,
        "experimental_attention_variant": None,
        "hybrid_layer_pattern": None,
        "is_hybrid_model": False,
    }
    return argparse.Namespace(**(defaults | values))


def test_one_layer_has_the_flops_that_torch_counts():
    tokens, top_k, experts, hidden, width = 24, 2, 4, 32, 16
    x, fc1, fc2 = (torch.randn(s, requires_grad=True) for s in ((24, 32), (4, 32, 32), (4, 32, 16)))
    ids = torch.stack([torch.randperm(experts)[:top_k] for _ in range(tokens)])
    with FlopCounterMode(display=False) as forward:
        y = twin(x, ids, torch.ones(tokens, top_k), fc1, fc2)
    assert forward.get_total_flops() == flops.moe_forward(tokens, top_k, hidden, width)
    with FlopCounterMode(display=False) as backward:
        y.sum().backward()
    assert backward.get_total_flops() == flops.moe_backward(tokens, top_k, hidden, width)


def test_the_measured_load_of_the_design():
    """T 8192, K 6, H 4096, I 2048: 2.47 and 4.95 TFLOP, 201 MB off-rank at EP = 2."""
    assert flops.moe_forward(8192, 6, 4096, 2048) == pytest.approx(2.47e12, rel=2e-3)
    assert flops.moe_backward(8192, 6, 4096, 2048) == pytest.approx(4.95e12, rel=2e-3)
    assert flops.moe_bytes_off_rank(8192, 6, 4096, 2) == pytest.approx(201e6, rel=2e-3)
    assert flops.moe_bytes_off_rank(8192, 6, 4096, 1) == 0


def test_six_flops_per_active_parameter_and_token():
    """The rule of thumb, which leaves out attention's square and counts the embedding's look-up."""
    from megamoe_train import memory

    model = ModelShape.of(settings_of("mixtral_8x7b_pretrain_16gpu_h100_bf16", True, {}))
    tokens = 1 << 20
    square = 3 * tokens * model.sequence * model.attention.heads * 2 * model.attention.qk_dim * model.layers
    embedding = model.vocab * model.hidden
    expected = 6 * tokens * (memory.active_parameters(model) - embedding) + square
    assert flops.step(model, tokens) == pytest.approx(expected, rel=1e-3)


def test_mfu_is_a_share_of_the_peak_of_the_device():
    assert flops.peak_of("NVIDIA H100 80GB HBM3") == flops.peak_of("NVIDIA H200") == 989.4e12
    assert flops.peak_of("NVIDIA H100 PCIe") == 756e12
    assert flops.mfu(494.7, "NVIDIA H100 80GB HBM3") == pytest.approx(0.5)
    assert flops.mfu(1.0, "") is None
    model = ModelShape.of(settings_of(FLASH, True, {}))
    assert flops.tflops_per_gpu(model, 4096, 2.0, 8) == pytest.approx(flops.step(model, 4096) / 16e12)


def test_overlap_efficiency():
    assert flops.overlap_efficiency(1.0, 3.0, 3.0) == 1
    assert flops.overlap_efficiency(1.0, 3.0, 4.0) == 0.75
    with pytest.raises(ValueError, match="measured_s: got 0"):
        flops.overlap_efficiency(1.0, 3.0, 0)

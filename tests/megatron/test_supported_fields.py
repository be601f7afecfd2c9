"""What the field table calls supported, tried: training with megamoe and the field set is that with alltoall."""

import warnings
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from tests.distributed import run_ranks
from tests.megatron.equivalence import Report, compare_bf16, compare_fp32, merged
from tests.megatron.tiny_gpt import Setup

pytestmark = pytest.mark.timeout(600)  # on a machine that is short of cores; 25 s on two free ones
RANKS = 2
NO_BIAS = {"moe_router_enable_expert_bias": False}
NO_LOSS = {"moe_aux_loss_coeff": 0.0}
OVERLAP = {"use_distributed_optimizer": True, "overlap_grad_reduce": True}


def setup(fields: dict | None = None, ddp: dict | None = None, **changes) -> Setup:
    return replace(Setup(ep_size=2), fields=tuple((fields or {}).items()), ddp=tuple((ddp or {}).items()), **changes)


# Row -> setup. The row names the fields that it is about.
PAIRED = {
    "moe_router_dtype=None": setup({"moe_router_dtype": None}),
    "moe_router_dtype=fp64": setup({"moe_router_dtype": "fp64"}),
    "moe_router_score_function=sigmoid": setup({"moe_router_score_function": "sigmoid"}),
    "moe_router_score_function=softmax": setup({"moe_router_score_function": "softmax"} | NO_BIAS),
    "moe_router_pre_softmax": setup({"moe_router_score_function": "softmax", "moe_router_pre_softmax": True} | NO_BIAS),
    "moe_router_group_topk": setup({"moe_router_num_groups": 4, "moe_router_group_topk": 2}),
    "moe_router_load_balancing_type=sinkhorn": setup(
        {"moe_router_load_balancing_type": "sinkhorn", "moe_router_score_function": "softmax"} | NO_BIAS | NO_LOSS
    ),
    "moe_router_load_balancing_type=quantile_balancing": setup(
        {"moe_router_load_balancing_type": "quantile_balancing"} | NO_BIAS | NO_LOSS
    ),
    "moe_aux_loss_coeff, a list": setup(
        {"moe_router_load_balancing_type": ["aux_loss", "global_aux_loss"], "moe_aux_loss_coeff": [0.1, 0.1]}
    ),
    "moe_z_loss_coeff, moe_input_jitter_eps": setup({"moe_z_loss_coeff": 0.1, "moe_input_jitter_eps": 0.1}),
    "moe_router_force_load_balancing": setup({"moe_router_force_load_balancing": True}),
    "moe_router_force_biased": setup({"moe_router_force_biased": -0.5}),
    "moe_expert_capacity_factor, by probs": setup({"moe_expert_capacity_factor": 0.6}),
    "moe_expert_capacity_factor, by position": setup(
        {"moe_expert_capacity_factor": 0.6, "moe_token_drop_policy": "position"}
    ),
    "moe_shared_expert_gate": setup({"moe_shared_expert_gate": True}),
    "moe_shared_expert_intermediate_size=None": setup({"moe_shared_expert_intermediate_size": None}),
    "mlp_chunks_for_training": setup({"mlp_chunks_for_training": 3}),
    "recompute_granularity=full": setup(
        {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
    ),
    "recompute_modules=moe": setup({"recompute_granularity": "selective", "recompute_modules": ["moe"]}),
    "moe_layer_freq": setup(moe_layers=(0, 1)),
    "hidden_dropout, attention_dropout": setup({"hidden_dropout": 0.1, "attention_dropout": 0.1}),
    "deterministic_mode": setup({"deterministic_mode": True}),
    "bias_activation_fusion without a clamp": setup({"bias_activation_fusion": True}, clamp=None),
    "use_distributed_optimizer, overlap_grad_reduce": setup(ddp=OVERLAP),
    "overlap_param_gather": setup(ddp=OVERLAP | {"overlap_param_gather": True}),
    "average_in_collective, bucket_size": setup(ddp={"average_in_collective": True, "bucket_size": 1000}),
    "bf16, grad_reduce_in_fp32=False": setup(ddp={"grad_reduce_in_fp32": False}, dtype=torch.bfloat16),
    "bf16, param_name_patterns_for_fp32_local_accumulation": setup(
        ddp={"grad_reduce_in_fp32": False, "param_name_patterns_for_fp32_local_accumulation": ("*experts*",)},
        dtype=torch.bfloat16,
    ),
}
# What only our own experts refuse works between a real dispatch and combine.
STAGED = {
    "staged: activation_func=gelu": setup({"activation_func": F.gelu}, experts="staged"),
    "staged: gated_linear_unit=False": setup({"gated_linear_unit": False}, experts="staged", clamp=None),
    "staged: glu_linear_offset": setup({"glu_linear_offset": 1.0}, experts="staged"),
    "staged: add_bias_linear": setup(
        {"add_bias_linear": True, "expert_tensor_parallel_size": 1, "moe_shared_expert_intermediate_size": None},
        experts="staged",
    ),
    "staged: moe_apply_probs_on_input": setup(
        {"moe_apply_probs_on_input": True}, experts="staged", top_k=1, clamp=None
    ),
}
ROWS = PAIRED | STAGED


def steps(row: Setup) -> int:
    """What DDP does to the weights shows in the second step."""
    return 2 if row.ddp else 1


def run_rows(rank: int, world_size: int) -> list[Report]:
    """On every rank: the rows, one after another."""
    warnings.simplefilter("ignore")
    compare = {torch.float32: compare_fp32, torch.bfloat16: compare_bf16}
    return [compare[row.dtype](row, steps(row)) for row in ROWS.values()]


@pytest.fixture(scope="module")
def reports():
    of_ranks = run_ranks(run_rows, RANKS, timeout=550)
    return {name: merged([mine[i] for mine in of_ranks]) for i, name in enumerate(ROWS)}


@pytest.mark.parametrize("name", ROWS)
def test_trains_as_with_alltoall(reports, name):
    assert reports[name].problems == []
    assert reports[name].num_gradients > 0 and len(reports[name].losses) == steps(ROWS[name])

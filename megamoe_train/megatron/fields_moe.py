"""TransformerConfig of megatron-core 0.19.2: the MoE layer, and all that changes what an expert computes.

See fields.py. PAIRED marks what our experts do not compute, while Megatron's own experts, staged, do.
"""

import torch.nn.functional as F

from megamoe_train.config import HIDDEN_MULTIPLE, INTERMEDIATE_MULTIPLE, MAX_TOP_K
from megamoe_train.megatron.fields import (
    KERNELS,
    PAIRED,
    SET,
    TRUE,
    Values,
    but,
    irrelevant,
    limited,
    refuse,
    show,
    supported,
    values,
)

_ROUTER = "in Megatron's router, which stays; the dispatcher takes its probs and routing map"
_FLEX = "read only by the flex dispatcher, which megamoe takes the place of"
_SWIGLU = "the fused experts compute p * silu(min(g, c)) * clamp(u, -c, c) and nothing else"
_STAGED = "or keep Megatron's experts (--megamoe-experts staged)"
_SHAPE = f"choose such a multiple, use --megamoe-backend reference, {_STAGED}"
_NOT_SWIGLU = f"set activation_func=F.silu and gated_linear_unit=True (--swiglu), {_STAGED}"
_UNCLAMPED = "acts in shared experts and dense layers, where it ignores the clamp that our experts apply"
_LOW = "expert weights and tokens are read in bf16 or fp32"
_SHARED = "inside Megatron's shared experts"
_STASH = "read only with moe_paged_stash, which is refused"
_IN_EXPERTS = frozenset({"expert_fc1", "moe_act", "fused_group_mlp"})
_MOE_GRAPHS = frozenset({"moe", "moe_router", "moe_preprocess"})


def _not_multiple(n: int) -> Values:
    """Values that are no positive multiple of `n`."""
    return values(f"anything but a positive multiple of {n}", lambda value, config: not value or value % n != 0)


def _clamped(value, config) -> bool:
    return bool(value) and config.activation_func_clamp_value is not None


def _graphs_the_moe_layer(value, config) -> bool:
    """An empty list of modules means the whole layer."""
    modules = {show(module) for module in value or ()}
    return config.cuda_graph_impl in ("local", "transformer_engine") and (not modules or bool(modules & _MOE_GRAPHS))


RULES = {
    # shape
    "hidden_size": limited("H, cut into tiles of 256", _not_multiple(HIDDEN_MULTIPLE), _SHAPE, KERNELS),
    "moe_ffn_hidden_size": limited("I, cut into tiles of 128", _not_multiple(INTERMEDIATE_MULTIPLE), _SHAPE, KERNELS),
    "num_moe_experts": limited(
        "E, the same number on every rank",
        values(
            "None, or not divisible by expert_model_parallel_size",
            lambda value, config: not value or value % config.expert_model_parallel_size != 0,
        ),
        "choose a multiple of expert_model_parallel_size; without experts there is nothing to dispatch",
    ),
    "moe_router_topk": limited(
        "K, the slots of a token",
        values(
            f"more than {MAX_TOP_K}, more than num_moe_experts, or less than 1",
            lambda value, config: not 1 <= value <= min(MAX_TOP_K, config.num_moe_experts or value),
        ),
        f"choose 1 <= moe_router_topk <= min({MAX_TOP_K}, num_moe_experts)",
    ),
    "moe_layer_freq": supported("layers without experts are Megatron's dense layers"),
    "moe_latent_size": refuse(
        "the layer would dispatch latent rows of another width than hidden_size; not built yet",
        SET,
        "unset moe_latent_size, or dispatch with alltoall",
    ),
    # what an expert computes
    "activation_func": refuse(
        _SWIGLU, values("anything but F.silu", lambda value, config: value is not F.silu), _NOT_SWIGLU, PAIRED
    ),
    "gated_linear_unit": refuse(_SWIGLU, values("False", lambda value, config: not value), _NOT_SWIGLU, PAIRED),
    "glu_linear_offset": refuse(_SWIGLU, but(0), f"set glu_linear_offset=0, {_STAGED}", PAIRED),
    "activation_func_clamp_value": limited(
        "the clamp c: g <= c, -c <= u <= c",
        values("zero or less", lambda value, config: value is not None and value <= 0),
        "set a positive activation_func_clamp_value, or None for no clamp",
    ),
    "add_bias_linear": refuse(
        "the fused experts have no biases",
        TRUE,
        f"set add_bias_linear=False (--disable-bias-linear), {_STAGED}",
        PAIRED,
    ),
    "bias_activation_fusion": limited(
        _UNCLAMPED,
        values("True with activation_func_clamp_value set", _clamped),
        "set bias_activation_fusion=False (--no-bias-swiglu-fusion)",
    ),
    "use_te_activation_func": limited(
        _UNCLAMPED, values("True with activation_func_clamp_value set", _clamped), "set use_te_activation_func=False"
    ),
    "use_fused_weighted_squared_relu": irrelevant("read only with activation_func=squared_relu, which is judged there"),
    "activation_func_fp8_input_store": refuse(
        "the fused experts save fc1's output in the weights' dtype",
        TRUE,
        f"unset activation_func_fp8_input_store; the activation itself is never saved, {_STAGED}",
        PAIRED,
    ),
    "moe_apply_probs_on_input": refuse(
        "the routing weight goes on between SwiGLU and fc2, not on the input",
        TRUE,
        f"unset moe_apply_probs_on_input, {_STAGED}",
        PAIRED,
    ),
    "moe_mlp_glu_interleave_size": refuse(
        "fc1 is read as all gate rows, then all up rows",
        SET,
        f"unset moe_mlp_glu_interleave_size, {_STAGED}",
        PAIRED,
    ),
    "use_transformer_engine_op_fuser": refuse(
        "TransformerEngine's fused grouped MLP and the fused experts are two kernels for one layer",
        TRUE,
        "unset use_transformer_engine_op_fuser",
    ),
    "moe_grouped_gemm": supported(
        "TEGroupedMLP's weights (True) and SequentialMLP's (False) are both taken as they are"
    ),
    "moe_single_grouped_weight": refuse(
        "weights are read one tensor per expert", TRUE, "unset moe_single_grouped_weight"
    ),
    "moe_single_grouped_bias": refuse(
        "the fused experts have no biases", TRUE, "unset moe_single_grouped_bias and add_bias_linear"
    ),
    "fp8": refuse(_LOW, SET, "unset fp8 (bf16 experts)"),
    "fp4": refuse(_LOW, SET, "unset fp4 (bf16 experts)"),
    "use_kitchen": refuse(_LOW, TRUE, "unset use_kitchen"),
    "quant_recipe": refuse(_LOW, SET, "unset quant_recipe"),
    "moe_router_padding_for_quantization": refuse(
        "pads the routing map for FP8/FP4 GEMMs, which are refused",
        TRUE,
        "unset moe_router_padding_for_quantization: the plan pads rows by itself",
    ),
    "moe_router_padding_for_fp8": refuse(
        "pads the routing map for FP8 GEMMs, which are refused",
        TRUE,
        "unset moe_router_padding_for_fp8: the plan pads rows by itself",
    ),
    "batch_invariant_mode": refuse(
        "tile shapes follow the row counts, so a row's bits may change with the batch around it",
        TRUE,
        "unset batch_invariant_mode (deterministic_mode works), or dispatch with alltoall",
    ),
    # shared experts
    "moe_shared_expert_intermediate_size": supported("shared experts run before the router, as Megatron runs them"),
    "moe_shared_expert_gate": irrelevant(_SHARED),
    "moe_shared_expert_overlap": refuse(
        "it cuts the shared experts into the gaps of separate dispatch calls, which a fused call has not",
        TRUE,
        "unset moe_shared_expert_overlap: shared experts then run before the router",
    ),
    "use_grouped_gemm_for_shared_expert": irrelevant(_SHARED),
    "moe_shared_expert_glu_interleave_size": irrelevant(_SHARED),
    "use_grouped_gemm_for_dense_mlp": irrelevant("dense layers"),
    # router
    "moe_router_load_balancing_type": supported(_ROUTER),
    "moe_enable_routing_replay": supported(_ROUTER),
    "moe_router_topk_limited_devices": supported(_ROUTER),
    "moe_router_num_groups": supported(_ROUTER),
    "moe_router_group_topk": supported(_ROUTER),
    "moe_router_pre_softmax": supported(_ROUTER),
    "moe_router_topk_scaling_factor": supported("already in the probs that the router hands over"),
    "moe_router_score_function": supported(_ROUTER),
    "moe_router_dtype": supported("dtype of the probs; their gradient comes back in it"),
    "moe_router_enable_expert_bias": supported(_ROUTER),
    "moe_router_bias_update_rate": supported(_ROUTER),
    "moe_router_quantile_balancing_ema": supported(_ROUTER),
    "moe_router_force_load_balancing": supported(_ROUTER),
    "moe_router_force_biased": supported(_ROUTER),
    "moe_router_fusion": supported(_ROUTER),
    "moe_aux_loss_coeff": supported(_ROUTER),
    "moe_z_loss_coeff": supported(_ROUTER),
    "moe_input_jitter_eps": supported(_ROUTER),
    "moe_per_layer_logging": irrelevant("what is written"),
    "moe_token_drop_policy": supported(_ROUTER),
    # dispatch
    "moe_token_dispatcher_type": supported("'megamoe' turns all of this on; with any other value nothing is checked"),
    "moe_expert_capacity_factor": supported("the router drops slots; a dropped slot is -1 in the plan"),
    "moe_pad_expert_input_to_capacity": refuse(
        "experts get the rows that were routed to them, not a fixed number",
        TRUE,
        "unset moe_pad_expert_input_to_capacity (moe_expert_capacity_factor alone works)",
    ),
    "moe_token_dropping": refuse(
        "Megatron 0.19.2 does not read it", TRUE, "unset it; moe_expert_capacity_factor drops tokens"
    ),
    "moe_pad_experts_for_cuda_graph_inference": refuse(
        "it turns pad-to-capacity on during decoding", TRUE, "unset moe_pad_experts_for_cuda_graph_inference"
    ),
    "moe_expert_rank_capacity_factor": refuse(
        "it drops tokens beyond a rank's budget, in flex backends only",
        SET,
        "unset it; moe_expert_capacity_factor drops per expert",
    ),
    "moe_permute_fusion": irrelevant("rows are placed by the plan; there is no separate permutation to fuse"),
    "moe_enable_deepep": refuse("it asks for the flex dispatcher", TRUE, "unset moe_enable_deepep"),
    "moe_flex_dispatcher_backend": irrelevant(_FLEX),
    "moe_permute_fusion_into_hybridep": irrelevant(_FLEX),
    "moe_hybridep_pad_uneven_dispatch_inputs": irrelevant(_FLEX),
    "moe_flex_dispatcher_num_sms": irrelevant(_FLEX),
    "moe_deepep_num_sms": irrelevant(_FLEX),
    "moe_hybridep_num_sms": irrelevant(_FLEX),
    "moe_hybridep_num_blocks_permute": irrelevant(_FLEX),
    "moe_hybridep_num_blocks_unpermute": irrelevant(_FLEX),
    "moe_hybridep_num_sms_preprocessing": irrelevant(_FLEX),
    "moe_ncclep_static_shape": refuse(
        "it promises static shapes from the flex dispatcher", TRUE, "unset moe_ncclep_static_shape"
    ),
    "moe_ncclep_zero_copy": refuse(
        "experts would write into the flex dispatcher's buffers",
        TRUE,
        "unset moe_ncclep_zero_copy: the fused call writes into its own symmetric buffers",
    ),
    "high_priority_a2a_comm_stream": irrelevant("read only with overlap_moe_expert_parallel_comm, which is refused"),
    # memory
    "recompute_granularity": supported("recomputation runs the layer's forward again, with a plan of its own"),
    "recompute_method": supported("recomputation runs the layer's forward again, with a plan of its own"),
    "recompute_num_layers": supported("recomputation runs the layer's forward again, with a plan of its own"),
    "distribute_saved_activations": irrelevant("the input of recomputed layers"),
    "recompute_modules": supported("moe, layernorm and others as in Megatron; moe_act always (it is never saved)"),
    "moe_layer_recompute": supported("Megatron turns it into recompute_modules=['moe']"),
    "offload_modules": limited(
        "outside the experts",
        values("expert_fc1, moe_act or fused_group_mlp", lambda value, config: bool(_IN_EXPERTS & set(value or ()))),
        f"name modules outside the experts only (attention, norms), {_STAGED}",
        PAIRED,
    ),
    "moe_paged_stash": refuse(
        "it stashes the activations of Megatron's grouped MLP",
        TRUE,
        "unset moe_paged_stash: the fused experts save x and fc1's output only",
    ),
    "moe_paged_stash_page_size": irrelevant(_STASH),
    "moe_paged_stash_buffer_size_factor_cuda": irrelevant(_STASH),
    "moe_paged_stash_buffer_size_factor_cpu": irrelevant(_STASH),
    # CUDA graphs
    "cuda_graph_impl": refuse(
        "the layer reads row counts on the host, which a captured iteration cannot",
        but("none", "local", "transformer_engine"),
        "set cuda_graph_impl='none', or capture attention only (cuda_graph_modules=['attn'])",
    ),
    "cuda_graph_modules": refuse(
        "the layer reads row counts on the host, which a captured layer cannot",
        values(
            "moe, moe_router, moe_preprocess or the whole layer, while cuda_graph_impl captures", _graphs_the_moe_layer
        ),
        "set cuda_graph_modules=['attn'] (or others of attn, mlp, mamba)",
    ),
}

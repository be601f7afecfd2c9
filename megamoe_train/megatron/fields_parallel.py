"""ModelParallelConfig of megatron-core 0.19.2 (base of TransformerConfig), field by field. See fields.py."""

import torch

from megamoe_train.megatron.fields import TRUE, but, irrelevant, limited, refuse, supported, values

_TP_OVERLAP = "overlap of dense tensor-parallel GEMMs; expert weights are not tensor-parallel here"
_SCHEDULE = "called by the schedule, outside the layer"
_P2P = "how pipeline stages exchange activations, outside the layer"
_OFFLOAD = "read only with cpu_offloading, which is refused"
_INIT = "parameters are made and initialised by Megatron's own experts classes and then adopted"
_EP_OVERLAP = "combined 1F1B cuts the layer open around the dispatch, which happens inside the fused call"
_GTP = "shards dense weights; expert weights have their own field"

RULES = {
    # parallelism
    "tensor_model_parallel_size": supported("attention and router; expert weights stay whole (expert TP is 1)"),
    "tensor_parallel_num_weight_shards": irrelevant(_GTP),
    "gtp_weight_remat_size": irrelevant(_GTP),
    "pipeline_model_parallel_comm_backend": irrelevant(_P2P),
    "pipeline_model_parallel_size": supported("plan and saved tensors live in each call's autograd node"),
    "virtual_pipeline_model_parallel_size": supported("plan and saved tensors live in each call's autograd node"),
    "sequence_parallel": supported("each tensor-parallel rank dispatches its own share of the tokens"),
    "context_parallel_size": supported("each rank dispatches the tokens it holds; ranks may hold different numbers"),
    "hierarchical_context_parallel_sizes": irrelevant("attention's groups"),
    "max_seqlen_per_dp_cp_rank": irrelevant("read only with hybrid_context_parallel, which is refused"),
    "hybrid_context_parallel": refuse(
        "ranks of one EP group may run different numbers of sub-samples, and the dispatch waits for all of them",
        TRUE,
        "set hybrid_context_parallel=False (context_parallel_size works)",
    ),
    "expert_model_parallel_size": supported("the EP group; num_moe_experts must be divisible by it"),
    "expert_tensor_parallel_size": refuse(
        "an expert's weights must lie whole on one rank",
        but(None, 1),
        "set expert_tensor_parallel_size=1 (unset, it takes tensor_model_parallel_size)",
    ),
    "expert_tensor_parallel_num_weight_shards": refuse(
        "an expert's weights must lie whole on one rank",
        but(None, 1),
        "leave expert_tensor_parallel_num_weight_shards unset; raise expert_model_parallel_size",
    ),
    "expert_gtp_weight_remat_size": refuse(
        "an expert's weights must lie whole on one rank",
        but(1),
        "leave expert_tensor_parallel_num_weight_shards unset; raise expert_model_parallel_size",
    ),
    # initialisation
    "perform_initialization": supported(_INIT),
    "use_cpu_initialization": supported(_INIT),
    # training
    "fp16": refuse("dispatch, experts and gradients are bf16 or fp32", TRUE, "set bf16=True"),
    "bf16": supported("the dtype of the fused kernels; fp32 runs on the reference backend"),
    "params_dtype": limited(
        "bf16 (fused and reference), fp32 and fp64 (reference)",
        values(
            "anything but bfloat16, float32 or float64",
            lambda value, config: value not in (torch.bfloat16, torch.float32, torch.float64),
        ),
        "set bf16=True, or params_dtype=torch.float32",
    ),
    "timers": irrelevant(_SCHEDULE),
    "finalize_model_grads_func": irrelevant("runs after backward on main_grad, wherever it came from"),
    "grad_scale_func": supported("scales the loss; the layer's backward is linear in its gradient"),
    "moe_grad_scale_func": supported("scales the router's aux losses, in Megatron's router"),
    "mtp_grad_scale_func": supported("scales the MTP loss; the layer's backward is linear in its gradient"),
    "no_sync_func": supported("DDP's hooks fire on the expert weights as with Megatron's experts"),
    "grad_sync_func": supported("DDP's hooks fire on the expert weights as with Megatron's experts"),
    "param_sync_func": supported("the fused call fires the pre-forward hooks of the modules whose weights it reads"),
    "deterministic_mode": supported("row order and sums are fixed by the plan; nothing depends on timing"),
    "enable_autocast": refuse(
        "autocast changes the inputs' dtype but not that of the expert weights, which one call reads together",
        TRUE,
        "set bf16=True with params_dtype=torch.bfloat16",
    ),
    "autocast_dtype": irrelevant("read only with enable_autocast, which is refused"),
    "num_microbatches_with_partial_activation_checkpoints": supported("recomputation runs the layer's forward again"),
    # optimizations
    "gradient_accumulation_fusion": supported(
        "expert gradients go into main_grad wherever a weight has one, with this flag or without"
    ),
    "use_te_rng_tracker": irrelevant("random states of dropout and initialisation"),
    "tp_comm_overlap": irrelevant(_TP_OVERLAP),
    "tp_comm_bulk_wgrad": irrelevant(_TP_OVERLAP),
    "tp_comm_bulk_dgrad": irrelevant(_TP_OVERLAP),
    "tp_comm_overlap_ag": irrelevant(_TP_OVERLAP),
    "tp_comm_overlap_rs": irrelevant(_TP_OVERLAP),
    "tp_comm_overlap_rs_dgrad": irrelevant(_TP_OVERLAP),
    "tp_comm_split_ag": irrelevant(_TP_OVERLAP),
    "tp_comm_atomic_ag": irrelevant(_TP_OVERLAP),
    "tp_comm_split_rs": irrelevant(_TP_OVERLAP),
    "tp_comm_atomic_rs": irrelevant(_TP_OVERLAP),
    "cross_entropy_loss_fusion": irrelevant("the loss"),
    "cross_entropy_fusion_impl": irrelevant("the loss"),
    "tp_comm_overlap_disable_qkv": irrelevant(_TP_OVERLAP),
    "tp_comm_overlap_disable_fc1": irrelevant(_TP_OVERLAP),
    "tp_comm_bootstrap_backend": irrelevant(_TP_OVERLAP),
    "overlap_moe_expert_parallel_comm": refuse(
        _EP_OVERLAP, TRUE, "unset overlap_moe_expert_parallel_comm: the fused call overlaps inside the layer"
    ),
    "delay_wgrad_compute": refuse(
        "weight gradients are made in the same call as the input's gradient",
        TRUE,
        "unset delay_wgrad_compute: wgrad is interleaved inside the fused backward",
    ),
    "overlap_dispatch_backward_with_experts_wgrad": refuse(
        "weight gradients are made in the same call as the backward dispatch",
        TRUE,
        "unset overlap_dispatch_backward_with_experts_wgrad: the fused backward overlaps the two",
    ),
    "ep_overlap_early_attn_memory_release": refuse(
        "part of overlap_moe_expert_parallel_comm", TRUE, "unset ep_overlap_early_attn_memory_release"
    ),
    # pipeline
    "pipeline_dtype": irrelevant(_P2P),
    "variable_seq_lengths": supported("the number of tokens may differ from call to call and from rank to rank"),
    "overlap_p2p_comm": irrelevant(_P2P),
    "batch_p2p_comm": irrelevant(_P2P),
    "batch_p2p_sync": irrelevant(_P2P),
    "use_ring_exchange_p2p": irrelevant(_P2P),
    "deallocate_pipeline_outputs": irrelevant("frees a stage's output, which the layer does not save"),
    "defer_embedding_wgrad_compute": irrelevant("the output layer's weight gradient"),
    "wgrad_deferral_limit": irrelevant("the output layer's weight gradient"),
    "overlap_p2p_comm_warmup_flush": irrelevant(_P2P),
    "microbatch_group_size_per_vp_stage": irrelevant(
        "the order of micro-batches, the same on every rank of an EP group"
    ),
    "mtp_standalone": irrelevant("set by Megatron from the pipeline layout"),
    # CPU offloading
    "cpu_offloading": refuse(
        "TransformerEngine's offloading of saved activations has not been tried with the fused call's",
        TRUE,
        "use recomputation (recompute_granularity) to save memory",
    ),
    "cpu_offloading_num_layers": irrelevant(_OFFLOAD),
    "_cpu_offloading_context": irrelevant(_OFFLOAD),
    "cpu_offloading_activations": irrelevant(_OFFLOAD),
    "cpu_offloading_weights": irrelevant(_OFFLOAD),
    "cpu_offloading_double_buffering": irrelevant(_OFFLOAD),
    "cpu_offloading_retain_pinned_cpu_buffers": irrelevant(_OFFLOAD),
    "barrier_with_L1_time": irrelevant("timers"),
}

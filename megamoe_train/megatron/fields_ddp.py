"""DistributedDataParallelConfig of megatron-core 0.19.2, field by field. See fields.py."""

from megamoe_train.megatron.fields import TRUE, Values, but, irrelevant, refuse, supported

_FSDP = "read only by Megatron FSDP, which use_megatron_fsdp turns on and which is refused"
_COLLECTIVE = "how gradients and parameters travel between data-parallel ranks"
_SHARDED = "FSDP shards and frees the expert weights, which one call reads whole, without calling their modules"
_INSTEAD = "use the distributed optimizer (use_distributed_optimizer=True), which shards its state"
_LOW = "expert weights are read in bf16 or fp32"

RULES = {
    "grad_reduce_in_fp32": supported(
        "True: main_grad is fp32 and gradients are summed into it; False: main_grad has the weights' dtype"
    ),
    "overlap_grad_reduce": supported("the hooks of expert weights fire when backward has written their gradients"),
    "overlap_param_gather": supported(
        "the fused call fires the pre-forward hooks of the modules whose weights it reads"
    ),
    "align_param_gather": irrelevant(_COLLECTIVE),
    "use_distributed_optimizer": supported("weights and main_grad are taken wherever its buffers put them"),
    "num_distributed_optimizer_instances": irrelevant(_COLLECTIVE),
    "check_for_nan_in_grad": irrelevant("looks at gradients after backward"),
    "check_for_large_grads": irrelevant("looks at gradients after backward"),
    "bucket_size": irrelevant(_COLLECTIVE),
    "num_buckets": irrelevant(_COLLECTIVE),
    "pad_buckets_for_high_nccl_busbw": irrelevant(_COLLECTIVE),
    "reduce_scatter_with_fp32_accumulation": irrelevant(_COLLECTIVE),
    "param_name_patterns_for_fp32_local_accumulation": supported(
        "gradients are summed into main_grad, here an fp32 copy"
    ),
    "average_in_collective": irrelevant(_COLLECTIVE),
    "fp8_param_gather": refuse(_LOW, TRUE, "unset fp8_param_gather"),
    "fp4_param_gather": refuse(_LOW, TRUE, "unset fp4_param_gather"),
    "reuse_grad_buf_for_mxfp8_param_ag": refuse(_LOW, TRUE, "unset reuse_grad_buf_for_mxfp8_param_ag"),
    "use_megatron_fsdp": refuse(_SHARDED, TRUE, f"unset use_megatron_fsdp; {_INSTEAD}"),
    "use_custom_fsdp": refuse(_SHARDED, TRUE, f"unset use_custom_fsdp; {_INSTEAD}"),
    "data_parallel_sharding_strategy": irrelevant(_FSDP),  # megatron.training sets it in every run
    "gradient_reduce_div_fusion": irrelevant(_FSDP),
    "suggested_communication_unit_size": irrelevant(_FSDP),
    "keep_fp8_transpose_cache": irrelevant(_FSDP),
    "nccl_ub": irrelevant("whose allocator holds weights and main_grad; they are taken wherever they lie"),
    "fsdp_double_buffer": irrelevant(_FSDP),
    "fsdp_db_use_persist_buf_on_alloc_fail": irrelevant(_FSDP),
    "fsdp_all_gather_in_start_param_sync": irrelevant(_FSDP),
    "outer_dp_sharding_strategy": refuse(
        _SHARDED, but("no_shard"), f"set outer_dp_sharding_strategy='no_shard'; {_INSTEAD}"
    ),
    "disable_symmetric_registration": irrelevant("how nccl_ub registers its memory"),
    "fsdp_manual_registration": irrelevant(_FSDP),
    "delay_wgrad_compute": refuse(
        "weight gradients are made in the same call as the input's gradient",
        TRUE,
        "unset delay_wgrad_compute: wgrad is interleaved inside the fused backward",
    ),
    "megatron_fsdp_main_params_dtype": irrelevant(_FSDP),
    "megatron_fsdp_main_grads_dtype": irrelevant(_FSDP),
    "megatron_fsdp_grad_comm_dtype": irrelevant(_FSDP),
    "megatron_fsdp_use_decoupled_grad": irrelevant(_FSDP),
    "megatron_fsdp_cuda_graph_mode": irrelevant(_FSDP),
    "megatron_fsdp_enable_fine_grained_param_gather": irrelevant(_FSDP),
    "megatron_fsdp_max_pool_double_buffer": irrelevant(_FSDP),
    # TorchFullyShardedDataParallelConfig, the config of PyTorch's FSDP2: its only field, present with any value
    "reshard_after_forward": refuse(
        _SHARDED,
        Values("any value (the field exists only with PyTorch's FSDP2)", lambda value, config: True),
        f"drop --use-torch-fsdp2; {_INSTEAD}",
    ),
}

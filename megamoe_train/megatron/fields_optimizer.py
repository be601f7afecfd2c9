"""OptimizerConfig of megatron-core 0.19.2, field by field. See fields.py."""

import torch

from megamoe_train.megatron.fields import TRUE, irrelevant, limited, refuse, supported, values

_RATE = "learning rates and decay, applied to expert weights like to any other"
_STATE = "the optimizer's own state; it reads main_grad or grad after backward"
_RULE = "the update rule; it reads main_grad or grad after backward"
_OFFLOAD = "where the optimizer's state lies"
_SCALE = "scales the loss; the layer's backward is linear in its gradient"
_LOG = "what is measured and written"

RULES = {
    "lr": irrelevant(_RATE),
    "min_lr": irrelevant(_RATE),
    "decoupled_lr": irrelevant(_RATE),
    "decoupled_min_lr": irrelevant(_RATE),
    "weight_decay": irrelevant(_RATE),
    "apply_wd_to_qk_layernorm": irrelevant("attention's norms"),
    # precision
    "fp8_recipe": irrelevant("read for FP8 parameters only; fp8 is refused in TransformerConfig"),
    "fp16": refuse("dispatch, experts and gradients are bf16 or fp32", TRUE, "set bf16=True"),
    "bf16": supported("fp32 master weights of bf16 expert weights, as for any other"),
    "reuse_grad_buf_for_mxfp8_param_ag": refuse(
        "expert weights are read in bf16 or fp32", TRUE, "unset reuse_grad_buf_for_mxfp8_param_ag"
    ),
    "params_dtype": limited(
        "bf16 (fused and reference), fp32 and fp64 (reference)",
        values(
            "anything but bfloat16, float32 or float64",
            lambda value, config: value not in (torch.bfloat16, torch.float32, torch.float64),
        ),
        "set bf16=True, or params_dtype=torch.float32",
    ),
    "use_precision_aware_optimizer": irrelevant(_STATE),
    "store_param_remainders": irrelevant(_STATE),
    "main_grads_dtype": irrelevant(_STATE),
    "main_params_dtype": irrelevant(_STATE),
    "exp_avg_dtype": irrelevant(_STATE),
    "exp_avg_sq_dtype": irrelevant(_STATE),
    "optimizer": irrelevant(_RULE),
    # loss scaling
    "loss_scale": irrelevant(_SCALE),
    "initial_loss_scale": irrelevant(_SCALE),
    "min_loss_scale": irrelevant(_SCALE),
    "loss_scale_window": irrelevant(_SCALE),
    "hysteresis": irrelevant(_SCALE),
    # update rules
    "adam_beta1": irrelevant(_RULE),
    "adam_beta2": irrelevant(_RULE),
    "adam_eps": irrelevant(_RULE),
    "decoupled_weight_decay": irrelevant(_RULE),
    "sgd_momentum": irrelevant(_RULE),
    "muon_momentum": irrelevant(_RULE),
    "muon_split_qkv": irrelevant(_RULE),
    "muon_nesterov": irrelevant(_RULE),
    "muon_scale_mode": irrelevant(_RULE),
    "muon_fp32_matmul_prec": irrelevant(_RULE),
    "muon_coefficient_type": irrelevant(_RULE),
    "muon_num_ns_steps": irrelevant(_RULE),
    "muon_tp_mode": irrelevant(_RULE),
    "muon_extra_scale_factor": irrelevant(_RULE),
    "muon_scalar_optimizer": irrelevant(_RULE),
    "lion_beta1": irrelevant(_RULE),
    "lion_beta2": irrelevant(_RULE),
    "soap_shampoo_beta": irrelevant(_RULE),
    "soap_precondition_frequency": irrelevant(_RULE),
    "soap_use_kl_shampoo": irrelevant(_RULE),
    "adaptive_muon_moment2_method": irrelevant(_RULE),
    "adaptive_muon_beta2": irrelevant(_RULE),
    "adaptive_muon_eps": irrelevant(_RULE),
    # distributed optimizer
    "use_distributed_optimizer": supported("weights and main_grad are taken wherever its buffers put them"),
    "use_layer_wise_distributed_optimizer": irrelevant("which rank updates which weights, after backward"),
    "overlap_param_gather": supported(
        "the fused call fires the pre-forward hooks of the modules whose weights it reads"
    ),
    "overlap_param_gather_with_optimizer_step": supported(
        "the fused call fires the pre-forward hooks of the modules whose weights it reads"
    ),
    # offload
    "optimizer_cpu_offload": irrelevant(_OFFLOAD),
    "optimizer_offload_fraction": irrelevant(_OFFLOAD),
    "use_torch_optimizer_for_cpu_offload": irrelevant(_OFFLOAD),
    "overlap_cpu_optimizer_d2h_h2d": irrelevant(_OFFLOAD),
    "pin_cpu_grads": irrelevant(_OFFLOAD),
    "pin_cpu_params": irrelevant(_OFFLOAD),
    # miscellaneous
    "clip_grad": irrelevant("the norm is taken over gradients after backward"),
    "grad_norm_skip_threshold": irrelevant("the norm is taken over gradients after backward"),
    "log_num_zeros_in_grad": irrelevant(_LOG),
    "barrier_with_L1_time": irrelevant(_LOG),
    "timers": irrelevant(_LOG),
    "config_logger_dir": irrelevant(_LOG),
    "optimizer_cuda_graph": irrelevant("captures the optimizer step only"),
}

"""The table of Megatron's config fields is complete, each refusal speaks, and what is not refused passes."""

import copy
import dataclasses
import re

import pytest
import torch
import torch.nn.functional as F
from megatron.core.distributed import DistributedDataParallelConfig
from megatron.core.distributed.torch_fully_sharded_data_parallel_config import TorchFullyShardedDataParallelConfig
from megatron.core.optimizer import OptimizerConfig
from megatron.core.transformer.enums import CudaGraphModule
from megatron.core.transformer.transformer_config import MLATransformerConfig, TransformerConfig

from megamoe_train.megatron import fields, fields_moe, fields_parallel, fields_transformer
from megamoe_train.megatron.validate import validate

CLASSES = {
    "TransformerConfig": (TransformerConfig, MLATransformerConfig),
    "DistributedDataParallelConfig": (DistributedDataParallelConfig, TorchFullyShardedDataParallelConfig),
    "OptimizerConfig": (OptimizerConfig,),
}
ALL_RULES = [(config, name, rule) for config, rules in fields.tables().items() for name, rule in rules.items()]
GRAPHED = {"cuda_graph_impl": "transformer_engine"}
CLAMPED = {"activation_func_clamp_value": 10.0}
# Refused values of the fields whose refused values are not just True: (value, other fields it needs).
EXAMPLES = {
    "expert_tensor_parallel_size": [(2, {}), (4, {})],
    "expert_tensor_parallel_num_weight_shards": [(2, {})],
    "expert_gtp_weight_remat_size": [(2, {})],
    "params_dtype": [(torch.float16, {}), (torch.float8_e4m3fn, {})],
    "transformer_impl": [("inference_optimized", {})],
    "hidden_size": [(128, {}), (1000, {}), (0, {})],
    "moe_ffn_hidden_size": [(64, {}), (1000, {}), (None, {})],
    "num_moe_experts": [(None, {}), (9, {"expert_model_parallel_size": 4})],
    "moe_router_topk": [(17, {"num_moe_experts": 64}), (9, {"num_moe_experts": 8}), (0, {})],
    "moe_latent_size": [(128, {})],
    "activation_func": [(F.gelu, {}), (F.relu, {})],
    "gated_linear_unit": [(False, {})],
    "glu_linear_offset": [(1.0, {})],
    "activation_func_clamp_value": [(0, {}), (-10.0, {})],
    "bias_activation_fusion": [(True, CLAMPED)],
    "use_te_activation_func": [(True, CLAMPED)],
    "moe_mlp_glu_interleave_size": [(32, {})],
    "fp8": [("e4m3", {}), ("hybrid", {})],
    "fp4": [("e2m1", {})],
    "quant_recipe": [("a recipe", {})],
    "moe_expert_rank_capacity_factor": [(1.5, {})],
    "offload_modules": [(["expert_fc1"], {}), (["core_attn", "moe_act"], {}), (["fused_group_mlp"], {})],
    "cuda_graph_impl": [("full_iteration", {})],
    "cuda_graph_modules": [
        ([CudaGraphModule.moe], GRAPHED),
        ([CudaGraphModule.attn, CudaGraphModule.moe_router, CudaGraphModule.moe_preprocess], GRAPHED),
        ([CudaGraphModule.moe_router], {"cuda_graph_impl": "local"}),
        ([], GRAPHED),
    ],
    "outer_dp_sharding_strategy": [("optim", {})],
    "reshard_after_forward": [(True, {}), (False, {})],
}
# What the design names: a table that forgot one of these would be wrong however complete it is.
MUST_BE_REFUSED = [
    "moe_apply_probs_on_input", "moe_mlp_glu_interleave_size", "activation_func", "add_bias_linear", "fp16",
    "use_megatron_fsdp", "expert_tensor_parallel_size", "overlap_moe_expert_parallel_comm",
    "delay_wgrad_compute", "moe_single_grouped_weight", "moe_pad_expert_input_to_capacity",
    "moe_shared_expert_overlap", "cuda_graph_modules", "fp8", "fp4", "moe_ncclep_zero_copy", "moe_latent_size",
]  # fmt: skip


PLAIN = dict(
    num_layers=2, hidden_size=256, num_attention_heads=4, num_moe_experts=8, moe_router_topk=2,
    moe_ffn_hidden_size=128, moe_token_dispatcher_type="megamoe", add_bias_linear=False, gated_linear_unit=True,
    activation_func=F.silu, bf16=True, params_dtype=torch.bfloat16,
)  # fmt: skip


def transformer(**changes):
    """A supported TransformerConfig; `changes` are set afterwards, as Megatron's own __post_init__ sets some."""
    config = TransformerConfig(**PLAIN)
    for name, value in changes.items():
        setattr(config, name, value)
    return config


def configs(name: str, field: str, value, given: dict) -> list:
    """The three configs with one field of one of them changed."""
    ddp_class = TorchFullyShardedDataParallelConfig if field == "reshard_after_forward" else None
    made = [transformer(), (ddp_class or DistributedDataParallelConfig)(), OptimizerConfig()]
    config = made[list(CLASSES).index(name)]
    for key, setting in (given | {field: value}).items():
        setattr(config, key, setting)
    return made


def cases():
    """Every refused value: (config name, field, rule, value, given)."""
    for config, name, rule in ALL_RULES:
        if rule.refused is not None:
            examples = [(True, {})] if rule.refused is fields.TRUE else EXAMPLES.get(name, [])
            yield from ((config, name, rule, value, given) for value, given in examples)


CASES = [pytest.param(*case, id=f"{case[1]}={fields.show(case[3])}") for case in cases()]


@pytest.mark.parametrize("config", CLASSES)
def test_every_field_is_classified_and_nothing_else(config):
    megatron = {field.name for cls in CLASSES[config] for field in dataclasses.fields(cls)}
    ours = set(fields.tables()[config])
    assert megatron - ours == set(), "unclassified fields of Megatron"
    assert ours - megatron == set(), "rules for fields that Megatron does not have"


def test_no_field_is_classified_twice():
    parts = [fields_parallel.RULES, fields_transformer.RULES, fields_moe.RULES]
    assert sum(map(len, parts)) == len(fields.tables()["TransformerConfig"])


def test_each_rule_says_what_it_must():
    for config, name, rule in ALL_RULES:
        assert rule.status in (fields.SUPPORTED, fields.IRRELEVANT, fields.REFUSED), name
        assert rule.why, name
        assert (rule.refused is None) == (rule.instead == ""), name
        if rule.status != fields.SUPPORTED:
            assert (rule.status == fields.REFUSED) == (rule.refused is not None), name
        for reader in re.findall(r"read only with (\w+)(?:='\w+')?, which is refused", rule.why):
            assert fields.tables()[config][reader].status == fields.REFUSED, name


def test_every_refusal_is_fed():
    fed = {(config, name) for config, name, *_ in cases()}
    assert {(config, name) for config, name, rule in ALL_RULES if rule.refused is not None} == fed


def test_what_the_design_refuses_is_refused():
    refused = {name for _, name, rule in ALL_RULES if rule.status == fields.REFUSED}
    assert set(MUST_BE_REFUSED) - refused == set()


@pytest.mark.parametrize("config, name, rule, value, given", CASES)
def test_each_refusal_names_field_value_and_alternative(config, name, rule, value, given):
    with pytest.raises(ValueError) as error:
        validate(*configs(config, name, value, given))
    head, line = str(error.value).split("\n")  # one refusal: one line after the head
    assert head == "megamoe refuses 1 setting:"
    assert line == f"  {config}.{name} = {fields.show(value)}: {rule.why}. Instead: {rule.instead}."


@pytest.mark.parametrize("config, name, rule, value, given", CASES)
def test_a_refusal_holds_in_its_scope_only(config, name, rule, value, given):
    made = configs(config, name, value, given)
    free = {
        fields.ANY: [],
        fields.PAIRED: [("staged", "auto"), ("staged", "reference")],
        fields.KERNELS: [("staged", "auto"), ("staged", "reference"), ("paired", "reference")],
    }[rule.scope]
    for experts in ("paired", "staged"):
        for backend in ("auto", "fused", "reference"):
            if (experts, backend) in free or (experts, "auto") in free:
                validate(*made, experts=experts, backend=backend)
            else:
                with pytest.raises(ValueError, match=rf"{config}\.{name} = "):
                    validate(*made, experts=experts, backend=backend)


def test_every_refusal_is_listed_at_once():
    made = [transformer(fp16=True, moe_latent_size=64), DistributedDataParallelConfig(use_megatron_fsdp=True)]
    with pytest.raises(ValueError) as error:
        validate(*made, OptimizerConfig(fp16=True))
    found = re.findall(r"^  (\w+\.\w+) = ", str(error.value), re.MULTILINE)
    assert found == [
        "TransformerConfig.fp16", "TransformerConfig.moe_latent_size",
        "DistributedDataParallelConfig.use_megatron_fsdp", "OptimizerConfig.fp16",
    ]  # fmt: skip


def test_whatever_a_field_without_refusals_holds_passes():
    for config, name, rule in ALL_RULES:
        # Two fields are read by other fields' rules; their values are fed in those rules' examples.
        if rule.refused is None and name not in ("moe_token_dispatcher_type", "expert_model_parallel_size"):
            validate(*configs(config, name, "any value", {}))


def test_supported_configs_pass():
    validate(transformer(), DistributedDataParallelConfig(), OptimizerConfig())
    v4 = TransformerConfig(**PLAIN | dict(
        num_layers=4, hidden_size=4096, num_attention_heads=64, num_moe_experts=256, moe_router_topk=6,
        moe_ffn_hidden_size=2048, activation_func_clamp_value=10.0, moe_router_score_function="sqrtsoftplus",
        moe_router_enable_expert_bias=True, moe_router_dtype="fp32", moe_router_load_balancing_type="seq_aux_loss",
        moe_aux_loss_coeff=1e-4, moe_router_topk_scaling_factor=1.5, moe_shared_expert_intermediate_size=2048,
        mtp_num_layers=1, normalization="RMSNorm", moe_grouped_gemm=True, expert_model_parallel_size=8,
        pipeline_model_parallel_size=2, pipeline_dtype=torch.bfloat16, recompute_granularity="selective",
        recompute_modules=["moe", "core_attn"], moe_expert_capacity_factor=2.0,
    ))  # fmt: skip
    ddp = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True, overlap_grad_reduce=True, overlap_param_gather=True, use_distributed_optimizer=True
    )
    validate(v4, ddp, OptimizerConfig(bf16=True, params_dtype=torch.bfloat16, use_distributed_optimizer=True))
    validate(MLATransformerConfig(**PLAIN))


def test_graphs_of_attention_pass():
    validate(transformer(cuda_graph_impl="transformer_engine", cuda_graph_modules=[CudaGraphModule.attn]))
    validate(transformer(cuda_graph_impl="none", cuda_graph_modules=[]))


def test_a_clamp_without_fused_activations_passes_and_fusion_without_a_clamp():
    validate(transformer(activation_func_clamp_value=10.0))
    validate(transformer(bias_activation_fusion=True))


def test_other_dispatchers_are_not_judged():
    validate(transformer(moe_token_dispatcher_type="alltoall", fp16=True, moe_latent_size=64))


def test_experts_and_backend_are_checked():
    with pytest.raises(ValueError, match="experts: got 'other'; allowed: 'paired', 'staged'"):
        validate(transformer(), experts="other")
    with pytest.raises(ValueError, match="backend: got 'other'; allowed: 'auto', 'fused', 'reference'"):
        validate(transformer(), backend="other")


def newer(module: str):
    """A TransformerConfig with two fields more, as `module` would define it."""
    cls = dataclasses.make_dataclass(
        "Newer",
        [
            ("moe_new_feature", bool, dataclasses.field(default=False)),
            ("moe_new_list", list, dataclasses.field(default_factory=list)),
        ],
        bases=(TransformerConfig,),
    )
    cls.__module__ = module
    config = copy.copy(transformer())
    config.__class__ = cls
    config.moe_new_feature, config.moe_new_list = False, []
    return config


def test_an_unknown_field_of_megatron_passes_only_with_its_default():
    config = newer("megatron.core.transformer.newer")
    validate(config)
    config.moe_new_feature = True
    with pytest.raises(ValueError, match=r"moe_new_feature = True: .*does not know.*Instead: leave it at its default"):
        validate(config)
    config.moe_new_feature, config.moe_new_list = False, ["x"]
    with pytest.raises(ValueError, match=r"moe_new_list = \['x'\]"):
        validate(config)


def test_a_field_of_the_users_own_subclass_is_the_users():
    config = newer("their_project.config")
    config.moe_new_feature = True
    validate(config)


def test_a_known_field_becomes_unknown_without_its_row(monkeypatch):
    rules = {name: rule for name, rule in fields_moe.RULES.items() if name != "moe_shared_expert_gate"}
    monkeypatch.setattr(fields_moe, "RULES", rules)
    validate(transformer())
    with pytest.raises(ValueError, match=r"TransformerConfig\.moe_shared_expert_gate = True: .*does not know"):
        validate(transformer(moe_shared_expert_gate=True))


def test_the_table_prints_one_line_a_field():
    lines = fields.lines()
    assert len(lines) == len(ALL_RULES)
    row = next(line for line in lines if "\tmoe_apply_probs_on_input\t" in line).split("\t")
    assert row[2:4] == ["refused", "True (works staged)"]


@pytest.mark.parametrize(
    "field, changes",
    [
        ("moe_apply_probs_on_input", {"moe_router_topk": 1, "moe_router_pre_softmax": True}),
        ("moe_pad_expert_input_to_capacity", {"moe_expert_capacity_factor": 1.0}),
        ("expert_tensor_parallel_size", {"tensor_model_parallel_size": 2, "expert_tensor_parallel_size": None}),
        ("cuda_graph_modules", {"enable_cuda_graph": True}),
    ],
)
def test_refusals_reach_configs_that_megatron_itself_builds(field, changes):
    """Values that Megatron's __post_init__ accepts or derives (expert TP from TP, graphs from a deprecated flag)."""
    flag = {field: True} if isinstance(getattr(TransformerConfig, field), bool) else {}
    config = TransformerConfig(**(PLAIN | flag | changes))
    with pytest.raises(ValueError, match=rf"TransformerConfig\.{field} = "):
        validate(config)

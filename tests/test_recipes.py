"""Every recipe is a configuration that Megatron and the layer accept, on each machine it is written for."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from megamoe_train import pretrain, recipes
from megamoe_train.config import MegaMoEConfig
from megamoe_train.training import capacity, settings

# ranks of the job, GPUs of the machine
WORLDS = {"debug": [(1, 0), (2, 0), (1, 1), (2, 2), (4, 4)]}
WORLDS |= {name: [(recipes.ranks_of(name), 8)] for name in recipes.names() if name != "debug"}
CASES = [
    (name, *world, engine)
    for name, worlds in WORLDS.items()
    for world in worlds
    for engine in ((False,) if name == "debug" else (False, True))
]

# Megatron's parser and validation over each (recipe, world), in one process: {"debug 2 0": {argument: value}}
PARSE = """
import json, os, sys
from pathlib import Path
from megamoe_train import recipes
from megamoe_train.training import request, settings
answers = {}
import torch
torch.cuda.get_device_capability = lambda: (9, 0)  # Megatron asks it for grouped experts
from megatron.core.transformer.moe import moe_utils
for kernel in ("fused_permute", "fused_permute_with_probs", "fused_sort_chunks_by_index",
               "fused_sort_chunks_by_index_with_probs", "fused_unpermute"):
    setattr(moe_utils, kernel, len)  # and whether TransformerEngine has these
for name, ranks, gpus, engine in json.loads(sys.argv[1]):
    os.environ["WORLD_SIZE"] = str(ranks)
    table = settings.from_recipe(recipes.find(name, recipes.World(ranks, gpus, engine)).settings)
    if (name, ranks) == ("debug", 4):
        table["global-batch-size"] = ["16"]
    args = request._parse(table)
    plain = {key: value for key, value in vars(args).items() if isinstance(value, int | float | str | list | None)}
    answers[f"{name} {ranks} {gpus}" + " engine" * engine] = json.loads(json.dumps(plain, default=str))
Path(sys.argv[2]).write_text(json.dumps(answers))
"""


@pytest.fixture(scope="module")
def parsed(tmp_path_factory) -> dict[str, dict]:
    answer = tmp_path_factory.mktemp("parsed") / "answers.json"
    command = [sys.executable, "-W", "ignore", "-c", PARSE, json.dumps(CASES), str(answer)]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return json.loads(answer.read_text())


def test_every_recipe_is_tested():
    assert recipes.names() == list(WORLDS)


def test_unknown_recipe_lists_them():
    with pytest.raises(ValueError, match=r"recipe: 'debugg' is unknown; recipes are: debug, deepseek_v4_"):
        recipes.find("debugg", recipes.World(2, 0))


@pytest.mark.parametrize(("name", "ranks", "gpus", "engine"), CASES)
def test_fits_its_world_and_the_fused_layer(parsed, name, ranks, gpus, engine):
    recipe = recipes.find(name, recipes.World(ranks, gpus, engine))
    args = parsed[f"{name} {ranks} {gpus}" + " engine" * engine]
    assert recipe.name == name and recipe.summary
    assert args["moe_token_dispatcher_type"] == "megamoe"
    assert args["world_size"] == ranks
    assert args["distributed_backend"] == ("nccl" if gpus else "gloo")
    assert args["bf16"] == bool(gpus)
    layer = MegaMoEConfig(
        hidden_size=args["hidden_size"],
        intermediate_size=args["moe_ffn_hidden_size"],
        num_experts=args["num_experts"],
        top_k=args["moe_router_topk"],
        ep_size=args["expert_model_parallel_size"],
        clamp=args["activation_func_clamp_value"],
        backend="auto",
    )
    layer.validate()
    table = settings.from_recipe(recipe.settings)
    settings.check_shape(table | ({"global-batch-size": [str(4 * ranks * 2)]} if name == "debug" else {}), ranks)
    capacity.check(recipe, table, ranks)
    for key, values in table.items():  # what the recipe writes is what Megatron read
        read = args.get(key.replace("-", "_"))
        changed = (name, ranks) == ("debug", 4)  # by PARSE
        if len(values) == 1 and isinstance(read, int | float) and not isinstance(read, bool) and not changed:
            assert read == pytest.approx(float(values[0])), key


@pytest.mark.parametrize(("ranks", "expert"), [(1, 1), (2, 2), (4, 2)])
def test_debug_spreads_its_experts_over_two_ranks_where_there_are_two(parsed, ranks, expert):
    gpus = ranks if ranks == 4 else 0
    assert parsed[f"debug {ranks} {gpus}"]["expert_model_parallel_size"] == expert


def test_debug_is_v4_shaped(parsed):
    args = parsed["debug 2 0"]
    v4 = {
        "moe_router_score_function": "sqrtsoftplus",
        "moe_router_enable_expert_bias": True,
        "moe_router_load_balancing_type": "seq_aux_loss",
        "activation_func_clamp_value": 10.0,
        "num_experts": 32,
        "moe_router_topk": 6,
        "moe_layer_freq": 1,
        "swiglu": True,
        "normalization": "RMSNorm",
        "layernorm_epsilon": 1e-6,
        "add_bias_linear": False,
        "untie_embeddings_and_output_weights": True,
        "num_query_groups": 1,
        "rotary_base": 10000,
    }
    assert {name: args[name] for name in v4} == v4
    assert args["moe_shared_expert_intermediate_size"] == args["moe_ffn_hidden_size"]
    assert not args["bias_swiglu_fusion"]  # 0.19.2's fused SwiGLU ignores the clamp


def test_notes_say_what_stands_in_for_v4():
    notes = " ".join(recipes.find("debug", recipes.World(2, 0)).notes)
    for part in ("attention", "hash-routed", "hyper-connections", "Muon"):
        assert part in notes


# The published table: layers, hidden, experts, expert width, heads, q_lora, routed scaling, peak and end learning rate,
# largest batch in tokens, tokens of the whole training.
PUBLISHED = {
    "flash": (43, 4096, 256, 2048, 64, 1024, 1.5, 2.7e-4, 2.7e-5, 75.5e6, 32e12),
    "pro": (61, 7168, 384, 3072, 128, 1536, 2.5, 2.0e-4, 2.0e-5, 94.4e6, 33e12),
}
V4 = [(name, kind) for name in recipes.names() for kind in PUBLISHED if f"v4_{kind}_pretrain" in name]


@pytest.mark.parametrize(("name", "kind"), V4)
@pytest.mark.parametrize("engine", [False, True])
def test_v4_has_every_published_value(parsed, name, kind, engine):
    args = parsed[f"{name} {recipes.ranks_of(name)} 8" + " engine" * engine]
    layers, hidden, experts, width, heads, q_lora, scaling, peak, end, batch, tokens = PUBLISHED[kind]
    expected = {
        "num_layers": layers,
        "hidden_size": hidden,
        "num_experts": experts,
        "moe_ffn_hidden_size": width,
        "moe_shared_expert_intermediate_size": width,  # one shared expert
        "num_attention_heads": heads,
        "moe_router_topk_scaling_factor": scaling,
        "lr": peak,
        "min_lr": end,
        "vocab_size": 129280,
        "moe_router_topk": 6,
        "moe_layer_freq": 1,  # no dense layer
        "moe_router_score_function": "sqrtsoftplus",
        "moe_router_enable_expert_bias": True,
        "moe_router_bias_update_rate": 1e-3,
        "moe_router_load_balancing_type": "seq_aux_loss",
        "moe_aux_loss_coeff": 1e-4,
        "activation_func_clamp_value": 10.0,
        "mtp_num_layers": 1,
        "mtp_loss_scaling_factor": 0.3,
        "layernorm_epsilon": 1e-6,
        "rotary_base": 10000,
        "lr_warmup_iters": 2000,
        "weight_decay": 0.1,
        "seq_length": 4096,
    }
    assert {key: args[key] for key in expected} == expected
    step = args["global_batch_size"] * args["seq_length"]
    assert step == pytest.approx(batch, rel=1e-3) and args["train_iters"] * step == pytest.approx(tokens, rel=1e-5)
    if engine:
        widths = ("q_lora_rank", "kv_lora_rank", "qk_head_dim", "qk_pos_emb_head_dim", "v_head_dim")
        assert [args[key] for key in widths] == [q_lora, 512, 448, 64, 512]
    else:
        assert (args["kv_channels"], args["num_query_groups"], args["rotary_percent"]) == (512, 1, 64 / 512)


@pytest.mark.parametrize(("name", "kind"), V4)
def test_v4_says_what_stands_in_and_that_it_never_ran(name, kind):
    for engine in (False, True):
        recipe = recipes.find(name, recipes.World(recipes.ranks_of(name), 8, engine))
        told = " ".join(map(str, recipe.stand_ins))
        for part in ("hash routing", "mHC", "CSA and HCA", "Muon", "MLA"):
            assert part in told
        assert ("without TransformerEngine no MLA" in told) == (not engine)
        assert "never run at this scale" in " ".join(recipe.notes)


def test_recipes_that_have_not_run_say_so():
    found = [recipes.find(name, recipes.World(recipes.ranks_of(name), 8)) for name in recipes.names()]
    assert [recipe.name for recipe in found if recipe.has_run] == [
        "debug", "deepseek_v4_flash_proxy_2gpu_h100_bf16", "deepseek_v4_pro_proxy_1gpu_h100_bf16",
    ]  # fmt: skip
    for recipe in found:
        assert ("never run at this scale" in " ".join(recipe.notes)) == (not recipe.has_run), recipe.name
    assert "on H100s never" in " ".join(found[2].notes)


@pytest.mark.parametrize(
    ("name", "ranks", "message"),
    [
        ("deepseek_v4_flash_pretrain_120gpu_h100_bf16", 96, r"96 is too few for .* smallest that fits is 120 \(\d"),
        (
            "deepseek_v4_flash_pretrain_256gpu_h100_bf16",
            64,
            r"64 is too few .* says 1\d\d\.\d GiB a GPU .* of 72 us",
        ),
        ("deepseek_v4_pro_pretrain_1488gpu_h100_bf16", 992, r"992 is too few .* smallest that fits is 1488 \("),
        ("qwen3_30b_a3b_pretrain_16gpu_h100_bf16", 8, r"8 is too few for .* smallest that fits is 16 \("),
    ],
)
@pytest.mark.parametrize("engine", [False, True])
def test_too_few_ranks_are_refused_with_the_number(name, ranks, message, engine):
    recipe = recipes.find(name, recipes.World(ranks, 8, engine))
    with pytest.raises(ValueError, match=message):
        capacity.check(recipe, settings.from_recipe(recipe.settings), ranks)


def test_names_say_how_many_gpus_and_the_layout_divides_them():
    for name in recipes.names():
        if name != "debug":
            recipe = recipes.find(name, recipes.World(recipes.ranks_of(name), 8))
            assert recipe.name.endswith(f"_{recipes.ranks_of(name)}gpu_h100_bf16")
            assert recipe.settings["expert-model-parallel-size"] <= 8


@pytest.mark.parametrize("name", [name for name in recipes.names() if name != "debug"])
def test_dry_run_prints_the_command_and_the_stand_ins(name, capsys, monkeypatch):
    monkeypatch.setattr(pretrain, "_count_gpus", lambda: 0)
    assert pretrain.main(["--recipe", name, "--dry-run"]) == 0
    said = capsys.readouterr().out
    recipe = recipes.find(name, recipes.World(recipes.ranks_of(name), 8))
    ranks = recipes.ranks_of(name)
    where = "--standalone" if ranks <= 8 else f"--nnodes {ranks // 8} "
    assert said.startswith(f"torchrun {where}") and f"--nproc-per-node {min(ranks, 8)} -m" in said
    for line in (*recipe.notes, *recipe.stand_ins):
        assert f"  # {line}\n" in said
    assert "  --moe-dispatcher megamoe\n" in said


def test_an_h100_recipe_without_gpus_or_data_is_refused(capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    name = "mixtral_8x7b_pretrain_16gpu_h100_bf16"
    cases = ((0, [], "is for H100 GPUs, and torch sees none here"), (8, ["--nnodes", "2"], "needs --data"))
    for gpus, ranks, message in cases:
        monkeypatch.setattr(pretrain, "_count_gpus", lambda gpus=gpus: gpus)
        assert pretrain.main(["--recipe", name, *ranks, "--rdzv-endpoint", "h:1", "--rdzv-id", "1"]) == 2
        assert message in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []

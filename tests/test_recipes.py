"""Every recipe is a configuration that Megatron and the layer accept, on each machine it is written for."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from megamoe_train import recipes
from megamoe_train.config import MegaMoEConfig
from megamoe_train.training import settings

# ranks of the job, GPUs of the machine
WORLDS = {"debug": [(1, 0), (2, 0), (1, 1), (2, 2), (4, 4)]}

# Megatron's parser and validation over each (recipe, world), in one process: {"debug 2 0": {argument: value}}
PARSE = """
import json, os, sys
from pathlib import Path
from megamoe_train import recipes
from megamoe_train.training import request, settings
answers = {}
for name, ranks, gpus in json.loads(sys.argv[1]):
    os.environ["WORLD_SIZE"] = str(ranks)
    table = settings.from_recipe(recipes.find(name, recipes.World(ranks, gpus)).settings)
    if ranks == 4:
        table["global-batch-size"] = ["16"]
    args = request._parse(table)
    plain = {key: value for key, value in vars(args).items() if isinstance(value, int | float | str | list | None)}
    answers[f"{name} {ranks} {gpus}"] = json.loads(json.dumps(plain, default=str))
Path(sys.argv[2]).write_text(json.dumps(answers))
"""


@pytest.fixture(scope="module")
def parsed(tmp_path_factory) -> dict[str, dict]:
    answer = tmp_path_factory.mktemp("parsed") / "answers.json"
    cases = [(name, ranks, gpus) for name, worlds in WORLDS.items() for ranks, gpus in worlds]
    subprocess.run([sys.executable, "-W", "ignore", "-c", PARSE, json.dumps(cases), str(answer)], check=True)
    return json.loads(answer.read_text())


def test_every_recipe_is_tested():
    assert recipes.names() == list(WORLDS)


def test_unknown_recipe_lists_them():
    with pytest.raises(ValueError, match=r"recipe: 'debugg' is unknown; recipes are: debug"):
        recipes.find("debugg", recipes.World(2, 0))


@pytest.mark.parametrize(
    ("name", "ranks", "gpus"), [(name, *world) for name, worlds in WORLDS.items() for world in worlds]
)
def test_fits_its_world_and_the_fused_layer(parsed, name, ranks, gpus):
    recipe = recipes.find(name, recipes.World(ranks, gpus))
    args = parsed[f"{name} {ranks} {gpus}"]
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
    settings.check_shape(table | {"global-batch-size": [str(4 * ranks * 2)]}, ranks)
    for key, values in table.items():  # what the recipe writes is what Megatron read
        read = args.get(key.replace("-", "_"))
        if len(values) == 1 and isinstance(read, int | float) and not isinstance(read, bool) and ranks != 4:
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

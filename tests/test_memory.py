"""The memory model against what Megatron builds, and against sums done by hand."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys

import pytest

from megamoe_train import memory, recipes, workspace
from megamoe_train.shapes import Layout, ModelShape

# What a machine without TransformerEngine can build of a recipe for one that has it: the same parameters.
LOCAL = {
    "transformer-impl": "local",
    "moe-grouped-gemm": False,
    "moe-permute-fusion": False,
    "no-persist-layer-norm": True,
    "no-gradient-accumulation-fusion": True,
    "no-masked-softmax-fusion": True,
}
FLASH, PRO = "deepseek_v4_flash_pretrain_120gpu_h100_bf16", "deepseek_v4_pro_pretrain_1488gpu_h100_bf16"
# recipe, with TransformerEngine's attention, changed settings, pipeline stages
BUILT = {
    "debug": ("debug", False, {}, [0]),
    "debug, tied, dense first layer": (
        "debug", False, {"untie-embeddings-and-output-weights": False, "moe-layer-freq": "[0]*1+[1]*2"}, [0],
    ),
    "Flash proxy": ("deepseek_v4_flash_proxy_2gpu_h100_bf16", True, {}, [0]),
    "Pro proxy": ("deepseek_v4_pro_proxy_1gpu_h100_bf16", True, {}, [0]),
    "Flash, latent attention": (FLASH, True, {}, [0, 1, 14]),
    "Flash, multi-query attention": (FLASH, False, {}, [14]),
    "Pro": (PRO, True, {}, [61]),
    "Qwen3": ("qwen3_30b_a3b_pretrain_16gpu_h100_bf16", True, {}, [0, 1]),
    "Mixtral": ("mixtral_8x7b_pretrain_16gpu_h100_bf16", True, {}, [1]),
}  # fmt: skip


def settings_of(name: str, engine: bool, changes: dict) -> dict:
    world = recipes.World(recipes.ranks_of(name), 0 if name == "debug" else 8, engine)
    return {**recipes.find(name, world).settings, **changes}


@pytest.fixture(scope="module")
def counted(tmp_path_factory) -> dict[str, dict[str, list[int]]]:
    """Parameters of each stage's first rank, dense and expert, counted in modules that Megatron built."""
    answers = tmp_path_factory.mktemp("counted") / "answers.json"
    cases = [{"settings": settings_of(*case[:3]) | LOCAL, "stages": case[3]} for case in BUILT.values()]
    command = [sys.executable, "-W", "ignore", "-m", "tests.megatron.count_parameters", str(answers)]
    subprocess.run(command, input=json.dumps(cases), text=True, check=True, stdout=subprocess.DEVNULL)
    return dict(zip(BUILT, json.loads(answers.read_text()), strict=True))


@pytest.mark.parametrize("case", BUILT)
def test_parameters_are_those_that_megatron_builds(counted, case):
    name, engine, changes, stages = BUILT[case]
    given = settings_of(name, engine, changes)
    model = ModelShape.of(given)
    layout = Layout.of(given, recipes.ranks_of(name), model)
    for stage in stages:
        found = memory.stage_parameters(model, layout.stages[stage], layout.expert)
        assert [found.dense, found.expert] == counted[case][str(stage)], f"stage {stage}"


@pytest.mark.parametrize(
    ("name", "total", "active"),
    [
        ("qwen3_30b_a3b_pretrain_16gpu_h100_bf16", 30.5e9, 3.3e9),
        ("mixtral_8x7b_pretrain_16gpu_h100_bf16", 46.7e9, 12.9e9),
    ],
)
def test_controls_have_their_published_sizes(name, total, active):
    model = ModelShape.of(settings_of(name, True, {}))
    assert memory.total_parameters(model) == pytest.approx(total, rel=0.005)
    assert memory.active_parameters(model) == pytest.approx(active, rel=0.02)


@pytest.mark.parametrize(("name", "total"), [(FLASH, 284e9), (PRO, 1.6e12)])
def test_v4_has_its_published_size_but_for_attention_and_prediction(name, total):
    """Published attention (q_lora, one 512-wide key-value head, o_lora in groups) in the place of the stand-in's."""
    model = ModelShape.of(settings_of(name, True, {}))
    a, h = model.attention, model.hidden
    queries, out, groups = a.heads * 512, 1024, 8 if "flash" in name else 16
    published = h * a.q_rank + a.q_rank * queries + h * 512 + queries // groups * out * groups + groups * out * h
    without = memory.total_parameters(dataclasses.replace(model, mtp=0))
    moved = without + model.layers * (published - memory.attention_parameters(model))
    assert moved == pytest.approx(total, rel=0.03)


def test_an_expert_parameter_costs_six_bytes_and_twelve_over_its_replicas():
    given = settings_of(FLASH, True, {})
    model = ModelShape.of(given)
    for ranks, replicas in ((120, 1), (240, 2), (480, 4)):
        one, zero = (
            memory.stage_memory(dataclasses.replace(model, expert_width=width), Layout.of(given, ranks, model), 1)
            for width in (2048, 1024)
        )
        difference = one.parameters.expert - zero.parameters.expert
        states = sum(getattr(one, part) - getattr(zero, part) for part in ("weights", "gradients", "optimizer"))
        dense = one.parameters.dense - zero.parameters.dense
        assert states == (6 + 12 / replicas) * difference + 6 * dense + 12 * dense / (8 * replicas)


def test_workspace_is_what_the_layer_will_allocate():
    given = settings_of("deepseek_v4_flash_proxy_2gpu_h100_bf16", True, {})
    model = ModelShape.of(given)
    layout = Layout.of(given, 2, model)
    shape = workspace.Shape(ranks=2, experts=64, top_k=6, hidden=4096, tokens=8192)
    assert memory.workspace(model, layout) == workspace.layout_of(shape).bytes
    assert memory.estimate(model, layout)[0].workspace == memory.workspace(model, layout)


def test_parts_add_up_and_recomputation_keeps_less():
    given = settings_of(FLASH, True, {"micro-batch-size": 2, "global-batch-size": 18432})
    model = ModelShape.of(given)
    totals = {}
    selective = {"recompute-granularity": "selective", "recompute-modules": ["moe"]}
    for how in ({}, selective, {"recompute-granularity": None}):
        layout = Layout.of({**given, **how}, 120, model)
        most = memory.largest(model, layout)
        parts = ("weights", "gradients", "optimizer", "activations", "transient", "workspace")
        assert most.total == sum(getattr(most, part) for part in parts)
        totals[layout.recompute] = memory.stage_memory(model, layout, 3).activations
    assert totals["full"] < totals["moe"] < totals["none"]
    # 12 micro-batches are in flight on stage 3 of 15, each with the inputs of 3 layers.
    assert totals["full"] == 12 * 3 * 8192 * 4096 * 2


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tensor-model-parallel-size": 2}, "tensor-model-parallel-size: got 2; the memory model covers 1"),
        ({"swiglu": False}, "swiglu absent: not covered"),
        ({"pipeline-model-parallel-layout": "Et|tL"}, "holds 2 decoder and 0 prediction layers; the model has 3 and 0"),
        ({"pipeline-model-parallel-layout": "Et*3L"}, "write it out, as in"),
        (
            {
                "pipeline-model-parallel-size": 2,
                "expert-model-parallel-size": 1,
                "pipeline-model-parallel-layout": "EtttL",
            },
            "1 stages on 2 pipeline ranks",
        ),
        (
            {"pipeline-model-parallel-size": 2, "expert-model-parallel-size": 1},
            "num-layers: 3 is not a multiple of pipeline-model-parallel-size 2",
        ),
        ({"moe-layer-freq": "[0]*2"}, "moe-layer-freq: got 2 layers; allowed: num-layers = 3"),
        ({"moe-layer-freq": "[__import__('os')]"}, "invalid literal"),
        ({"num-layers": "many"}, "num-layers: got 'many'; allowed: a whole number"),
        ({"expert-model-parallel-size": 4}, "world size: 2 is not a multiple"),
    ],
)
def test_what_it_cannot_count_is_an_error(changes, message):
    given = {**settings_of("debug", False, {}), **changes}
    with pytest.raises(ValueError, match=message):
        Layout.of(given, 2, ModelShape.of(given))


def test_virtual_stages_lie_on_every_nth_rank():
    given = settings_of("debug", False, {"num-layers": 4, "pipeline-model-parallel-size": 2})
    given |= {"expert-model-parallel-size": 1, "pipeline-model-parallel-layout": "Et|t|t|tL"}
    model = ModelShape.of(given)
    first, last = Layout.of(given, 2, model).stages
    assert (first.layers, first.embedding, first.output) == ((0, 2), True, False)
    assert (last.layers, last.embedding, last.output) == ((1, 3), False, True)


def test_the_command_prints_a_row_for_each_stage(capsys):
    assert memory.main(["--recipe", FLASH]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith(f"{FLASH} on 120 ranks: ")
    assert [line.split()[0] for line in lines[2:17]] == [str(stage) for stage in range(15)]
    assert lines[-1].startswith("usable on an 80 GB H100: 72 GiB; the largest stage: ")
    assert memory.main(["--recipe", "nothing"]) == 2
    assert "recipes are: debug" in capsys.readouterr().err

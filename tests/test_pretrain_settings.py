"""The parts of the training job that need no Megatron: the argument table, what a run says and keeps."""

from __future__ import annotations

import json
import os
import pty
import subprocess
import sys
import termios
from pathlib import Path

import pytest

from megamoe_train import recipes
from megamoe_train.training import checkpointing, settings
from megamoe_train.training.job import claim_folder
from megamoe_train.training.metrics import Metrics, draw
from megamoe_train.training.request import Request

SHAPE = {"num-experts": ["32"], "moe-router-topk": ["6"], "micro-batch-size": ["4"], "global-batch-size": ["8"]}


def test_recipe_values_become_arguments():
    table = settings.from_recipe({"num_layers": 4, "swiglu": True, "bf16": False, "spec": None, "a-b": ["x", 1]})
    assert settings.to_arguments(table) == ["--num-layers", "4", "--swiglu", "--a-b", "x", "1"]


def test_later_words_win_and_false_takes_out():
    table = settings.from_recipe({"lr": 1e-3, "swiglu": True, "bf16": True})
    settings.apply_sets(table, ["lr=0.5", "bf16=false", "--seed=7", "fp32_residual=True", "names=a 'b c'"])
    settings.apply_arguments(table, ["--lr", "2e-4", "--swiglu", "--modules", "moe", "mlp", "--x=1", "--shift", "-3"])
    expected = {"lr": ["2e-4"], "swiglu": [], "seed": ["7"], "fp32-residual": [], "names": ["a", "b c"]}
    assert table == expected | {"modules": ["moe", "mlp"], "x": ["1"], "shift": ["-3"]}


def test_yaml_overwrites_the_recipe_and_the_command_line_overwrites_yaml(tmp_path):
    path = tmp_path / "run.yaml"
    lines = (
        "lr: 0.25",
        "swiglu: false",
        "num_layers: 2",
        "bf16: true",
        "modules: [moe, mlp]",
        "moe-dispatcher: alltoall",
    )
    path.write_text("\n".join(lines))
    table = Request("debug", tmp_path, config_files=(str(path),), sets=("num-layers=5",)).table(
        recipes.Recipe("debug", "", {"lr": 1e-3, "swiglu": True, "num-layers": 3, "moe-dispatcher": "megamoe"})
    )
    assert {"lr": ["0.25"], "num-layers": ["5"], "bf16": [], "modules": ["moe", "mlp"]}.items() <= table.items()
    assert table["moe-dispatcher"] == ["alltoall"] and "swiglu" not in table


@pytest.mark.parametrize("pair", ["lr", "=3", " =3"])
def test_set_without_key_or_value_is_refused(pair):
    with pytest.raises(ValueError, match="key=value"):
        settings.apply_sets({}, [pair])


def test_word_before_any_argument_is_refused():
    with pytest.raises(ValueError, match="'500' is not a Megatron argument"):
        settings.apply_arguments({}, ["500"])


def test_unknown_argument_names_the_nearest():
    with pytest.raises(ValueError, match="--train-iterz is not a Megatron argument; nearest: --train-iters"):
        settings.check_known({"train-iterz": ["4"]}, ["--train-iters", "--lr"])
    settings.check_known({"train-iters": ["4"]}, ["--train-iters", "--lr"])


@pytest.mark.parametrize(
    ("change", "num_ranks", "message"),
    [
        ({"expert-model-parallel-size": ["2"]}, 3, "world size: 3 is not a multiple of expert-model-parallel-size 2"),
        ({"expert-model-parallel-size": ["2"], "pipeline-model-parallel-size": ["2"]}, 2, "pipeline-model-parallel-s"),
        ({"tensor-model-parallel-size": ["4"]}, 2, "world size: 2 is not a multiple of tensor 4"),
        ({"expert-model-parallel-size": ["5"]}, 5, "num-experts: 32 is not divisible by expert-model-parallel-size 5"),
        ({"expert-model-parallel-size": ["0"]}, 2, "expert parallel size: 0"),
        ({"moe-router-topk": ["33"]}, 1, r"moe-router-topk: 33 is not between 1 and num-experts \(32\)"),
        ({"moe-router-topk": ["0"]}, 1, "moe-router-topk: 0"),
        ({"global-batch-size": ["6"]}, 1, "global-batch-size: 6 is not a multiple of micro-batch-size 4 x 1"),
        ({"num-experts": ["many"]}, 1, "num-experts: 'many' is not a whole number"),
        (
            {"num-experts": []},
            1,
            "num-experts: '(nothing)' is not a whole number".replace("(", r"\(").replace(")", r"\)"),
        ),
    ],
)
def test_layouts_that_cannot_be(change, num_ranks, message):
    with pytest.raises(ValueError, match=message):
        settings.check_shape(SHAPE | change, num_ranks)


@pytest.mark.parametrize(("expert", "pipeline", "num_ranks"), [(1, 1, 1), (2, 1, 2), (2, 2, 4), (1, 2, 2), (1, 1, 2)])
def test_layouts_that_can(expert, pipeline, num_ranks):
    sizes = {"expert-model-parallel-size": [str(expert)], "pipeline-model-parallel-size": [str(pipeline)]}
    settings.check_shape(SHAPE | sizes | {"global-batch-size": ["16"]}, num_ranks)


def test_two_runs_do_not_share_a_folder(tmp_path):
    out = tmp_path / "runs" / "one"
    held = claim_folder(out)
    with pytest.raises(ValueError, match=r"out: another run is writing to .*one"):
        claim_folder(out)
    os.close(held)
    os.close(claim_folder(out))


SPEAK = """
import os, sys, time
from pathlib import Path
from megamoe_train.training.console import Console
console = Console()
print("early noise")
os.system("echo noise of a library")
console.say("first line")
console.open_log(Path(sys.argv[1]) / "logs" / "rank0.log")
print("late noise", file=sys.stderr)
for step in range(3, 6):
    time.sleep(0.15)  # the bar is drawn ten times a second at most
    console.progress(step, 8, f"loss {step}.5")
console.say("in between")
console.end_progress()
console.say("last line")
"""


@pytest.mark.parametrize("columns", [90, 0])
def test_a_terminal_gets_a_bar_and_the_noise_goes_to_the_log(tmp_path, columns):
    theirs, ours = pty.openpty()
    termios.tcsetwinsize(ours, (40, columns))
    with subprocess.Popen([sys.executable, "-c", SPEAK, str(tmp_path)], stdout=ours, stderr=ours) as process:
        assert process.wait(60) == 0
    seen = os.read(theirs, 1 << 16).decode()
    assert "noise" not in seen
    assert "step 5/8" in seen and "loss 5.5" in seen and "|" in seen
    order = [seen.index(words) for words in ("first line", "step 3/8", "loss 3.5", "in between", "last line")]
    assert order == sorted(order)
    assert (tmp_path / "logs" / "rank0.log").read_text().split("\n")[:-1] == [
        "early noise",
        "noise of a library",
        "late noise",
    ]


def test_a_log_gets_whole_lines_and_no_bar(tmp_path):
    done = subprocess.run([sys.executable, "-c", SPEAK, str(tmp_path)], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == ["first line", "in between", "last line"]
    assert done.stderr == ""


def _checkpoint(root: Path, step: int, *, whole: bool = True) -> None:
    folder = checkpointing.folder_of(root, step)
    folder.mkdir(parents=True)
    (folder / "__0_0.distcp").write_bytes(b"0")
    if whole:
        (folder / "metadata.json").write_text("{}")


def test_no_checkpoint(tmp_path):
    assert checkpointing.find(tmp_path / "absent") is None
    _checkpoint(tmp_path, 5, whole=False)  # the very first save was interrupted
    assert checkpointing.find(tmp_path) is None


def test_interrupted_save_is_passed_over_and_named(tmp_path):
    _checkpoint(tmp_path, 10)
    _checkpoint(tmp_path, 20)
    _checkpoint(tmp_path, 30, whole=False)
    (tmp_path / checkpointing.TRACKER).write_text("20")
    found = checkpointing.find(tmp_path)
    assert (found.step, found.unfinished, found.tracked) == (20, (30,), True)
    assert "step 20" in found.describe()
    assert "save at step 30 was interrupted" in found.describe()


@pytest.mark.parametrize("tracker", [None, "", "\n"])
def test_tracker_lost_in_a_kill_is_mended(tmp_path, tracker):
    _checkpoint(tmp_path, 10)
    _checkpoint(tmp_path, 20)
    if tracker is not None:
        (tmp_path / checkpointing.TRACKER).write_text(tracker)
    found = checkpointing.find(tmp_path)
    assert (found.step, found.tracked) == (20, False)
    checkpointing.mend_tracker(found)
    assert (tmp_path / checkpointing.TRACKER).read_text() == "20"
    assert checkpointing.find(tmp_path).tracked


def test_named_checkpoint_must_be_whole(tmp_path):
    _checkpoint(tmp_path, 10)
    (tmp_path / checkpointing.TRACKER).write_text("30")
    with pytest.raises(ValueError, match=r"step 30 in .* is missing or was never completed \(whole: 10\)"):
        checkpointing.find(tmp_path)
    assert checkpointing.find(tmp_path, step=10).step == 10
    with pytest.raises(ValueError, match="step 11 in"):
        checkpointing.find(tmp_path, step=11)


def _step(step: int) -> dict:
    return {"step": step, "loss": 9.0 - step, "load": []}


def test_metrics_of_a_resumed_run_drop_what_comes_after_the_checkpoint(tmp_path):
    path = tmp_path / "metrics.jsonl"
    first = Metrics(path)
    first.add({"step": 0, "validation_loss": 9.5})
    for step in range(1, 6):
        first.add(_step(step))
    with path.open("a") as file:
        file.write('{"step": 6, "lo')  # killed while writing
    resumed = Metrics(path, step=3)
    resumed.add(_step(4) | {"loss": 1.0})
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [line["step"] for line in lines] == [0, 1, 2, 3, 4]
    assert lines[-1]["loss"] == 1.0
    assert resumed.validation_at(0) == 9.5
    assert Metrics(path).steps == []  # from step 0 the run begins anew
    assert path.read_text() == ""


def test_picture_shows_both_curves(tmp_path):
    from matplotlib import image

    metrics = Metrics(tmp_path / "metrics.jsonl")
    draw(metrics, "empty", tmp_path / "empty.png")
    for step in range(1, 30):
        metrics.add(_step(step))
    draw(metrics, "training", tmp_path / "training.png")
    metrics.add({"step": 29, "validation_loss": -15.0})
    draw(metrics, "training", tmp_path / "both.png")
    empty, training, both = (image.imread(tmp_path / f"{name}.png") for name in ("empty", "training", "both"))
    assert empty.shape == training.shape == both.shape
    assert (training != empty).any() and (both != training).any()
    assert sorted(path.name for path in tmp_path.glob("*.part*")) == []

"""The scripts for the GPU rows, run on the CPU over gloo with small shapes and the reference backend."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from tests import pretrain_runs
from tests.pretrain_runs import run_script

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "scripts"))
import gpu_matrix  # noqa: E402
import matrix_checkpoints  # noqa: E402
import matrix_memory  # noqa: E402
import matrix_rows  # noqa: E402
import trainings  # noqa: E402


def test_the_matrix_says_what_ran_what_failed_and_what_did_not_run(tmp_path):
    out = tmp_path / "table.json"
    names = ["EP=2", "PP=2 x EP=2", "TransformerEngine: EP=1, DDP", "500 steps*fixed*"]
    status, said = run_script(
        "gpu_matrix.py", "--backend", "reference", "--noise-runs", "1", "--out", str(out), "--rows", *names
    )
    table = json.loads(out.read_text())
    ran, four, engine, memory = table["rows"]
    assert status == 0 and (table["device"], table["ranks"]) == ("CPU", 2), said
    assert ran["row"] == "EP=2" and ran["first_difference"] < 2e-6 and ran["norm_difference"] < 1e-3
    theirs, ours = ran["losses"]
    assert len(theirs) == len(ours) == gpu_matrix.STEPS and theirs[-1] < theirs[0]
    assert four == {"row": "PP=2 x EP=2", "not_run": "needs 4 ranks, 2 are here"}
    assert engine["not_run"] == "TransformerEngine is not installed"
    assert memory["not_run"] == "reads a GPU's memory, none is here"
    assert [line.split("|")[2].strip() for line in said.splitlines()[3:]] == ["ran", *3 * ["not run"]]


def test_a_row_that_breaks_its_processes_costs_the_others_nothing(tmp_path, monkeypatch):
    """Workers that answer for a row, or end, or say nothing: what `run_rows` makes of each."""
    fake = tmp_path / "python"
    fake.write_text(
        f"""#!{sys.executable}
import json, sys, time
left = json.loads(sys.argv[sys.argv.index("--work") + 1])
answers = sys.argv[sys.argv.index("--answers") + 1]
for name in left:
    if name == "MTP":
        sys.exit("MegaMoETimeout: rank 1 waited for rank 0")
    if name == "EP=2":
        time.sleep(60)
    with open(answers, "a") as file:
        file.write(json.dumps({{"row": name, "first_difference": 0.0, "loss_difference": 0.0, "noise": 0.0}}) + "\\n")
"""
    )
    fake.chmod(0o755)
    monkeypatch.setattr(gpu_matrix.sys, "executable", str(fake))
    monkeypatch.setattr(gpu_matrix, "ROW_SECONDS", 2)
    names = ["z loss", "MTP", "recompute moe", "EP=2", "EP=1, DDP"]
    told: list[dict] = []
    found = gpu_matrix.run_rows(names, 2, tmp_path, told.append)
    assert [answer["row"] for answer in told] == names
    states = [gpu_matrix.state_of(found[name], (1e-6, 1e-3)) for name in names]
    assert states == ["ran", "failed", "ran", "failed", "ran"]
    assert found["MTP"]["failed"] == "exit status 1; MegaMoETimeout: rank 1 waited for rank 0"
    assert found["EP=2"]["failed"].startswith("no answer for 2 s")
    for first, whole, noise in ((1e-5, 1e-5, 1.0), (0.0, 1e-2, 4e-3), (float("nan"), 0.0, 0.0)):
        answer = {"first_difference": first, "loss_difference": whole, "noise": noise}
        assert gpu_matrix.state_of(answer, (1e-6, 1e-3)) == "differs"
    assert gpu_matrix.state_of({"first_difference": 0.0, "loss_difference": 1e-2, "noise": 6e-3}, (1e-6, 1e-3)) == "ran"
    assert gpu_matrix.difference([2.0] * 6, [2.0, 2.0, 3.0, 2.0, 2.0, 2.0], steps=2) == 0
    assert gpu_matrix.difference([2.0] * 6, [2.0] * 5 + [float("nan")]) == float("inf")
    with pytest.raises(ValueError, match="curves of 5 and 6 steps"):
        gpu_matrix.difference([1.0] * 5, [1.0] * 6)
    for reserved, state in (([100, 102], "ran"), ([100, 103], "differs"), ([0, 0], "differs")):
        assert gpu_matrix.state_of({"reserved": reserved}, (1e-6, 1e-3)) == state


def test_rows_are_chosen_by_name_and_by_pattern():
    everything = gpu_matrix.chosen(None)
    assert set(everything) == set(matrix_rows.ROWS) | set(matrix_checkpoints.ROWS)
    assert gpu_matrix.chosen(["checkpoint*", "fixed rows*"]) == list(matrix_checkpoints.ROWS)
    assert gpu_matrix.chosen(["MTP", "EP=2"]) == ["EP=2", "MTP"]
    with pytest.raises(ValueError, match="unknown row: EP=3"):
        gpu_matrix.chosen(["EP=2", "EP=3"])


PARSE = """
import json, os, sys
import torch
from types import SimpleNamespace
torch.cuda.get_device_capability = lambda: (9, 0)
torch.cuda.get_device_properties = lambda device: SimpleNamespace(major=9)
sys.path.insert(0, sys.argv[1])
import gpu_matrix
from megamoe_train.training import request, settings
answers = {}
for name, row in gpu_matrix.ROWS.items():
    os.environ["WORLD_SIZE"] = str(row.ranks)
    table = {}
    settings.apply_arguments(table, gpu_matrix.arguments_of(name, "megamoe", "reference", on_gpu=True))
    try:
        request._parse(table)
        answers[name] = "accepted"
    except ValueError as error:
        answers[name] = str(error)
print("\\n" + json.dumps(answers))
"""


def test_every_row_is_a_command_line_that_megatron_and_the_layer_accept():
    command = [sys.executable, "-W", "ignore", "-c", PARSE, str(ROOT / "scripts")]
    environment = os.environ | {"NCCL_ALGO": "Ring", "NVTE_ALLOW_NONDETERMINISTIC_ALGO": "0"}
    environment["CUDA_DEVICE_MAX_CONNECTIONS"] = "1"
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=environment)
    answers = json.loads(done.stdout.splitlines()[-1])
    assert list(answers) == list(gpu_matrix.ROWS)
    assert {name: answer for name, answer in answers.items() if answer != "accepted"} == {}


def test_zipf_loads_change_and_are_alike_on_all_ranks():
    from megatron.core.transformer.moe.router import TopKRouter

    given = []
    original, TopKRouter.routing = TopKRouter.routing, lambda self, logits: given.append(logits)
    try:
        for _ in range(2):  # two ranks, each from its first call
            with matrix_memory.zipf_load():
                for _ in range(3):
                    TopKRouter.routing(None, torch.zeros(4096, 1, 8))
        assert TopKRouter.routing.__name__ == "<lambda>"
    finally:
        TopKRouter.routing = original
    chosen = [logits.view(-1, 8).argmax(1) for logits in given]
    loads = torch.stack([torch.bincount(one, minlength=8) for one in chosen]).double() / 4096
    for call in range(3):
        law = matrix_memory.bias(call, 8).softmax(0).double()
        for load in (loads[call], loads[call + 3]):
            assert (load - law).abs().max() < 0.03  # four times what a draw of 4096 strays
    assert (loads[0] - loads[1]).abs().max() > 0.1
    assert not torch.equal(chosen[0], chosen[3])  # other tokens, though the same law


def test_a_checkpoint_of_one_dispatcher_goes_on_with_the_other(tmp_path):
    place = matrix_checkpoints.Place(tmp_path, "reference", False, (2e-6, 1e-3))
    answer = matrix_checkpoints.run_row("checkpoint: saved with alltoall, loaded with megamoe", place)
    assert answer["state"] == "ran", answer["said"]
    assert "moe dispatcher megamoe" in place.said["alltoall to megamoe"]
    answer = matrix_checkpoints.run_row(
        "checkpoint: saved with alltoall, loaded with megamoe",
        SimpleNamespace(gone_on=lambda *_: "whole alltoall", losses=place.losses, limits=(-1.0, 1.0)),
    )
    assert answer["state"] == "differs"


class Runs:
    """In place of the command: each run writes the metrics it is told to, and says where it began."""

    def __init__(self, *told: tuple[dict, int, str]):
        self.told, self.options = list(told), []

    def __call__(self, options, on_line):
        changed, status, said = self.told.pop(0)
        self.options.append(options)
        out = Path(options[1])
        out.mkdir(parents=True, exist_ok=True)
        lines = [{"step": step, "loss": 1 / step} | changed.get(step, {}) for step in range(1, 13)]
        (out / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        for step in (4, 8) if status == 137 else ():
            folder = out / "checkpoints" / f"iter_{step:07d}"
            folder.mkdir(parents=True)
            if step == 4:
                (folder / "metadata.json").write_text("{}")
        return status, said


WHOLE, KILLED = ({}, 0, ""), ({}, 137, "")


@pytest.mark.parametrize(
    ("runs", "state", "said"),
    [
        ((WHOLE, KILLED, ({}, 0, "resuming from step 4 (")), "ran", "4, past the save at step 8 that never ended, 12"),
        ((WHOLE, KILLED, ({9: {"loss": 0.1111}}, 0, "resuming from step 4 (")), "differs", "not bitwise: loss of step"),
        ((WHOLE, KILLED, ({}, 0, "starting from random weights")), "differs", "not say that it resumes from step 4"),
        ((WHOLE, KILLED, ({}, 2, "an error")), "failed", "ended with status 2, not 0: an error"),
        ((WHOLE, ({}, 0, "done")), "failed", "ended with status 0, not 137"),
    ],
)
def test_what_becomes_of_a_killed_run(runs, state, said, tmp_path, monkeypatch):
    monkeypatch.setattr(pretrain_runs, "run", Runs(*runs))
    place = matrix_checkpoints.Place(tmp_path, "reference", False, (2e-6, 1e-3))
    name = "checkpoint: megamoe, kill -9 in a save, bitwise (deterministic mode)"
    answer = matrix_checkpoints.run_row(name, place)
    assert answer["state"] == state and said in answer["said"], answer


@pytest.mark.parametrize(("step_9", "state"), [({}, "ran"), ({"loss": 0.1111}, "differs")])
def test_the_sizings_have_to_agree_to_the_bit(step_9, state, tmp_path, monkeypatch):
    runs = Runs(WHOLE, ({9: step_9}, 0, ""))
    monkeypatch.setattr(pretrain_runs, "run", runs)
    place = matrix_checkpoints.Place(tmp_path, "reference", False, (2e-6, 1e-3))
    answer = matrix_checkpoints.run_row("fixed rows, high water: the same bits (deterministic mode)", place)
    assert answer["state"] == state, answer
    assert "--set=megamoe-sizing=fixed" in runs.options[1] and "--set=megamoe-capacity=1024" in runs.options[1]
    assert all("--set=deterministic-mode=true" in options for options in runs.options)


def test_why_a_worker_broke(tmp_path):
    log = tmp_path / "worker.log"
    nccl = ["[rank1]: Last error:", "[rank1]: Cuda failure 2 'out of memory'"]
    log.write_text("\n".join(["ValueError: first", "some frame", *nccl, "bye", ""]))
    why, around = gpu_matrix._why(log, "exit status 1")
    assert why == "exit status 1; [rank1]: Last error: [rank1]: Cuda failure 2 'out of memory'"
    assert around == ["ValueError: first", "some frame", *nccl, "bye"]
    log.write_text("done\n")
    assert gpu_matrix._why(log, "no answer for 9 s") == ("no answer for 9 s; no error was printed", ["done"])


def test_what_ranks_find_in_their_environment(monkeypatch):
    """The caller's own setting outweighs a default, and what is forced outweighs both."""
    monkeypatch.setattr(trainings.subprocess, "Popen", lambda command, *, env, **_: (command, env))
    for name, value in (("MINE", "caller"), ("FORCED", "caller"), ("OMP_NUM_THREADS", "3"), ("PYTHONPATH", "there")):
        monkeypatch.setenv(name, value)
    command, env = trainings.start_ranks(
        2, "gpu_matrix.py", "--list", defaults={"MINE": "default", "OTHER": "default"}, forced={"FORCED": "ours"}
    )
    assert command[-2:] == [str(ROOT / "scripts" / "gpu_matrix.py"), "--list"]
    assert (env["MINE"], env["OTHER"], env["FORCED"], env["OMP_NUM_THREADS"]) == ("caller", "default", "ours", "3")
    assert env["PYTHONPATH"].split(":") == [str(ROOT), "there"]

"""The scripts for the GPU rows, run on the CPU over gloo with small shapes and the reference backend."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "scripts"))
import compare_training  # noqa: E402
import gpu_matrix  # noqa: E402


def run_script(name: str, *options: str) -> tuple[int, str]:
    environment = {key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    command = [sys.executable, "-W", "ignore", str(ROOT / "scripts" / name), *options]
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, timeout=280)
    return done.returncode, done.stdout


def test_the_matrix_says_what_ran_what_failed_and_what_did_not_run(tmp_path):
    out = tmp_path / "table.json"
    names = ["EP=2", "PP=2 x EP=2", "TransformerEngine: EP=1, DDP"]
    status, said = run_script("gpu_matrix.py", "--backend", "reference", "--out", str(out), "--rows", *names)
    table = json.loads(out.read_text())
    ran, four, engine = table["rows"]
    assert status == 0 and (table["device"], table["ranks"]) == ("CPU", 2), said
    assert ran["row"] == "EP=2" and ran["first_difference"] < 2e-6 and ran["norm_difference"] < 1e-3
    theirs, ours = ran["losses"]
    assert len(theirs) == len(ours) == gpu_matrix.STEPS and theirs[-1] < theirs[0]
    assert four == {"row": "PP=2 x EP=2", "not_run": "needs 4 ranks, 2 are here"}
    assert engine["not_run"] == "TransformerEngine is not installed"
    assert [line.split("|")[2].strip() for line in said.splitlines()[3:]] == ["ran", "not run", "not run"]


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
        file.write(json.dumps({{"row": name, "first_difference": 0.0, "loss_difference": 0.0}}) + "\\n")
"""
    )
    fake.chmod(0o755)
    monkeypatch.setattr(gpu_matrix.sys, "executable", str(fake))
    monkeypatch.setattr(gpu_matrix, "ROW_SECONDS", 2)
    names = ["z loss", "MTP", "recompute moe", "EP=2", "EP=1, DDP"]
    found = gpu_matrix.run_rows(names, 2, "fused", tmp_path)
    states = [gpu_matrix.state_of(found[name], (1e-6, 1e-3)) for name in names]
    assert states == ["ran", "failed", "ran", "failed", "ran"]
    assert found["MTP"]["failed"] == "exit status 1; MegaMoETimeout: rank 1 waited for rank 0"
    assert found["EP=2"]["failed"].startswith("no answer for 2 s")
    for first, whole in ((1e-5, 1e-5), (0.0, 1e-2), (float("nan"), 0.0)):
        answer = {"first_difference": first, "loss_difference": whole}
        assert gpu_matrix.state_of(answer, (1e-6, 1e-3)) == "differs"
    assert gpu_matrix.difference([2.0] * 6, [2.0, 2.0, 3.0, 2.0, 2.0, 2.0], steps=2) == 0
    assert gpu_matrix.difference([2.0] * 6, [2.0] * 5 + [float("nan")]) == float("inf")
    with pytest.raises(ValueError, match="curves of 5 and 6 steps"):
        gpu_matrix.difference([1.0] * 5, [1.0] * 6)


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


def test_two_trainings_are_compared_and_drawn(tmp_path):
    small = {
        "num-layers": 1,
        "num-experts": 8,
        "moe-router-topk": 2,
        "seq-length": 32,
        "vocab-size": 512,
        "eval-iters": 1,
    }
    sets = [word for name, value in small.items() for word in ("--set", f"{name}={value}")]
    options = [
        "--recipe",
        "debug",
        "--steps",
        "5",
        "--skip",
        "1",
        "--backend",
        "reference",
        "--out",
        str(tmp_path / "c"),
    ]
    status, said = run_script("compare_training.py", *options, *sets)
    assert status == 0, said
    report = json.loads((tmp_path / "c" / "compare.json").read_text())
    assert report["tokens_per_step"] == 8 * 32
    assert [row["dispatcher"] for row in report["summary"].values()] == ["alltoall", "megamoe, backend reference"]
    assert report["distance_from_alltoall"]["megamoe"]["max"] < 1e-4
    for row in report["summary"].values():
        assert row["tokens_per_s"] == pytest.approx(256e3 / row["step_ms"]) and row["tflops_per_gpu"] > 0
        assert row["mfu"] is None and row["last_loss"] < row["first_loss"]
    assert len((tmp_path / "c" / "compare.png").read_bytes()) > 20_000
    assert not list((tmp_path / "c").rglob("*.distcp"))
    assert "|megamoe - alltoall|: max " in said


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_noise_moves_every_weight_by_one_unit_in_the_last_place(dtype, monkeypatch):
    weight = torch.randn(64, 32).to(dtype)
    moved, again, other = (weight.clone() for _ in range(3))
    compare_training.move(moved, 1, "layer", shared=True)
    compare_training.move(again, 1, "layer", shared=True)
    compare_training.move(other, 2, "layer", shared=True)
    assert torch.equal(moved, again) and not torch.equal(moved, other)
    infinity = torch.full_like(weight, float("inf"))
    up, down = torch.nextafter(weight, infinity), torch.nextafter(weight, -infinity)
    assert ((moved == up) | (moved == down)).all() and (moved == up).any() and (moved == down).any()
    experts = []
    for rank in ("0", "1"):
        monkeypatch.setenv("RANK", rank)
        experts.append(weight.clone())
        compare_training.move(experts[-1], 1, "expert", shared=False)
    assert not torch.equal(*experts)


def test_summary_and_distance():
    def steps(*losses: float) -> list[dict]:
        return [{"loss": loss, "tokens_per_s": 1000.0 * (n + 1), "tflops": 2.0} for n, loss in enumerate(losses)]

    memory = [{"allocated": 3 << 30, "reserved": 4 << 30}, {"allocated": 5 << 30, "reserved": 6 << 30}]
    one = {"name": "alltoall", "dispatcher": "alltoall", "steps": steps(3.0, 2.0, 1.0), "memory": memory}
    other = one | {"steps": steps(3.0, 2.5, 1.25)}
    assert compare_training.distance(one, other) == {"max": 0.5, "mean": 0.25}
    found = compare_training.summary(one, 1, 6000)
    assert (found["step_ms"], found["peak_allocated_gib"], found["last_loss"]) == (2500.0, 5.0, 1.0)

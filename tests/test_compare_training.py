"""scripts/compare_training.py on the CPU over gloo, small, with the reference backend; and how it judges."""

from __future__ import annotations

import json
import subprocess
import sys
import time

import psutil
import pytest
import torch

from tests.pretrain_runs import ROOT, run_script

sys.path.insert(0, str(ROOT / "scripts"))
import compare_training
import training_checks
import training_gradients
from training_faults import FAULTS

SMALL = {"num-layers": 1, "num-experts": 8, "moe-router-topk": 2, "seq-length": 32, "vocab-size": 512, "eval-iters": 1}


def options(out, *more: str, **changes: object) -> list[str]:
    settings = SMALL | {name.replace("_", "-"): value for name, value in changes.items()}
    sets = [word for name, value in settings.items() for word in ("--set", f"{name}={value}")]
    return ["--recipe", "debug", "--backend", "reference", "--out", str(out), *more, *sets]


def test_two_trainings_are_compared_and_drawn(tmp_path):
    command = options(tmp_path / "c", "--only", "curves", "--steps", "5", "--skip", "1")
    status, said = run_script("compare_training.py", *command)
    assert status == 0, said
    report = json.loads((tmp_path / "c" / "compare.json").read_text())
    curves = report["curves"]
    assert report["tokens_per_step"] == 8 * 32 and report["passed"]
    assert [row["dispatcher"] for row in curves["summary"].values()] == ["alltoall", "megamoe, backend reference"]
    assert curves["distance_from_alltoall"]["megamoe"]["max"] < 1e-4
    for row in curves["summary"].values():
        assert row["tokens_per_s"] == pytest.approx(256e3 / row["step_ms"]) and row["tflops_per_gpu"] > 0
        assert row["mfu"] is None and row["last_loss"] < row["first_loss"]
    assert len((tmp_path / "c" / "compare.png").read_bytes()) > 20_000
    assert not list((tmp_path / "c").rglob("*.distcp"))
    assert "|megamoe - alltoall|: max " in said and said.splitlines()[-1] == "PASS"

    status, said = run_script("compare_training.py", *command)  # what is there already is not trained again
    assert status == 0 and said.count(": as it stands in ") == 2
    assert json.loads((tmp_path / "c" / "compare.json").read_text())["curves"] == curves

    status, said = run_script("compare_training.py", *command, "--fixed-rows", "1024", "--again")
    assert status == 0 and said.count(": as it stands in ") == 2
    more = json.loads((tmp_path / "c" / "compare.json").read_text())["curves"]
    assert more["losses"]["megamoe, fixed rows"] == more["losses"]["megamoe"] == curves["losses"]["megamoe"]
    assert more["losses"]["alltoall again"] == curves["losses"]["alltoall"]  # on the CPU nothing is left to chance


def test_nothing_outlives_a_killed_script(tmp_path):
    """Ranks have sessions of their own, and would hold their GPUs."""
    out = tmp_path / "killed"
    command = [sys.executable, str(ROOT / "scripts" / "compare_training.py"), "--only", "curves", "--steps", "10000"]

    def ours() -> list[psutil.Process]:
        return [one for one in psutil.process_iter(["cmdline"]) if str(out) in " ".join(one.info["cmdline"] or ())]

    with subprocess.Popen([*command, *options(out)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as script:
        limit = time.monotonic() + 120
        while not (out / "alltoall" / "metrics.jsonl").exists():
            assert script.poll() is None and time.monotonic() < limit, "no step was made"
            time.sleep(0.2)
        assert len(ours()) == 4  # the script, its launcher, two ranks
        script.kill()
    limit = time.monotonic() + 10
    while left := ours():
        assert time.monotonic() < limit, left
        time.sleep(0.1)


def test_gradients_keep_the_2x_rule_and_every_fault_breaks_it(tmp_path):
    small_clamp = {"bf16": "true", "activation_func_clamp_value": 0.5}  # one that binds from the first step on
    small_clamp |= {"lr_warmup_fraction": "none", "lr_warmup_iters": 2}  # as long as the repetitions
    command = options(tmp_path / "g", "--only", "gradients", "--gradient-steps", "1", "3", **small_clamp)
    status, said = run_script("compare_training.py", *command, "--noise-runs", "1", "--faults", *FAULTS)
    assert status == 0, said
    checks = json.loads((tmp_path / "g" / "compare.json").read_text())["gradient_checks"]
    assert list(checks["gradients"]) == ["1", "3"] and checks["passed"]
    for judged in checks["gradients"].values():
        assert judged["parameters"] >= 2 * (2 * 4 + 8)  # both ranks: four experts' two matrices, and what is shared
        for error in judged["median_error"]:
            assert 1e-3 < error < 0.1  # of bf16, so the truth is of these very weights, batches and choices
    noise = checks["losses"]["noise-1"]
    assert 0 < abs(noise[0] - checks["losses"]["alltoall"][0]) < 0.01  # from the first step on
    assert list(checks["faults"]) == list(FAULTS)
    assert [fault["by_gradients"] for fault in checks["faults"].values()] == [True] * len(FAULTS)
    lost = {one["parameter"] for one in checks["faults"]["wgrad"]["gradients"]["1"]["broken"]}
    names = {f"rank {rank} decoder.layers.0.mlp.experts.local_experts.0.linear_fc1.weight" for rank in (0, 1)}
    assert lost == names  # the one that went nowhere, and no other
    assert len((tmp_path / "g" / "compare.png").read_bytes()) > 20_000
    assert said.splitlines()[-1] == "PASS" and said.count("noticed by gradients") == len(FAULTS)


def test_gradients_of_a_training_in_fp32_are_not_judged(tmp_path):
    status, _ = run_script("compare_training.py", *options(tmp_path / "g", "--only", "gradients"))
    assert status == 2 and not (tmp_path / "g").exists()


@pytest.mark.parametrize("curve", [["--again"], ["--fixed-rows", "1024"]], ids=str)
def test_a_curve_beside_gradients_alone_is_refused(tmp_path, curve, capfd):
    status, _ = run_script("compare_training.py", *options(tmp_path / "g", "--only", "gradients", *curve))
    assert status == 2 and "not with --only gradients" in capfd.readouterr().err and not (tmp_path / "g").exists()


def test_errors_are_relative_to_the_truth():
    truth = {"a": torch.tensor([3.0, -4.0]), "none": torch.zeros(2), "b": torch.zeros(1)}
    found = training_gradients.errors_of(
        {"a": torch.tensor([3.0, -4.5]), "none": torch.zeros(2), "b": torch.tensor([1e-9])}, truth
    )
    assert found["a"] == [0.1, 0.5, 4.0] and found["none"] == [0.0, 0.0, 0.0]
    assert found["b"][0] == float("inf")  # a gradient where there must be none
    with pytest.raises(ValueError, match=r"parameters differ: \['b'\]"):
        training_gradients.errors_of({"a": truth["a"], "none": truth["none"]}, truth)


def test_the_2x_rule():
    ulp = 2.0**-7
    theirs = {f"experts.{n}.weight": [0.01, 0.1, 1.0] for n in range(4)} | {"norm.weight": [0.02, 0.1, 1.0]}

    def broken(**ours: list[float]) -> list[str]:
        return [one["parameter"] for one in training_gradients.judge(theirs | ours, theirs)["broken"]]

    assert broken(**{"norm.weight": [0.04, 0.2 + ulp, 1.0]}) == []
    assert broken(**{"norm.weight": [0.0401, 0.1, 1.0]}) == ["norm.weight"]
    assert broken(**{"norm.weight": [0.02, 0.21, 1.0]}) == ["norm.weight"]
    assert broken(**{"experts.2.weight": [float("nan"), 0.1, 1.0]}) == ["experts.2.weight"]
    # An expert of alltoall that was lucky is no measure; the median of its kind is.
    theirs["experts.3.weight"] = [0.0, 0.0, 0.0]
    assert broken(**{"experts.3.weight": [0.02, 0.2, 1.0]}) == []
    assert broken(**{"experts.3.weight": [0.021, 0.2, 1.0]}) == ["experts.3.weight"]
    assert [training_gradients.ulp(value) for value in (0.0, 1.0, 1.99, 2.0, 0.5)] == [0, ulp, ulp, 2 * ulp, ulp / 2]


def answers(*, fault_error: float, fault_loss: float, ours: float = 0.01) -> dict:
    """What the ranks of a comparison bring, with one noise run and the fault `slot`."""
    errors = {"megamoe": ours, "fault slot": fault_error}
    losses = {"alltoall": [2.0, 1.0], "megamoe": [2.0, 1.0], "noise-1": [2.0, 1.01], "fault slot": [2.0, fault_loss]}
    found = {
        name: {"1": {"ours": {"w": [error, 0.0, 1.0]}, "alltoall": {"w": [0.01, 0.0, 1.0]}}}
        for name, error in errors.items()
    }
    return {"errors": found, "losses": losses}


@pytest.mark.parametrize(
    ("case", "passed", "verdict"),
    [
        ({"fault_error": 0.5, "fault_loss": 1.005}, True, "noticed by gradients"),
        ({"fault_error": 0.01, "fault_loss": 1.02}, True, "noticed by curve"),
        ({"fault_error": 0.01, "fault_loss": float("nan")}, True, "noticed by curve"),
        ({"fault_error": 0.5, "fault_loss": 1.02}, True, "noticed by gradients and curve"),
        ({"fault_error": 0.01, "fault_loss": 1.005}, False, "NOT NOTICED: FAIL"),
        ({"fault_error": 0.5, "fault_loss": 1.02, "ours": 0.03}, False, "FAIL"),
    ],
)
def test_a_fault_that_nothing_notices_fails_the_comparison(case, passed, verdict):
    report = training_checks.report_of(answers(**case), ["slot"])
    assert report["passed"] == passed
    assert verdict in training_checks.table(report)


def test_noise_that_moved_nothing_is_an_error():
    with pytest.raises(RuntimeError, match="its weights were not moved"):
        training_checks.noise_of({"alltoall": [2.0, 1.0], "noise-1": [2.0, 1.5], "noise-2": [2.0, 1.0]})


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
    assert training_checks.distance([3.0, 2.0, 1.0], [3.0, 2.5, 1.25]) == {"max": 0.5, "mean": 0.25}
    found = compare_training.summary(one, 1, 6000)
    assert (found["step_ms"], found["peak_allocated_gib"], found["last_loss"]) == (2500.0, 5.0, 1.0)

"""The ranks of a training job, without Megatron: how many, who started them, how they leave; train_local.sh."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from megamoe_train.training import launch

TRAIN_LOCAL = Path(__file__).parent.parent / "launch" / "train_local.sh"


@pytest.mark.parametrize(
    ("gpus", "most", "ranks"), [(0, 2, 2), (1, 2, 1), (2, 2, 2), (8, 2, 2), (8, None, 8), (0, 1, 1)]
)
def test_processes_to_start(gpus, most, ranks):
    assert launch.default_ranks(gpus, most) == ranks


@pytest.fixture
def clean_environment(monkeypatch):
    for name in list(os.environ):
        if name.startswith("SLURM_") or name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
            monkeypatch.delenv(name)
    monkeypatch.setattr(os, "environ", dict(os.environ))  # what adopt_rank adds goes with the test
    return monkeypatch


def test_alone_it_is_no_rank(clean_environment):
    assert not launch.adopt_rank()
    # a batch script has a job and a process number, but no step: nobody else was started
    os.environ.update(SLURM_JOB_ID="7", SLURM_PROCID="0", SLURM_NTASKS="8")
    assert not launch.adopt_rank()
    # an interactive shell is a step of one task
    os.environ.update(SLURM_STEP_ID="0", SLURM_STEP_NUM_TASKS="1")
    assert not launch.adopt_rank()
    assert "RANK" not in os.environ


def test_torchrun_is_recognised(clean_environment):
    os.environ.update(RANK="3", WORLD_SIZE="4", LOCAL_RANK="1", SLURM_STEP_ID="0", SLURM_STEP_NUM_TASKS="2")
    assert launch.adopt_rank()
    assert (os.environ["RANK"], os.environ["WORLD_SIZE"], os.environ["LOCAL_RANK"]) == ("3", "4", "1")


def test_srun_becomes_torchruns_variables(clean_environment, tmp_path):
    scontrol = tmp_path / "scontrol"
    scontrol.write_text('#!/bin/sh\n[ "$*" = "show hostnames gpu[07-08]" ] && printf "gpu07\\ngpu08\\n"\n')
    scontrol.chmod(scontrol.stat().st_mode | stat.S_IXUSR)
    clean_environment.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    os.environ.update(PATH=f"{tmp_path}:{os.environ['PATH']}")
    step = {"SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "4", "SLURM_STEP_NODELIST": "gpu[07-08]"}
    os.environ.update(step, SLURM_PROCID="3", SLURM_LOCALID="1", SLURM_JOB_ID="31")
    assert launch.adopt_rank()
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    assert [os.environ[name] for name in names] == ["3", "4", "1", "gpu07", "20031"]


@pytest.fixture
def fake_python(tmp_path) -> Path:
    """Says one argument a line, and ends with status 7."""
    path = tmp_path / "python"
    path.write_text('#!/bin/sh\nprintf "<%s>\\n" "$@"\nexit 7\n')
    path.chmod(0o755)
    return path


def test_train_local_runs_the_command_that_its_variables_describe(fake_python):
    knobs = {
        "PYTHON": str(fake_python),
        "NPROC": "2",
        "OUT": "a b",
        "DATA": "x.txt y.txt",
        "ARGS": "--verbose --set s=1",
    }
    done = subprocess.run(
        [TRAIN_LOCAL, "--", "--lr", "4"], env=os.environ | knobs, capture_output=True, text=True, check=False
    )
    assert done.returncode == 7
    assert done.stdout.splitlines()[0].startswith("commit ")
    words = (
        "-m megamoe_train.pretrain --recipe debug --nproc 2 --out,a b,--data x.txt y.txt --verbose --set s=1 -- --lr 4"
    )
    out = [word for part in words.split(",") for word in ([part] if part == "a b" else part.split())]
    assert done.stdout.splitlines()[1:] == [f"<{word}>" for word in out]


def test_train_local_dry_run_runs_nothing(fake_python):
    knobs = {"PYTHON": str(fake_python), "DRY_RUN": "1", "RECIPE": "other"}
    done = subprocess.run(
        [TRAIN_LOCAL, "--verbose"], env=os.environ | knobs, capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines()[1:] == [
        f"would run: {fake_python} -m megamoe_train.pretrain --recipe other --verbose"
    ]


def test_a_rank_leaves_at_once_and_says_so_to_who_has_asked():
    """What it holds is not let go of by the interpreter: a model of tens of gigabytes takes it seconds."""
    code = """
import atexit
from megamoe_train.training import launch
class Model:
    def __del__(self):
        print("let go of")
model = Model()
atexit.register(print, "told")
print("last words", end=" ")
launch.leave(5)
"""
    done = subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (5, "last words told\n")

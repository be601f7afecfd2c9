"""launch/train.slurm under a Slurm of shell scripts that runs two "nodes" on this machine; profile.sh; shellcheck."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megamoe_train.training import checkpointing
from tests.pretrain_runs import SMALL, write_text

ROOT = Path(__file__).resolve().parent.parent
SLURM, PROFILE = ROOT / "launch" / "train.slurm", ROOT / "launch" / "profile.sh"

# Runs the job at once, and again whenever it was put back into the queue meanwhile. As Slurm does, from a copy.
SBATCH = """#!/bin/bash
printf '%s\\n' "$*" >>"$FAKE/sbatch"
while [ "${1#launch/}" = "$1" ]; do shift; done
cp "$1" "$FAKE/job"
export SLURM_JOB_ID=41 SLURM_JOB_NODELIST='node[0-1]' SLURM_JOB_NUM_NODES=2 SLURM_RESTART_COUNT=0
shift
while :; do
    rm -f "$FAKE/requeued"
    bash "$FAKE/job" "$@" & echo $! >"$FAKE/batch.part"; mv "$FAKE/batch.part" "$FAKE/batch"
    wait $!; status=$?
    [ -e "$FAKE/requeued" ] || exit $status
    SLURM_RESTART_COUNT=$((SLURM_RESTART_COUNT + 1))
done
"""
# One task on each of two nodes, which name their NVLink domains apart.
SRUN = """#!/bin/bash
printf '%s\\n' "$*" >>"$FAKE/srun"
while [ "$1" != "$PYTHON" ]; do shift; done
export SLURM_STEP_ID=0 SLURM_STEP_NUM_TASKS=2 SLURMD_NODENAME=localhost
for node in 0 1; do
    SLURM_NODEID=$node SLURM_PROCID=$node SLURM_LOCALID=0 MEGAMOE_NVLINK_DOMAIN=node$node "$@" &
    pids="$pids $!"
done
echo $pids >"$FAKE/tasks"
for pid in $pids; do wait $pid || status=$?; done
exit ${status:-0}
"""
SCONTROL = """#!/bin/bash
case $1 in
show) [ "$*" = 'show hostnames node[0-1]' ] && printf 'localhost\\nlocalhost\\n' ;;
requeue) [ "$2" = 41 ] && touch "$FAKE/requeued" ;;
esac
"""
SCANCEL = """#!/bin/bash
printf '%s\\n' "$*" >>"$FAKE/scancel"
kill -TERM $(cat "$FAKE/tasks")
"""


@pytest.fixture
def cluster(tmp_path) -> dict[str, str]:
    """The environment of a user on the login node."""
    fake = tmp_path / "fake"
    fake.mkdir()
    for name, text in (("sbatch", SBATCH), ("srun", SRUN), ("scontrol", SCONTROL), ("scancel", SCANCEL)):
        (fake / name).write_text(text)
        (fake / name).chmod(0o755)
    kept = {name: value for name, value in os.environ.items() if not name.startswith("SLURM_")}
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        kept.pop(name, None)
    (fake / "log").mkdir()
    own = {"FAKE": str(fake / "log"), "PATH": f"{fake}:{kept['PATH']}", "PYTHON": sys.executable}
    return kept | own | {"NODES": "2", "NPROC": "1", "OUT": str(tmp_path / "run"), "OMP_NUM_THREADS": "1"}


def small(tmp_path: Path, **changes: object) -> str:
    """ARGS of a small model on a small text."""
    text = write_text(tmp_path / "topics.txt")
    settings = (
        SMALL | {"global-batch-size": 8, "micro-batch-size": 2} | {k.replace("_", "-"): v for k, v in changes.items()}
    )
    return f"--data {text} " + " ".join(f"--set {name}={value}" for name, value in settings.items())


def test_a_job_on_two_nodes_is_told_to_stop_requeued_and_ends(cluster, tmp_path):
    environment = cluster | {"ARGS": small(tmp_path, train_iters=40, expert_model_parallel_size=1, eval_interval=100)}
    metrics, said = tmp_path / "run" / "metrics.jsonl", tmp_path / "said"
    with said.open("w") as output:
        job = subprocess.Popen(
            [SLURM], env=environment, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            until = time.monotonic() + 150
            while not (metrics.exists() and '"step": 3' in metrics.read_text()):
                assert job.poll() is None and time.monotonic() < until, said.read_text()
                time.sleep(0.02)
            os.kill(int((Path(cluster["FAKE"]) / "batch").read_text()), signal.SIGUSR1)
            assert job.wait(150) == 0, said.read_text()
        finally:
            if job.poll() is None:
                os.killpg(job.pid, signal.SIGKILL)
    text = said.read_text()
    assert "2 ranks on CPU over gloo: expert parallel 1" in text
    assert text.index("told to stop: saving") < text.index("stopped at step ") < text.index("goes back into the queue")
    stopped = int(text.split("stopped at step ")[1].split()[0])
    assert 3 <= stopped < 40
    assert f"resuming from step {stopped} " in text and "done: 40 steps" in text
    steps = [line["step"] for line in map(json.loads, metrics.read_text().splitlines()) if "loss" in line]
    assert steps == list(range(1, 41))
    assert checkpointing.find(tmp_path / "run" / "checkpoints").step == 40
    log = Path(cluster["FAKE"])
    assert (log / "scancel").read_text() == "--signal TERM 41\n"
    submitted = (log / "sbatch").read_text()
    assert "--nodes 2 " in submitted and "--requeue" in submitted and "--signal B:USR1@600" in submitted
    starts = (log / "srun").read_text().splitlines()
    assert [start.split("--rdzv-id ")[1].split()[0] for start in starts] == ["41.0", "41.1"]
    assert all("--nnodes 2 --rdzv-endpoint localhost:20041" in start for start in starts)


def test_experts_across_nodes_are_refused_before_anything_is_written(cluster, tmp_path):
    environment = cluster | {"ARGS": small(tmp_path, train_iters=4)}  # the recipe's EP = 2, on two nodes of one rank
    done = subprocess.run([SLURM], env=environment, capture_output=True, text=True, timeout=150)
    assert done.returncode == 2, done.stdout + done.stderr
    message = (
        "megamoe_train: error: expert-model-parallel-size 2: the group of ranks 0-1 spans NVLink domains: rank 0 on "
        "node0; rank 1 on node1. Experts are reached over NVLink: choose a size that divides the ranks of a host"
    )
    assert done.stdout.count(message) == 2  # each node says so
    assert not (tmp_path / "run").exists()


def test_dry_run_prints_both_commands_and_runs_nothing(cluster):
    knobs = {"DRY_RUN": "1", "RECIPE": "debug", "ACCOUNT": "a", "PARTITION": "p", "CONTAINER_IMAGE": "image.sqsh"}
    done = subprocess.run(
        [SLURM, "--set", "lr=1"],
        env=cluster | knobs | {"CONTAINER_MOUNTS": "/a:/b"},
        capture_output=True,
        text=True,
        check=True,
    )
    submit, _, step = done.stdout.splitlines()
    assert submit.startswith("would submit: sbatch --job-name debug --nodes 2 ")
    assert submit.endswith("--account a --partition p launch/train.slurm --set lr=1")
    assert "srun --ntasks-per-node 1 --kill-on-bad-exit 1 --container-image image.sqsh --container-mounts /a:/b" in step
    assert step.endswith("--rdzv-endpoint FIRST_NODE:20000 --rdzv-id JOB_ID --set lr=1")
    assert list(Path(cluster["FAKE"]).iterdir()) == []


def test_settings_of_a_cluster_come_from_a_file_and_yield_to_the_caller(cluster, tmp_path):
    (tmp_path / "cluster.env").write_text("ACCOUNT=${ACCOUNT:-theirs}\nPARTITION=${PARTITION:-slow}\n")
    knobs = {"DRY_RUN": "1", "CLUSTER_ENV": str(tmp_path / "cluster.env"), "PARTITION": "fast"}
    done = subprocess.run([SLURM], env=cluster | knobs, capture_output=True, text=True, check=True)
    assert "--account theirs --partition fast" in done.stdout


@pytest.mark.parametrize(
    ("profiler", "start"), [("nsys", "nsys profile --output here --force-overwrite true"), ("torch", "PY -m")]
)
def test_profile_wraps_the_command(cluster, profiler, start):
    knobs = {"DRY_RUN": "1", "PROFILER": profiler, "PROFILE_OUT": "here", "PYTHON": "PY", "ARGS": "--verbose"}
    done = subprocess.run([PROFILE, "--", "--lr", "1"], env=cluster | knobs, capture_output=True, text=True, check=True)
    assert done.stdout.startswith(f"would run: {start}")
    assert "--set profile-step-start=10 --set profile-step-end=12 --set profile-ranks=0 --verbose" in done.stdout
    assert ("use-pytorch-profiler=true" in done.stdout) == (profiler == "torch")
    assert done.stdout.endswith("--set profile=true -- --lr 1\n" if profiler == "nsys" else "profiler=true -- --lr 1\n")


def test_profile_without_nsys_says_so(cluster):
    empty = cluster | {"PATH": "/usr/bin:/bin"}
    if shutil.which("nsys", path=empty["PATH"]):
        pytest.skip("nsys is installed")
    done = subprocess.run([PROFILE], env=empty, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (2, "profile.sh: nsys is not on PATH; PROFILER=torch needs none\n")


def test_every_knob_has_a_default():
    for path in (SLURM, PROFILE, ROOT / "launch" / "train_local.sh", ROOT / "launch" / "cluster.env.example"):
        for line in path.read_text().splitlines():
            name, equals, value = line.partition("=")
            if equals and name.isupper() and name.replace("_", "").isalnum() and not name.startswith("NODES=$"):
                assert value.startswith((f"${{{name}:-", '"${')), f"{path.name}: {line}"

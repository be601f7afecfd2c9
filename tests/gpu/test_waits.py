"""No wait hangs in silence: a rank that never comes, errs or does something else ends the others by name."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytestmark = pytest.mark.gpu

ROOT = Path(__file__).resolve().parents[2]
START = """
import sys, torch
from megamoe_train import ops_comm, ops_plan, watchdog
from tests.gpu.virtual import Load, Ranks
load = Load("uniform", (64, 64), 2, 8)
ranks = Ranks(load, streams=True, deadline_s=DEADLINE)
ids = [i.cuda() for i in load.ids()]
xs = [torch.randn(64, 256, device="cuda").bfloat16() for _ in ids]
guard = ranks.workspaces[0].guard
torch.cuda.synchronize()
def expect_timeout(call):
    try:
        with guard.watch():
            call()
            torch.cuda.synchronize()
    except watchdog.MegaMoETimeout as error:
        print("RAISED", error)
        sys.stdout.flush()
        sys.exit(7)
"""
CASES = {
    "a rank that never launches": (
        2,
        "with ranks.on(0): expect_timeout(lambda: ops_plan.build_plan(ranks.workspaces[0], ids[0]))",
        r"rank 0 gave up waiting for the routing counts of rank 1: deadline passed; expected epoch 1, saw epoch 0",
    ),
    "a rank in another operation": (
        30,
        "plans = ranks.plan(ids)\n"
        "a, pool, _ = ops_comm.start_dispatch(plans[0], xs[0])\n"
        "b, _, _ = ops_comm.start_combine(plans[1], pool)\n"
        "def both():\n"
        "    ranks.each(lambda t: t.begin(), [a, b])\n"
        "    with ranks.on(0): a.move()\n"
        "expect_timeout(both)",
        "rank 0 gave up waiting for the announcement (ready word) of the operation of rank 1: the peer is in another "
        "operation; expected epoch 1 dispatch of plan 1, saw epoch 1 combine of plan 1",
    ),
    "a rank whose host failed": (
        30,
        "import threading\n"
        "threading.Timer(1.0, ranks.workspaces[1].abort).start()\n"
        "with ranks.on(0): expect_timeout(lambda: ops_plan.build_plan(ranks.workspaces[0], ids[0]))",
        "rank 0 gave up waiting for the routing counts of rank 1: another rank has failed",
    ),
}


def test_failed_waits_are_named(tmp_path):
    running = {}
    for number, (name, (deadline, code, _)) in enumerate(CASES.items()):
        folder = tmp_path / str(number)
        folder.mkdir()
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "MEGAMOE_RECORD_DIR": str(folder)}
        script = START.replace("DEADLINE", str(deadline)) + code
        running[name] = folder, subprocess.Popen(
            [sys.executable, "-c", script], cwd=ROOT, env=environment, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip
    start = time.monotonic()
    for name, (folder, process) in running.items():
        out, err = process.communicate(timeout=60)
        message = CASES[name][2]
        assert process.returncode == 7, f"{name}: exit {process.returncode}\n{out}\n{err}"
        assert f"RAISED megamoe: {message}" in out, f"{name}: {out}"
        assert f"megamoe: {message}" in err, f"{name}: the watchdog did not print: {err}"
        assert message in (folder / "megamoe-timeout-rank0.txt").read_text(), name
    assert time.monotonic() - start < 25, "a mismatch and an abort end at once, not at their deadline of 30 s"

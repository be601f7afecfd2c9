"""The watchdog without a GPU: records as the kernels write them, what is printed, kept and raised."""

import subprocess
import sys
import time

import pytest
import torch

from megamoe_train import ops_comm, ops_plan, watchdog
from tests.csrc.host import CSRC


def write(guard: watchdog.Guard, **values: int) -> None:
    """As csrc/comm/wait.cuh: the fields, then `complete`."""
    fields = {
        "failure": 1,
        "what": 32,
        "block": 3,
        "thread": 5,
        "rank": guard.rank,
        "peer": 1,
        "expected": 0,
        "seen": 0,
    }
    fields |= values
    ints = guard.record.view(torch.int32)
    for index, name in enumerate(("failure", "what", "block", "thread", "rank", "peer"), start=2):
        ints[index] = fields[name]
    guard.record[4], guard.record[5] = fields["expected"], fields["seen"]
    ints[0] = ints[1] = 1


@pytest.fixture
def guard(tmp_path, monkeypatch):
    monkeypatch.setenv("MEGAMOE_RECORD_DIR", str(tmp_path))
    made = watchdog.Guard(4, pinned=False)
    yield made
    made.stop()


def test_a_record_is_printed_kept_and_raised(guard, tmp_path, capfd):
    guard.check()
    with guard.watch():
        pass
    write(guard, expected=7 << 32, seen=5 << 32)
    message = (
        "megamoe: rank 4 gave up waiting for the routing counts of rank 1: deadline passed; expected epoch 7, "
        "saw epoch 5 (block 3, thread 5)"
    )
    limit = time.monotonic() + 5
    path = tmp_path / "megamoe-timeout-rank4.txt"
    while not path.exists() and time.monotonic() < limit:
        time.sleep(0.01)  # the thread's doing: nothing here asks for it
    time.sleep(0.05)
    assert path.read_text() == message + "\n"
    assert capfd.readouterr().err == message + "\n"
    with pytest.raises(watchdog.MegaMoETimeout) as raised:
        guard.check()
    assert str(raised.value) == message
    assert capfd.readouterr().err == ""  # said once


def test_an_error_after_a_failed_wait_becomes_a_timeout(guard):
    with pytest.raises(RuntimeError, match="something else") as raised, guard.watch():
        raise RuntimeError("something else")
    assert not isinstance(raised.value, watchdog.MegaMoETimeout)
    message = "the pushed rows of a combine of rank 1: another rank has"
    with pytest.raises(watchdog.MegaMoETimeout, match=message), guard.watch():
        write(guard, what=36, failure=3)
        raise RuntimeError("CUDA error: unspecified launch failure")


def test_words_of_an_announcement_are_spelt_out():
    ready = (9 << 32) | (ops_comm.Op.BACKWARD << 24) | 17
    record = watchdog.Record(2, watchdog.READY, 0, 0, 0, 3, ready, ready - (1 << 24))
    assert "expected epoch 9 backward of plan 17, saw epoch 9 forward of plan 17" in str(record)
    inside = watchdog.Record(1, 3, 0, 0, 2, -1, 1, 0)
    assert "rank 2 gave up waiting for an operand in shared memory: deadline passed; expected 1, saw 0" in str(inside)


def enumerators(file: str, name: str) -> dict[str, int]:
    """An enum class of csrc, name -> number, read by a C++ compiler's rules: each one spells its value."""
    text = (CSRC / file).read_text()
    body = text[text.index(f"enum class {name}") :]
    body = body[body.index("{") + 1 : body.index("}")]
    lines = [line.split("//")[0] for line in body.splitlines()]
    entries = [entry.split("=") for entry in "".join(lines).split(",") if "=" in entry]
    return {key.strip(): int(value) for key, value in entries}


def test_csrc_and_python_name_the_same_things():
    assert set(watchdog.WAITS) == set(enumerators("comm/wait.cuh", "Waiting").values())
    assert set(watchdog.FAILURES) == set(enumerators("comm/wait.cuh", "Failure").values())
    ops = enumerators("comm/peers.cuh", "Op")
    assert {int(op) for op in ops_comm.Op} == set(ops.values()) == set(watchdog.OPS)
    assert {name[1:].upper() for name in ops} == {op.name.replace("_", "") for op in ops_comm.Op}
    codes = enumerators("kernels/plan.cuh", "PlanCode")
    assert {name[1:].upper() for name in codes} == {code.name.replace("_", "") for code in ops_plan.PlanCode} | {"GOOD"}


def test_a_process_ends_well_while_its_guards_watch():
    code = "from megamoe_train.watchdog import Guard; import time; g = [Guard(r, pinned=False) for r in range(20)]; "
    ended = subprocess.run([sys.executable, "-c", code + "time.sleep(0.2)"], capture_output=True, text=True)
    assert (ended.returncode, ended.stderr) == (0, "")

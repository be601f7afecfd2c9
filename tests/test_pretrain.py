"""`python -m megamoe_train.pretrain`, run as a user runs it: two ranks over gloo, real text, stopped and resumed."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from megamoe_train.training import checkpointing
from tests.pretrain_runs import arguments, history, kill_while_saving, run, write_text

pytestmark = pytest.mark.timeout(900)  # whole jobs of two processes, one after another, maybe on busy cores
STEPS = 40
OPTIONS = {"train_iters": STEPS, "eval_interval": 20, "save_interval": 10, "log_interval": 10}


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> Path:
    return write_text(tmp_path_factory.mktemp("text") / "topics.txt")


@pytest.fixture(scope="module")
def whole(tmp_path_factory, text) -> tuple[Path, int, str]:
    """One run from the first step to the last: folder, exit status, what it said."""
    out = tmp_path_factory.mktemp("whole") / "run"
    return (out, *run(arguments(out, text, **OPTIONS)))


def test_a_run_learns_and_says_so(whole):
    out, status, said = whole
    assert status == 0, said
    assert "2 ranks on CPU over gloo: expert parallel 2" in said
    assert "moe dispatcher megamoe, backend reference" in said
    assert said.count("starting from random weights") == 1
    assert f"done: {STEPS} steps" in said.splitlines()[-4]
    measured = history(out)
    start, end = measured[0, "validation_loss"], measured[STEPS, "validation_loss"]
    assert end < start - 1
    assert f"validation loss {start:.4f} (step 0) -> {end:.4f} (step {STEPS})" in said
    for step in range(1, STEPS + 1):
        assert measured[step, "loss"] > 0 and measured[step, "grad_norm"] > 0 and measured[step, "lr"] > 0
        assert len(measured[step, "load"]) == 2  # one triple for each layer
        for least, most, spread in measured[step, "load"]:
            assert (
                0 <= least <= 1 <= most <= 4 and spread <= 3**0.5
            )  # top 2 of 8: nobody has more than 4 times the mean


def test_what_a_run_leaves(whole):
    out, _, said = whole
    assert sorted(path.name for path in out.iterdir()) == [
        "checkpoints", "logs", "loss.png", "metrics.jsonl", "run.json", "tensorboard",
    ]  # fmt: skip
    events = EventAccumulator(str(out / "tensorboard")).Reload()
    losses = events.Scalars("lm loss")
    measured = history(out)
    assert [event.step for event in losses] == list(range(1, STEPS + 1))
    assert losses[9].value == pytest.approx(measured[10, "loss"])
    assert events.Scalars("expert-load/layer-1-max")[4].value == pytest.approx(measured[5, "load"][1][1], abs=1e-4)
    assert len(events.Scalars("tokens-per-second")) == STEPS
    assert len((out / "loss.png").read_bytes()) > 10_000
    assert [checkpointing.find(out / "checkpoints", step).step for step in (10, 20, 40)] == [10, 20, 40]
    assert "saving checkpoint at iteration" in (out / "logs" / "rank0.log").read_text()  # Megatron's own words
    assert len(said.splitlines()) < 40  # and not on the console


def test_alltoall_through_the_same_command_gives_the_same_losses(whole, text, tmp_path):
    out = tmp_path / "run"
    status, said = run(arguments(out, text, "--moe-dispatcher", "alltoall", **OPTIONS, exit_interval=12))
    assert status == 0, said
    assert "moe dispatcher alltoall\n" in said
    assert "stopped at step 12 of 40" in said
    ours, theirs = history(whole[0]), history(out)
    for step in range(1, 13):
        assert theirs[step, "loss"] == pytest.approx(ours[step, "loss"], rel=1e-5)
        assert theirs[step, "grad_norm"] == pytest.approx(ours[step, "grad_norm"], rel=1e-4)


def _interrupt_at(step: int):
    def on_line(line: str, process) -> None:
        if line.split()[:2] == ["step", f"{step}/{STEPS}"]:
            process.send_signal(signal.SIGINT)

    return on_line


def test_stopped_killed_and_resumed_equals_undisturbed(whole, text, tmp_path):
    """Ctrl-C early, then kill -9 while a checkpoint is written, then left alone: every number is that of one run."""
    out = tmp_path / "run"
    options = arguments(out, text, **OPTIONS)
    status, said = run(options, _interrupt_at(3))
    assert status == 130, said
    stopped = checkpointing.find(out / "checkpoints").step
    assert 3 <= stopped < STEPS
    assert f"stopped at step {stopped} of {STEPS}" in said
    assert "the same command goes on from there" in said

    target = (stopped // 10 + 1) * 10
    every_step = arguments(out, text, **OPTIONS | {"log_interval": 1})
    status, said = run(every_step, kill_while_saving(out, target))
    assert status == 137, said
    assert f"resuming from step {stopped} " in said
    left = checkpointing.find(out / "checkpoints")
    assert left.step in (stopped, target)  # the last only if the save was over before the kill came

    status, said = run(options)
    assert status == 0, said
    assert f"resuming from step {left.step} " in said
    assert (f"save at step {target} was interrupted" in said) == (left.step != target)
    assert history(out) == history(whole[0])

    status, said = run([*options, "--nproc", "1"])
    assert status == 0
    assert f"is already at step {STEPS} of {STEPS}" in said
    assert history(out) == history(whole[0])

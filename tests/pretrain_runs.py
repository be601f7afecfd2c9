"""Runs of the real command for the tests: a model of two small layers on a small text, two ranks over gloo."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil

from megamoe_train.training import checkpointing

SMALL = {
    "num-layers": 2,
    "num-experts": 8,
    "moe-router-topk": 2,
    "seq-length": 32,
    "max-position-embeddings": 32,
    "vocab-size": 512,
    "micro-batch-size": 4,
    "global-batch-size": 8,
    "eval-iters": 2,
}


ROOT = Path(__file__).resolve().parent.parent


def run_script(name: str, *options: str) -> tuple[int, str]:
    """A script of scripts/, run to its end: exit status and what it said."""
    environment = {key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    command = [sys.executable, "-W", "ignore", str(ROOT / "scripts" / name), *options]
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, timeout=280)
    return done.returncode, done.stdout


def write_text(path: Path) -> Path:
    """A real text of about 100 KB, as a .txt file: documentation topics that Python carries."""
    from pydoc_data import topics

    path.write_text("\n\n".join(text for _, text in sorted(topics.topics.items()))[:100_000])
    return path


def arguments(out: Path, text: Path | None, *more: str, **changes: object) -> list[str]:
    """The options of one run; `changes` and `SMALL` become `--set`, with `_` for `-`."""
    settings = SMALL | {name.replace("_", "-"): value for name, value in changes.items()}
    data = ["--data", str(text), "--data-cache", str(text.parent / "cache")] if text else []
    return ["--out", str(out), *data, *(f"--set={name}={value}" for name, value in settings.items()), *more]


@contextlib.contextmanager
def started(options: list[str]) -> Iterator[subprocess.Popen]:
    """The command, running; gone when the block ends."""
    environment = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
    command = [sys.executable, "-m", "megamoe_train.pretrain", *options]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment | {"OMP_NUM_THREADS": "1"}
    )
    try:
        yield process
    finally:
        if process.poll() is None:
            process.terminate()
            process.wait()
        process.stdout.close()


def run(options: list[str], on_line: Callable[[str, subprocess.Popen], None] | None = None) -> tuple[int, str]:
    """Runs to the end; returns the exit status and everything that was said. `on_line` sees each line as it comes."""
    said = []
    with started(options) as process:
        for line in process.stdout:
            said.append(line)
            if on_line:
                on_line(line, process)
        return process.wait(), "".join(said)


def kill_after(step: int) -> Callable[[str, subprocess.Popen], None]:
    """Kills all ranks, without mercy, when they have said that `step` is done: somewhere in what follows it."""

    def on_line(line: str, process: subprocess.Popen) -> None:
        if _tells(line, step):
            _kill_ranks(process)

    return on_line


def kill_while_saving(out: Path, step: int) -> Callable[[str, subprocess.Popen], None]:
    """Kills all ranks as soon as the folder of the checkpoint of `step` appears."""
    folder = checkpointing.folder_of(out / "checkpoints", step)

    def on_line(line: str, process: subprocess.Popen) -> None:
        if not _tells(line, step - 1):
            return
        until = time.monotonic() + 120
        while not folder.exists() and time.monotonic() < until:
            time.sleep(0.002)
        _kill_ranks(process)

    return on_line


def _tells(line: str, step: int) -> bool:
    words = line.split()
    return words[:1] == ["step"] and len(words) > 1 and words[1].startswith(f"{step}/")


def _kill_ranks(process: subprocess.Popen) -> None:
    for rank in psutil.Process(process.pid).children():
        rank.kill()


TIMINGS = ("tokens_per_s", "tflops", "mfu", "allocated_gib", "reserved_gib")


def history(out: Path) -> dict[tuple[int, str], object]:
    """Everything a run measured that must not depend on timing: (step, name) -> value."""
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return {(line["step"], name): value for line in lines for name, value in line.items() if name not in TIMINGS}

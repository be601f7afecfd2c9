"""The user's own script: `python -m megamoe_train.run` under torchrun, and a hand-written loop that calls install()."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.megatron import tiny

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
OWN_LOOP = os.path.join(os.path.dirname(tiny.SCRIPT), "own_loop.py")
RUN = ("-m", "megamoe_train.run")


def execute(*words) -> subprocess.CompletedProcess:
    """Python on these words with this checkout importable; output and errors together."""
    path = os.pathsep.join(filter(None, (ROOT, os.environ.get("PYTHONPATH"))))
    env = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "ignore", *map(str, words)]
    return subprocess.run(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=200)


def torchrun(logs: Path, *words) -> str:
    """The output of two ranks, one after the other; AssertionError with its end if they fail.

    Each rank writes to files of its own: in one pipe the lines of one can be cut by those of another.
    """
    launch = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    done = execute(*launch, "--log-dir", logs, "--redirects", "3", *words)
    text = "".join(log.read_text() for log in sorted(logs.rglob("*.log")))
    assert done.returncode == 0, text[-4000:] + done.stdout[-1000:]
    return text


def as_flat_yaml(arguments) -> str:
    """The same settings as `key: value` lines."""
    groups = re.split(r" ?--", " ".join(arguments))[1:]
    pairs = [group.split(" ", 1) for group in groups]
    return "".join(f"{pair[0]}: {pair[1] if len(pair) == 2 else 'true'}\n" for pair in pairs)


def test_an_unmodified_script_trains_the_same_with_megamoe(tmp_path):
    """Equal printed losses. The megamoe run is configured by YAML alone, and saves through processes of its own."""
    arguments = [*tiny.ARGUMENTS, "--expert-model-parallel-size", "2"]
    theirs = torchrun(tmp_path / "theirs", *RUN, tiny.SCRIPT, *arguments, "--moe-dispatcher", "alltoall")
    settings = tmp_path / "run.yaml"
    checkpoint = f"save: {tmp_path / 'checkpoint'}\nsave-interval: 4\nckpt-format: torch_dist\n"
    settings.write_text(as_flat_yaml(arguments) + checkpoint + "moe-dispatcher: megamoe\n")
    ours = torchrun(tmp_path / "ours", *RUN, tiny.SCRIPT, "--megamoe-config", settings)
    assert "megamoe: one call for all experts SequentialMLP, backend reference" in ours and "megamoe:" not in theirs
    curves = [tiny.printed_curve(text) for text in (ours, theirs)]
    assert len(curves[1].losses) == 4 and curves[1].losses[-1] < curves[1].losses[0]
    tiny.assert_same(*curves)
    assert (tmp_path / "checkpoint" / "latest_checkpointed_iteration.txt").read_text().strip() == "4"


def test_a_hand_written_loop_trains_the_same_with_megamoe(tmp_path):
    """install() and one field of TransformerConfig; micro-batches of 24, 24 and 7 tokens, evaluation every step."""
    texts = [torchrun(tmp_path / name, OWN_LOOP, name, 24, 24, 7) for name in ("alltoall", "megamoe")]
    lines = [re.findall(r"step .*", text) for text in texts]
    numbers = [[[float(word) for word in re.findall(r"[\d.]+E[-+]\d+", line)] for line in part] for part in lines]
    assert len(numbers[0]) == 4 and numbers[0][-1][0] < numbers[0][0][0]
    for ours, theirs in zip(numbers[1], numbers[0], strict=True):
        assert ours == pytest.approx(theirs, rel=2e-6)


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        ((), 2, "usage: python -m megamoe_train.run SCRIPT.py"),
        (("--help",), 0, "usage: python -m megamoe_train.run SCRIPT.py"),
        (("no_such_script.py", "--lr", "1"), 1, "megamoe_train.run: no such script: no_such_script.py"),
        ((tiny.SCRIPT, *tiny.ARGUMENTS, "--moe-dispatcher", "megamoe", "--moe-token-dispatcher-type", "alltoall"), 2,
         "--moe-dispatcher megamoe contradicts --moe-token-dispatcher-type alltoall: give one of them"),
        ((tiny.SCRIPT, *tiny.ARGUMENTS, "--moe-dispatcher", "megamoe", "--moe-expert-capacity-factor", "1",
          "--moe-pad-expert-input-to-capacity"), 1, "TransformerConfig.moe_pad_expert_input_to_capacity = True"),
    ],
)  # fmt: skip
def test_what_cannot_run_says_why(words, code, message):
    done = execute(*RUN, *words)
    assert done.returncode == code and message in done.stdout, done.stdout[-2000:]

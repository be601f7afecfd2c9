"""Requests that cannot be run: one clear line, exit status 2, and nothing left behind."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

from megamoe_train import pretrain
from megamoe_train.training import checkpointing
from tests.pretrain_runs import SMALL, arguments, run, write_text

pytestmark = pytest.mark.timeout(900)  # whole jobs of two processes, one after another, maybe on busy cores


def files_in(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--recipe", "v5"], "recipe: 'v5' is unknown; recipes are: debug"),
        (["--nproc", "3"], "world size: 3 is not a multiple of expert-model-parallel-size 2 x pipeline-model-parallel"),
        (
            ["--set", "pipeline-model-parallel-size=2"],
            "world size: 2 is not a multiple of expert-model-parallel-size 2",
        ),
        (["--set", "num-experts=31"], "num-experts: 31 is not divisible by expert-model-parallel-size 2"),
        (["--set", "moe-router-topk=33"], "moe-router-topk: 33 is not between 1 and num-experts (32)"),
        (["--nproc", "0"], "--nproc: 0 is not between 1 and"),
        (["--set", "save-interval=none"], "save-interval: absent, must be 1 or more"),
        (["--set", "train-iters=0"], "train-iters: 0, must be 1 or more"),
        (["--set", "lr"], "--set: 'lr' is not key=value"),
        (["--", "500"], "after --: '500' is not a Megatron argument"),
        (["--data", "absent.txt"], "data: absent.txt does not exist"),
        (["--data", "."], "data: . is a directory without .txt or .jsonl files"),
        (["--data", "a.txt", "--set", "data-path=tokens"], "data: --data and --data-path are both given"),
        (["--megamoe-config", "absent.yaml"], "--megamoe-config absent.yaml: [Errno 2] No such file"),
        (["--", "--megamoe-config", "a.yaml"], "megamoe-config: give --megamoe-config FILE before the --"),
    ],
)
def test_refused_before_any_process_starts(options, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for name in ("RANK", "WORLD_SIZE", "SLURM_STEP_ID"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(pretrain, "_count_gpus", lambda: 0)
    monkeypatch.setattr(pretrain.launch, "start", lambda *_: pytest.fail("ranks were started"))
    assert pretrain.main(["--out", "out", *options]) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.startswith(f"megamoe_train: error: {message}")
    assert said.err.count("\n") == 1
    assert files_in(tmp_path) == []


# Optimizer states that Megatron could not take up, though the weights fit: ((folder, data, settings), why).
OTHER_OPTIMIZER = [
    (("run", "topics.txt", sets), why)
    for sets, why in (
        (["optimizer=sgd"], "was saved with optimizer adam, this job has sgd"),
        (["use-distributed-optimizer=true"], "was saved with use-distributed-optimizer False, this job has True"),
        (["bf16=true"], "was saved with bf16 False, this job has True"),
        (
            ["expert-model-parallel-size=1"],
            "was saved with expert-model-parallel-size 2, this job has 1; "
            "Megatron does not carry the optimizer's state between 1 and more",
        ),
    )
]

# Calls the checks of a rank for many requests in one process: Megatron is imported once.
CHECK_MANY = """
import json, os, sys
from pathlib import Path
os.environ["WORLD_SIZE"] = "2"
from megamoe_train.training.request import Request, check
answers = []
for case in json.load(sys.stdin):
    try:
        job = check(Request("debug", Path(case["out"]), tuple(case["data"]), sets=tuple(case["sets"])), 2)
        answers.append(f"accepted from step {job.start_step}")
    except ValueError as error:
        answers.append(str(error))
Path(sys.argv[1]).write_text(json.dumps(answers))
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A folder with a text, a run of two steps on it (checkpoint `run`), and token files."""
    folder = tmp_path_factory.mktemp("place")
    text = write_text(folder / "topics.txt")
    status, said = run(arguments(folder / "run", text, train_iters=4, exit_interval=2, eval_interval=100))
    assert status == 0, said
    rng = np.random.default_rng(0)
    for name, length, largest in (("tokens", 4000, 511), ("foreign", 4000, 600), ("short", 100, 511)):
        builder = IndexedDatasetBuilder(f"{folder}/{name}.bin", np.uint16)
        for document in np.array_split(np.append(rng.integers(1, 500, length - 1), largest).astype(np.uint16), 20):
            builder.add_document(document, [len(document)])
        builder.finalize(f"{folder}/{name}.idx")
    shutil.copy(folder / "tokens.idx", folder / "cut.idx")
    (folder / "cut.bin").write_bytes((folder / "tokens.bin").read_bytes()[:-10])
    shutil.copy(folder / "tokens.bin", folder / "noindex.bin")
    (folder / "noindex.idx").write_bytes(b"not an index")
    return folder


def damaged(place: Path, name: str) -> Path:
    """A copy of the run, to be damaged; returns the folder of its only checkpoint."""
    shutil.copytree(place / "run", place / name)
    return checkpointing.folder_of(place / name / "checkpoints", 2)


def test_refused_by_the_ranks_before_training(place):
    (damaged(place, "truncated") / "__1_0.distcp").write_bytes(b"only this")
    (damaged(place, "missing") / "__0_0.distcp").unlink()
    (damaged(place, "garbled") / ".metadata").write_bytes(b"\x80\x05garbage")
    (damaged(place, "untracked").parent / checkpointing.TRACKER).write_text("")
    (damaged(place, "wrong").parent / checkpointing.TRACKER).write_text("7")
    two = damaged(place, "two")
    shutil.copytree(two, two.with_name("iter_0000001"))
    (two / "__0_0.distcp").write_bytes(b"")
    cases = [
        ("run", "topics.txt", [], "accepted from step 2"),
        ("untracked", "topics.txt", [], "accepted from step 2"),
        ("fresh", "tokens", [], "accepted from step 0"),
        ("run", "topics.txt", ["hidden-size=512"], "iter_0000002 was saved with hidden-size 256, this job has 512"),
        ("run", "topics.txt", ["num-layers=3"], "was saved with num-layers 2, this job has 3"),
        ("run", "topics.txt", ["num-experts=16"], "was saved with num-experts 8, this job has 16"),
        ("run", "topics.txt", ["moe-ffn-hidden-size=256"], "was saved with moe-ffn-hidden-size 128, this job has 256"),
        ("run", "topics.txt", ["mtp-num-layers=1"], "was saved with mtp-num-layers None, this job has 1"),
        (
            "run",
            "topics.txt",
            ["moe-shared-expert-intermediate-size=none"],
            "was saved with moe-shared-expert-intermediate-size 128, this job has None",
        ),
        ("run", "topics.txt", ["qk-layernorm=true"], "was saved with qk-layernorm False, this job has True"),
        *((*case, f"{why}; --set no-load-optim=true takes the weights alone") for case, why in OTHER_OPTIMIZER),
        *((*case[:2], [*case[2], "no-load-optim=true"], "accepted from step 2") for case, _ in OTHER_OPTIMIZER),
        ("run", "tokens", [], "run was trained on"),
        ("run", "topics.txt", ["ckpt-step=5"], "checkpoint: step 5 in"),
        ("truncated", "topics.txt", [], "iter_0000002 cannot be read: __1_0.distcp has 9 bytes of"),
        ("missing", "topics.txt", [], "iter_0000002 cannot be read: __0_0.distcp has 0 bytes of"),
        ("garbled", "topics.txt", [], "iter_0000002 cannot be read: "),
        ("two", "topics.txt", [], "other checkpoints there: 1 (--set ckpt-step=1)"),
        ("two", "topics.txt", ["ckpt-step=1"], "accepted from step 1"),
        ("wrong", "topics.txt", [], "step 7 in"),
        ("fresh", "foreign", [], "foreign.bin has token 600, outside vocab-size 512; --set vocab-size=601"),
        ("fresh", "foreign", ["vocab-size=601"], "accepted from step 0"),
        (
            "fresh",
            "short",
            [],
            "short.bin (20 documents split 95,5,0) gives 95 tokens to train and 5 to validate; seq-length 32 ",
        ),
        ("fresh", "cut", [], "cut.bin has 3995 tokens of 4000 that its index names"),
        ("fresh", "noindex", [], "noindex.idx cannot be read"),
        ("fresh", "tokens", ["split=100,0,0"], "gives 4000 tokens to train and 0 to validate"),
        ("fresh", "topics.txt", ["mock-data=true"], "mock-data: this command trains on text"),
        ("fresh", "topics.txt", ["load=/nowhere"], "load: /nowhere holds no checkpoint"),
        ("fresh", "topics.txt", ["train-iterz=4"], "--train-iterz is not a Megatron argument; nearest: --train-iters"),
        ("fresh", "topics.txt", ["lr=high"], "argument --lr: invalid float value: 'high'"),
        ("fresh", "topics.txt", ["moe-dispatcher=deepest"], "argument --moe-dispatcher: invalid choice: 'deepest'"),
        ("fresh", "topics.txt", ["moe-token-dispatcher-type=alltoall"], "contradicts"),
        ("fresh", "topics.txt", ["lr-warmup-iters=3"], "Megatron refuses these arguments ("),
        ("fresh", "topics.txt", ["hidden-size=320"], "megamoe refuses"),
        ("fresh", "topics.txt", ["megamoe-backend=fused"], 'backend="fused" runs on CUDA tensors, not on cpu'),
    ]
    before = files_in(place)
    requests = [
        {
            "out": str(place / out),
            "data": [str(place / data)],
            "sets": [f"{name}={value}" for name, value in SMALL.items()] + ["train-iters=4", *sets],
        }
        for out, data, sets, _ in cases
    ]
    answer = place.parent / "answers.json"
    subprocess.run(
        [sys.executable, "-W", "ignore", "-c", CHECK_MANY, str(answer)],
        input=json.dumps(requests),
        text=True,
        check=True,
    )
    answers = json.loads(answer.read_text())
    for (_, data, sets, expected), answer in zip(cases, answers, strict=True):
        assert expected in answer, (data, sets)
        assert "\n" not in answer or answer.startswith("megamoe refuses")
    assert files_in(place) == before


def said_once(said: str, message: str) -> bool:
    """One error, of one line, in all that was said."""
    (line,) = [line for line in said.splitlines() if line.startswith("megamoe_train: error:")]
    return message in line and "Traceback" not in said


def test_two_ranks_fail_with_one_message(place):
    """A check that only ranks can make: the first of the machine speaks, the status is 2, nothing is left."""
    text = place / "little.txt"
    text.write_text((place / "topics.txt").read_text()[:9000])
    before = files_in(place)
    options = arguments(place / "new", text, seq_length=8192, max_position_embeddings=8192)
    cache = options.index("--data-cache")
    status, said = run(options[:cache] + options[cache + 2 :])
    assert status == 2, said
    assert said_once(said, "seq-length 8192 needs 8193 of each")
    assert files_in(place) == before


def test_a_checkpoint_that_only_loading_shows_to_be_of_another_model(place):
    """No argument that is compared differs, but the model has one parameter more, which Megatron misses as it loads."""
    damaged(place, "other")
    status, said = run(arguments(place / "other", place / "topics.txt", train_iters=4, softmax_type="learnable"))
    assert status == 2, said
    assert said_once(said, "iter_0000002 does not fit this job: KeyError: ")
    assert checkpointing.find(place / "other" / "checkpoints").step == 2

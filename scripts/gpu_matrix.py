"""Rows of the training matrix here: Megatron's `pretrain()` with alltoall and with megamoe, a few steps each.

    python scripts/gpu_matrix.py                       # all rows that fit, on all GPUs (2), fused backend
    python scripts/gpu_matrix.py --ranks 2 --backend reference --rows "EP=2" "clamp"   # also on the CPU, over gloo

Each row prints, once it is known, what became of it: `ran` with the largest relative differences of losses and of
gradient norms, `failed` with the first line of why, `not run` with what is missing. `--out FILE.json` keeps the table.
A row that breaks its processes costs the others nothing: they are started again for the rows that are left. Exits 1
where a row failed or differed by more than its limit.
"""

from __future__ import annotations

import argparse
import fnmatch
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import matrix_checkpoints
import matrix_memory
import trainings
from compare_training import moved_weights
from matrix_rows import ROWS, STEPS, arguments_of, missing

# Of a worker's environment: what --deterministic-mode asks for, and what Megatron's overlaps do.
DETERMINISTIC = {"NVTE_ALLOW_NONDETERMINISTIC_ALGO": "0", "NCCL_ALGO": "Ring", "CUBLAS_WORKSPACE_CONFIG": ":4096:8"}
ORDERED = {"CUDA_DEVICE_MAX_CONNECTIONS": "1"}
ROW_SECONDS = 240  # for one row, both runs and its share of the start


def train(words: list[str], after_step: Callable[[int], None] | None = None) -> tuple[list[float], list[float]]:
    """One whole `pretrain()` on random tokens: losses and gradient norms, nan on ranks that have no loss."""
    from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
    from megatron.core.datasets.gpt_dataset import GPTDatasetConfig, MockGPTDataset
    from megatron.core.tokenizers.utils.build_tokenizer import build_tokenizer
    from megatron.training import get_args
    from megatron.training.arguments import parse_and_validate_args

    from megamoe_train import install

    def datasets(num_samples, vp_stage=None):
        args = get_args()
        config = GPTDatasetConfig(
            random_seed=args.seed,
            sequence_length=args.seq_length,
            split="99,1,0",
            tokenizer=build_tokenizer(args),
            reset_position_ids=False,
            reset_attention_mask=False,
            eod_mask_loss=False,
            create_attention_mask=False,
        )
        return BlendedMegatronDatasetBuilder(MockGPTDataset, num_samples, lambda: True, config).build()

    datasets.is_distributed = True
    install(backend="auto", recompute=None, experts="paired", sizing="high_water", capacity=0)
    argv, sys.argv = sys.argv, [sys.argv[0], *words]
    try:
        steps = trainings.pretrain_once(parse_and_validate_args(), datasets, after_step=after_step)
    finally:
        sys.argv = argv
    return [loss for loss, _ in steps], [norm for _, norm in steps]


def work(names: list[str], backend: str, noise_runs: int, answers: Path) -> None:
    """A rank of a worker: the rows one after another. The last rank, which has the losses, writes the answers."""
    import torch

    on_gpu = torch.cuda.is_available()
    rank, ranks = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    from megamoe_train import install

    install()
    baselines: dict[tuple[str, ...], tuple] = {}
    for name in names:
        start = time.monotonic()
        if ROWS[name].zipf:
            answer = watch_memory(arguments_of(name, "megamoe", backend, on_gpu))
            if rank == ranks - 1:
                _write(answers, {"row": name, **answer, "seconds": time.monotonic() - start})
            continue
        theirs_words = arguments_of(name, "alltoall", backend, on_gpu)
        key = tuple(theirs_words)
        if key not in baselines:
            theirs = train(theirs_words)
            baselines[key] = theirs, max((noise(theirs_words, theirs[0], n + 1) for n in range(noise_runs)), default=0)
        (theirs, apart), ours = baselines[key], train(arguments_of(name, "megamoe", backend, on_gpu))
        if rank == ranks - 1:
            answer = {
                "row": name,
                "losses": [theirs[0], ours[0]],
                "first_difference": difference(theirs[0], ours[0], steps=2),
                "loss_difference": difference(theirs[0], ours[0]),
                "norm_difference": difference(theirs[1], ours[1]),
                "noise": apart,
                "seconds": time.monotonic() - start,
            }
            _write(answers, answer)


def noise(words: list[str], losses: list[float], seed: int) -> float:
    """How far the losses are from those of a training whose weights were moved by one ulp."""
    with moved_weights(seed):
        return difference(losses, train(words)[0])


def watch_memory(words: list[str]) -> dict:
    """Ours under Zipf loads: bytes reserved at two steps."""
    reserved: list[int] = []

    def after_step(step: int) -> None:
        if step in matrix_memory.LOOKED_AT:
            reserved.append(matrix_memory.reserved_bytes())

    with matrix_memory.zipf_load():
        train(words, after_step)
    return {"reserved": reserved}


def _write(answers: Path, answer: dict) -> None:
    with answers.open("a") as file:
        file.write(json.dumps(answer) + "\n")


def difference(theirs: list[float], ours: list[float], steps: int = STEPS) -> float:
    """The largest relative difference in the first `steps`. Raises ValueError for curves of another length."""
    if len(theirs) != STEPS or len(ours) != STEPS:
        raise ValueError(f"curves of {len(theirs)} and {len(ours)} steps, {STEPS} expected")
    pairs = list(zip(theirs, ours, strict=True))
    return max(abs(a - b) / abs(a) if a == a and b == b else float("inf") for a, b in pairs[:steps])


class Answers:
    """What the rows became, each told of as soon as it is known."""

    def __init__(self, path: Path, tell: Callable[[dict], None]):
        self.path, self.tell = path, tell
        self.found: dict[str, dict] = {}

    def add(self, answer: dict) -> None:
        if answer["row"] not in self.found:
            self.found[answer["row"]] = answer
            self.tell(answer)

    def read(self) -> int:
        """Takes what the worker has written; how many there are."""
        if self.path.exists():
            *whole, _ = self.path.read_text().split("\n")  # the last line may still be on its way
            for line in whole:
                self.add(json.loads(line))
        return len(self.found)


def run_rows(
    names: list[str], ranks: int, folder: Path, tell: Callable[[dict], None], *options: str
) -> dict[str, dict]:
    """Starts workers until every row has an answer: a worker that breaks has failed in its first row without one."""
    answers = Answers(folder / "answers.jsonl", tell)
    left = list(names)
    while left:
        log = folder / f"worker-{len(answers.found)}.log"
        given = ("--work", json.dumps(left), "--answers", str(answers.path), *options)
        with log.open("w") as output:
            worker = trainings.start_ranks(
                ranks,
                "gpu_matrix.py",
                *given,
                defaults=DETERMINISTIC,
                forced=ORDERED,
                stdout=output,
                stderr=subprocess.STDOUT,
            )
            status = _wait(worker, answers, ROW_SECONDS)
        answers.read()
        left = [name for name in left if name not in answers.found]
        if left:  # the first of them broke the worker
            why, around = _why(log, status)
            answers.add({"row": left[0], "failed": why, "log": str(log), "lines": around})
            left = left[1:]
    return answers.found


def _wait(worker: subprocess.Popen, answers: Answers, seconds: float) -> str:
    """Until the worker ends, or no answer has come for `seconds`. What became of it, in words."""
    count, since = -1, time.monotonic()
    while worker.poll() is None:
        now = answers.read()
        if now != count:
            count, since = now, time.monotonic()
        if time.monotonic() - since > seconds:
            worker.terminate()
            try:
                worker.wait(30)
            except subprocess.TimeoutExpired:
                worker.kill()
            return f"no answer for {seconds:.0f} s"
        time.sleep(0.2)
    return f"exit status {worker.returncode}"


def _why(log: Path, status: str) -> tuple[str, list[str]]:
    """The last error that a rank printed, with the next line where its own says nothing ("Last error:"); and the lines
    around it, for a table that outlives the log."""
    kinds = ("Error:", "Exception:", "Timeout:", "error:")
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines()]
    errors = [
        number
        for number, line in enumerate(lines)
        if any(kind in line for kind in kinds) and "ChildFailedError" not in line
    ]
    if not errors:
        return f"{status}; no error was printed", lines[-40:]
    last = errors[-1]
    said = " ".join(lines[last : last + 2]) if lines[last].endswith(":") else lines[last]
    return f"{status}; {said}"[:300], lines[max(0, last - 40) : last + 10]


def state_of(answer: dict, limits: tuple[float, float]) -> str:
    """ "ran", "differs" or "failed". limits: of the first two losses, which one update separates, and of all of them:
    Adam makes whole steps of rounding errors, and a token that changes its expert does the rest. Where one ulp of the
    weights moves alltoall's own losses further, twice that."""
    if "state" in answer:
        return answer["state"]
    if "failed" in answer:
        return "failed"
    if "reserved" in answer:
        return "ran" if matrix_memory.is_flat(answer["reserved"]) else "differs"
    most = max(limits[1], 2 * answer["noise"])
    good = answer["first_difference"] <= limits[0] and answer["loss_difference"] <= most
    return "ran" if good else "differs"


def figures(answer: dict) -> str:
    """What a row found, in words."""
    if "reserved" in answer:
        steps = zip(matrix_memory.LOOKED_AT, answer["reserved"], strict=True)
        return "reserved " + ", ".join(f"{size / 2**20:.0f} MiB at step {step}" for step, size in steps)
    if "said" in answer or "failed" in answer:
        return answer.get("said") or answer["failed"]
    first, every, norm = (answer[f"{what}_difference"] for what in ("first", "loss", "norm"))
    return f"2 losses {first:.1e}, all losses {every:.1e} (noise {answer['noise']:.1e}), norms {norm:.1e}"


def chosen(patterns: list[str] | None) -> list[str]:
    """Names of rows, in the order of the table. Raises ValueError for a pattern that none has."""
    names = [*ROWS, *matrix_checkpoints.ROWS]
    for pattern in patterns or ():
        if pattern not in names and not fnmatch.filter(names, pattern):
            raise ValueError(f"unknown row: {pattern}; --list prints them")
    return [name for name in names
            if not patterns or any(name == one or fnmatch.fnmatchcase(name, one) for one in patterns)]  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", nargs="+", metavar="NAME", help='some of the rows, "checkpoint*" too (default: all)')
    parser.add_argument("--ranks", type=int, help="processes (default: one for each GPU, 2 without)")
    parser.add_argument("--backend", default="fused", help="of megamoe (default: fused; the CPU has reference)")
    parser.add_argument("--noise-runs", type=int, default=3, metavar="N", help="of alltoall, weights moved by an ulp")
    parser.add_argument("--list", action="store_true", help="print the names of the rows")
    parser.add_argument("--out", type=Path, metavar="FILE.json", help="where the table is kept")
    parser.add_argument("--work", help=argparse.SUPPRESS)
    parser.add_argument("--answers", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.work:
        trainings.die_with_parent()
        work(json.loads(options.work), options.backend, options.noise_runs, options.answers)
        return 0
    try:
        names = chosen(options.rows)
    except ValueError as error:
        parser.error(str(error))
    if options.list:
        print("\n".join(names))
        return 0
    return run_matrix(names, options)


def run_matrix(names: list[str], options: argparse.Namespace) -> int:
    import torch

    from megamoe_train import recipes

    gpus = torch.cuda.device_count()
    ranks = options.ranks or gpus or 2
    limits = (1e-3, 5e-3) if gpus else (2e-6, 1e-3)  # bf16, fp32
    device = torch.cuda.get_device_name() if gpus else "CPU"
    world = recipes.World(ranks, gpus)
    compared = [name for name in names if name in ROWS]
    absent = {name: why for name in compared if (why := missing(name, world))}
    folder = Path(tempfile.mkdtemp(prefix="megamoe-matrix-"))
    print(f"{ranks} ranks on {device}, backend {options.backend}, {STEPS} steps; logs in {folder}")
    print(f"| {'row':<70} | state   | seconds | found")
    print(f"|{'-' * 72}|---------|---------|------", flush=True)

    def tell(answer: dict) -> None:
        seconds = f"{answer['seconds']:.1f}" if "seconds" in answer else ""
        print(f"| {answer['row']:<70} | {state_of(answer, limits):<7} | {seconds:>7} | {figures(answer)}", flush=True)

    more = ("--backend", options.backend, "--noise-runs", str(options.noise_runs))
    found = run_rows([name for name in compared if name not in absent], ranks, folder, tell, *more)
    place = None
    for name in (name for name in names if name not in ROWS):
        if ranks < 2:
            absent[name] = f"needs 2 ranks, {ranks} are here"
            continue
        place = place or matrix_checkpoints.Place(folder, options.backend, bool(gpus), limits)
        start = time.monotonic()
        found[name] = matrix_checkpoints.run_row(name, place) | {"seconds": time.monotonic() - start}
        tell(found[name])
    for name, why in absent.items():
        print(f"| {name:<70} | not run |         | {why}")
    if options.out:
        table = {"device": device, "ranks": ranks, "backend": options.backend, "steps": STEPS, "limits": limits}
        rows = [{"row": name, "not_run": absent[name]} if name in absent else found[name] for name in names]
        options.out.write_text(json.dumps(table | {"rows": rows}, indent=1))
    return 1 if any(state_of(answer, limits) != "ran" for answer in found.values()) else 0


if __name__ == "__main__":
    sys.exit(main())

"""Rows of the training matrix here: Megatron's `pretrain()` with alltoall and with megamoe, a few steps each.

    python scripts/gpu_matrix.py                       # all rows that fit, on all GPUs (2), fused backend
    python scripts/gpu_matrix.py --ranks 2 --backend reference --rows "EP=2" "clamp"   # also on the CPU, over gloo

Each row prints what became of it: `ran` with the largest relative differences of losses and gradient norms, `failed`
with the first line of why, `not run` with what is missing. `--out FILE.json` keeps the table. A row that breaks its
processes costs the others nothing: they are started again for the rows that are left. Exits 1 where a row failed or
differed by more than its limit.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import shlex
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import trainings

STEPS = 6
ROW_SECONDS = 240  # for one row, both runs and its share of the start

MODEL = shlex.split(f"""
--num-layers 2 --hidden-size 512 --num-attention-heads 8 --group-query-attention --num-query-groups 2
--ffn-hidden-size 512 --moe-ffn-hidden-size 256 --num-experts 8 --moe-router-topk 2
--moe-router-load-balancing-type aux_loss --moe-aux-loss-coeff 1e-2 --moe-router-dtype fp32
--seq-length 256 --max-position-embeddings 256 --position-embedding-type rope --normalization RMSNorm --swiglu
--disable-bias-linear --untie-embeddings-and-output-weights --attention-dropout 0 --hidden-dropout 0
--micro-batch-size 2 --global-batch-size 8 --lr 1e-3 --min-lr 1e-4 --log-interval 1 --eval-iters 1
--eval-interval 100 --num-workers 0
--vocab-size 511 --tokenizer-type NullTokenizer --mock-data --no-bias-swiglu-fusion --no-rope-fusion
--no-create-attention-mask-in-dataloader --seed 5 --train-iters {STEPS} --lr-decay-iters {STEPS}
""")
LOCAL = shlex.split("""
--transformer-impl local --no-persist-layer-norm --no-gradient-accumulation-fusion --no-masked-softmax-fusion
""")
ENGINE = ["--transformer-impl", "transformer_engine", "--moe-grouped-gemm"]
BF16 = ["--bf16"]
SHARDED = ["--use-distributed-optimizer"]
EP1, EP2 = (["--expert-model-parallel-size", str(size)] for size in (1, 2))
V4 = shlex.split("""
--moe-router-score-function sqrtsoftplus --moe-router-enable-expert-bias --moe-router-load-balancing-type seq_aux_loss
--activation-func-clamp-value 10
""")


@dataclass(frozen=True)
class Row:
    """One way of training."""

    arguments: tuple[str, ...]
    engine: bool = False  # needs TransformerEngine
    ranks: int = 2
    ours: tuple[str, ...] = ()  # settings that must change no number, and which only our run has


def row(*parts: list[str], engine: bool = False, ranks: int = 2, ours: str = "") -> Row:
    return Row(tuple(word for part in parts for word in part), engine, ranks, tuple(shlex.split(ours)))


ROWS = {
    "EP=1, DDP": row(EP1),
    "EP=2": row(EP2),
    "EP=2, staged experts": row(EP2, ours="--megamoe-experts staged"),
    "distributed optimizer": row(EP2, SHARDED),
    "overlap grad reduce": row(EP2, SHARDED, ["--overlap-grad-reduce"]),
    "overlap grad reduce and param gather": row(EP2, SHARDED, ["--overlap-grad-reduce", "--overlap-param-gather"]),
    "overlap param gather, EP=1": row(EP1, SHARDED, ["--overlap-grad-reduce", "--overlap-param-gather"]),
    "gradients in bf16": row(EP2, ["--grad-reduce-in-bf16"]),
    "recompute full": row(EP2, ours="--recompute-granularity full --recompute-method uniform --recompute-num-layers 1"),
    "recompute moe": row(EP2, ours="--recompute-granularity selective --recompute-modules moe"),
    "recompute fc1": row(EP2, ours="--megamoe-recompute fc1"),
    "PP=2, 1F1B": row(EP1, ["--pipeline-model-parallel-size", "2"]),
    "PP=2, interleaved": row(
        EP1, shlex.split("--pipeline-model-parallel-size 2 --num-layers 4 --num-virtual-stages-per-pipeline-rank 2")
    ),
    "PP=2 x EP=2": row(EP2, ["--pipeline-model-parallel-size", "2"], ranks=4),
    "shared experts": row(EP2, ["--moe-shared-expert-intermediate-size", "256"]),
    "MTP": row(EP2, ["--mtp-num-layers", "1"]),
    "V4 router: sqrtsoftplus, expert bias, sequence loss, clamp": row(EP2, V4),
    "z loss": row(EP2, ["--moe-z-loss-coeff", "1e-3"]),
    "dropped tokens": row(EP2, ["--moe-expert-capacity-factor", "0.75"]),
    "TransformerEngine: TEGroupedMLP, EP=2": row(EP2, engine=True),
    "TransformerEngine: EP=1, DDP": row(EP1, engine=True),
    "TransformerEngine: gradient accumulation fusion, overlaps": row(
        EP2, SHARDED, ["--overlap-grad-reduce", "--overlap-param-gather"], engine=True
    ),
    "TransformerEngine: no gradient accumulation fusion": row(EP2, ["--no-gradient-accumulation-fusion"], engine=True),
    "TransformerEngine: recompute full": row(
        EP2, engine=True, ours="--recompute-granularity full --recompute-method uniform --recompute-num-layers 1"
    ),
    "TransformerEngine: sequence parallel, TP=2": row(
        EP2,
        shlex.split("--tensor-model-parallel-size 2 --sequence-parallel --expert-tensor-parallel-size 1"),
        engine=True,
    ),
    "TransformerEngine: latent attention, V4 router, shared expert, MTP": row(
        EP2, V4, shlex.split("""--multi-latent-attention --q-lora-rank 128 --kv-lora-rank 64 --qk-head-dim 64
        --qk-pos-emb-head-dim 32 --v-head-dim 64 --moe-shared-expert-intermediate-size 256 --mtp-num-layers 1
        --rope-type rope"""), engine=True
    ),
    # Last: torch's switch stays on for the rest of a process.
    "deterministic mode": row(EP2, ["--deterministic-mode"]),
}  # fmt: skip


def missing(name: str, ranks: int, has_engine: bool) -> str | None:
    """Why a row cannot run here."""
    if ROWS[name].engine and not has_engine:
        return "TransformerEngine is not installed"
    if ROWS[name].ranks > ranks:
        return f"needs {ROWS[name].ranks} ranks, {ranks} are here"
    return None


def arguments_of(name: str, dispatcher: str, backend: str, on_gpu: bool) -> list[str]:
    """Megatron's command line for one of the two runs of a row."""
    chosen = ROWS[name]
    words = [*MODEL, *(ENGINE if chosen.engine else LOCAL), *(BF16 if on_gpu else []), *chosen.arguments]
    if "--multi-latent-attention" in words:
        for word, values in (("--group-query-attention", 0), ("--num-query-groups", 1)):
            place = words.index(word)
            del words[place : place + 1 + values]
    words += ["--moe-dispatcher", dispatcher, "--distributed-backend", "nccl" if on_gpu else "gloo"]
    return [*words, "--megamoe-backend", backend, *chosen.ours] if dispatcher == "megamoe" else words


def train(words: list[str]) -> tuple[list[float], list[float]]:
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
        steps = trainings.pretrain_once(parse_and_validate_args(), datasets)
    finally:
        sys.argv = argv
    return [loss for loss, _ in steps], [norm for _, norm in steps]


def work(names: list[str], backend: str, answers: Path) -> None:
    """A rank of a worker: the rows one after another. The last rank, which has the losses, writes the answers."""
    import torch

    on_gpu = torch.cuda.is_available()
    rank, ranks = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    from megamoe_train import install

    install()
    baselines: dict[tuple[str, ...], tuple] = {}
    for name in names:
        start = time.monotonic()
        theirs_words = arguments_of(name, "alltoall", backend, on_gpu)
        key = tuple(theirs_words)
        if key not in baselines:
            baselines[key] = train(theirs_words)
        theirs, ours = baselines[key], train(arguments_of(name, "megamoe", backend, on_gpu))
        if rank == ranks - 1:
            answer = {
                "row": name,
                "losses": [theirs[0], ours[0]],
                "first_difference": difference(theirs[0], ours[0], steps=2),
                "loss_difference": difference(theirs[0], ours[0]),
                "norm_difference": difference(theirs[1], ours[1]),
                "seconds": time.monotonic() - start,
            }
            with answers.open("a") as file:
                file.write(json.dumps(answer) + "\n")


def difference(theirs: list[float], ours: list[float], steps: int = STEPS) -> float:
    """The largest relative difference in the first `steps`. Raises ValueError for curves of another length."""
    if len(theirs) != STEPS or len(ours) != STEPS:
        raise ValueError(f"curves of {len(theirs)} and {len(ours)} steps, {STEPS} expected")
    pairs = list(zip(theirs, ours, strict=True))
    return max(abs(a - b) / abs(a) if a == a and b == b else float("inf") for a, b in pairs[:steps])


def run_rows(names: list[str], ranks: int, backend: str, folder: Path) -> dict[str, dict]:
    """Starts workers until every row has an answer: a worker that breaks has failed in its first row without one."""
    answers, found = folder / "answers.jsonl", {}
    left = list(names)
    while left:
        log = folder / f"worker-{len(found)}.log"
        options = ("--work", json.dumps(left), "--backend", backend, "--answers", str(answers))
        command, environment = trainings.torchrun(ranks, "gpu_matrix.py", *options)
        environment |= {"CUDA_DEVICE_MAX_CONNECTIONS": "1"}
        environment.setdefault("NVTE_ALLOW_NONDETERMINISTIC_ALGO", "0")
        environment.setdefault("NCCL_ALGO", "Ring")  # --deterministic-mode asks for this and the next
        environment.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        with log.open("w") as output:
            worker = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env=environment, cwd=trainings.ROOT)
            status = _wait(worker, answers, ROW_SECONDS)
        lines = answers.read_text().splitlines() if answers.exists() else []
        found |= {answer["row"]: answer for answer in map(json.loads, lines)}
        left = [name for name in left if name not in found]
        if left:  # the first of them broke the worker
            found[left[0]] = {"row": left[0], "failed": _why(log, status), "log": str(log)}
            left = left[1:]
    return found


def _wait(worker: subprocess.Popen, answers: Path, seconds: float) -> str:
    """Until the worker ends, or no answer has come for `seconds`. What became of it, in words."""
    size, since = -1, time.monotonic()
    while worker.poll() is None:
        now = answers.stat().st_size if answers.exists() else 0
        if now != size:
            size, since = now, time.monotonic()
        if time.monotonic() - since > seconds:
            worker.terminate()
            try:
                worker.wait(30)
            except subprocess.TimeoutExpired:
                worker.kill()
            return f"no answer for {seconds:.0f} s"
        time.sleep(0.2)
    return f"exit status {worker.returncode}"


def _why(log: Path, status: str) -> str:
    """The last error that a rank printed."""
    kinds = ("Error:", "Exception:", "Timeout:", "error:")
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines()]
    errors = [line for line in lines if any(kind in line for kind in kinds) and "ChildFailedError" not in line]
    return f"{status}; {errors[-1] if errors else 'no error was printed'}"[:300]


def state_of(answer: dict, limits: tuple[float, float]) -> str:
    """ "ran", "differs" or "failed". limits: of the first two losses, which one update separates, and of all of them:
    Adam makes whole steps of rounding errors, and a token that changes its expert does the rest."""
    if "failed" in answer:
        return "failed"
    good = answer["first_difference"] <= limits[0] and answer["loss_difference"] <= limits[1]
    return "ran" if good else "differs"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", nargs="+", help="some of the rows (default: all)")
    parser.add_argument("--ranks", type=int, help="processes (default: one for each GPU, 2 without)")
    parser.add_argument("--backend", default="fused", help="of megamoe (default: fused; the CPU has reference)")
    parser.add_argument("--list", action="store_true", help="print the names of the rows")
    parser.add_argument("--out", type=Path, metavar="FILE.json", help="where the table is kept")
    parser.add_argument("--work", help=argparse.SUPPRESS)
    parser.add_argument("--answers", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.work:
        work(json.loads(options.work), options.backend, options.answers)
        return 0
    if options.list:
        print("\n".join(ROWS))
        return 0
    unknown = set(options.rows or ()) - set(ROWS)
    if unknown:
        parser.error(f"unknown rows: {', '.join(sorted(unknown))}; --list prints them")
    import torch

    gpus = torch.cuda.device_count()
    ranks = options.ranks or gpus or 2
    limits = (1e-3, 5e-3) if gpus else (2e-6, 1e-3)  # bf16, fp32
    device = torch.cuda.get_device_name() if gpus else "CPU"
    has_engine = importlib.util.find_spec("transformer_engine") is not None
    names = options.rows or list(ROWS)
    absent = {name: why for name in names if (why := missing(name, ranks, has_engine))}
    folder = Path(tempfile.mkdtemp(prefix="megamoe-matrix-"))
    found = run_rows([name for name in names if name not in absent], ranks, options.backend, folder)
    print(f"{ranks} ranks on {device}, backend {options.backend}, {STEPS} steps; logs in {folder}")
    print(f"| {'row':<70} | state   | 2 losses  | all losses | norms     | seconds |")
    print(f"|{'-' * 72}|---------|-----------|------------|-----------|---------|")
    for name in names:
        answer = found.get(name, {})
        if name in absent:
            print(f"| {name:<70} | not run | {absent[name]}")
        elif "failed" in answer:
            print(f"| {name:<70} | failed  | {answer['failed']}")
        else:
            figures = (answer[key] for key in ("first_difference", "loss_difference", "norm_difference", "seconds"))
            print(
                "| {:<70} | {:<7} | {:9.1e} | {:10.1e} | {:9.1e} | {:7.1f} |".format(
                    name, state_of(answer, limits), *figures
                )
            )
    if options.out:
        table = {"device": device, "ranks": ranks, "backend": options.backend, "steps": STEPS, "limits": limits}
        rows = [{"row": name, "not_run": absent[name]} if name in absent else found[name] for name in names]
        options.out.write_text(json.dumps(table | {"rows": rows}, indent=1))
    bad = [name for name in names if name in found and state_of(found[name], limits) != "ran"]
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())

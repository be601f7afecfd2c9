"""Runs of scripts/pretrain_tiny.py for the tests: its arguments, and many runs one after another in one process group.

`train` is to be called by every rank of a `run_ranks` group. It ends by clearing Megatron's global state, so that the
next run starts afresh: a new process per run would spend its time importing.
"""

import contextlib
import functools
import inspect
import io
import math
import os
import queue
import re
import runpy
import shlex
import sys
from dataclasses import dataclass

import torch.distributed as dist

SCRIPT = os.path.join(os.path.dirname(__file__), "scripts", "pretrain_tiny.py")

# A small MoE GPT that every rank count here can hold: 4 experts, top-2; 4 steps of 8 sequences of 32 mock tokens.
ARGUMENTS = shlex.split("""
--num-layers 2 --hidden-size 256 --num-attention-heads 4 --ffn-hidden-size 256 --moe-ffn-hidden-size 128
--num-experts 4 --moe-router-topk 2 --moe-router-load-balancing-type aux_loss --moe-aux-loss-coeff 1e-2
--seq-length 32 --max-position-embeddings 32 --position-embedding-type rope --normalization RMSNorm --swiglu
--disable-bias-linear --untie-embeddings-and-output-weights --attention-dropout 0 --hidden-dropout 0
--micro-batch-size 2 --global-batch-size 8 --train-iters 4 --lr 1e-3 --min-lr 1e-4 --lr-decay-iters 4
--log-interval 1 --eval-iters 1 --eval-interval 100 --num-workers 0
--vocab-size 127 --tokenizer-type NullTokenizer --mock-data
--transformer-impl local --no-persist-layer-norm --no-gradient-accumulation-fusion --no-masked-softmax-fusion
--no-bias-swiglu-fusion --no-rope-fusion --distributed-backend gloo
""")

NUMBER = r"([-+0-9.naifE]+)"


@dataclass(frozen=True)
class Curve:
    """One run, step by step. Empty on ranks that do not have the loss (see `prints`)."""

    losses: tuple[float, ...] = ()  # lm loss of each step
    norms: tuple[float, ...] = ()  # gradient norm of each step
    validation: tuple[float, ...] = ()  # lm loss of each evaluation


def printed_curve(text: str) -> Curve:
    """The curve in Megatron's output. Of every run, the second line averages the first two steps (training.py:2591)."""
    steps = "\n".join(line for line in text.splitlines() if "iteration" in line and "lm loss:" in line)
    found = [re.findall(rf"{name}: {NUMBER}", steps) for name in ("lm loss", "grad norm")]
    found.append(re.findall(rf"lm loss value: {NUMBER}", text))
    return Curve(*(tuple(map(float, numbers)) for numbers in found))


def train(*extra: str, dispatcher: str = "megamoe") -> Curve:
    """One whole `pretrain()` on this process group, as `python -m megamoe_train.run` would run it."""
    from megatron.core.dist_checkpointing.strategies import filesystem_async
    from megatron.core.transformer.moe import moe_logging
    from megatron.training import training

    from megamoe_train import install

    install(backend="auto", recompute=None, experts="paired")  # not what the run before was given
    # Its default is a manager process, 4 seconds to start; checkpoints here are written by this process itself.
    filesystem_async._results_queue = queue.Queue()
    try:
        with _recorded(training) as steps:
            text = _run_script([*ARGUMENTS, "--moe-dispatcher", dispatcher, *extra])
    finally:
        training.destroy_global_state()
        moe_logging.destroy_moe_metrics_tracker()
    if not prints():
        return Curve()
    losses, norms = ([float(step[i]) for step in steps] for i in (0, 1))
    return Curve(tuple(losses), tuple(norms), printed_curve(text).validation)


def _run_script(arguments: list[str]) -> str:
    """The script as `__main__` in this process; what it printed on this rank."""
    rank, ranks = str(dist.get_rank()), str(dist.get_world_size())
    os.environ.update(RANK=rank, LOCAL_RANK=rank, WORLD_SIZE=ranks)
    printed, argv, sys.argv = io.StringIO(), sys.argv, [SCRIPT, *arguments]
    try:
        with contextlib.redirect_stdout(printed):
            runpy.run_path(SCRIPT, run_name="__main__")
    except BaseException:
        print(printed.getvalue()[-3000:])
        raise
    finally:
        sys.argv = argv
    return printed.getvalue()


@contextlib.contextmanager
def _recorded(training):
    """(lm loss, gradient norm) of every step, with all their digits, from the function that prints them."""
    steps, original = [], training.training_log

    @functools.wraps(original)
    def training_log(loss_dict, *args, **kwargs):
        bound = inspect.signature(original).bind(loss_dict, *args, **kwargs).arguments
        steps.append((loss_dict.get("lm loss", math.nan), bound["grad_norm"]))
        return original(loss_dict, *args, **kwargs)

    training.training_log = training_log
    try:
        yield steps
    finally:
        training.training_log = original


def prints() -> bool:
    """Whether this rank is the one whose curve has numbers: the last."""
    return dist.get_rank() == dist.get_world_size() - 1


def assert_same(ours: Curve, theirs: Curve, tolerance: float = 2e-6, norm_tolerance: float = 2e-5) -> None:
    """Losses equal to the seventh digit, which is what Megatron prints, and equal gradient norms."""
    for name, limit in (("losses", tolerance), ("validation", tolerance), ("norms", norm_tolerance)):
        for step, (mine, other) in enumerate(zip(getattr(ours, name), getattr(theirs, name), strict=True)):
            assert abs(mine - other) <= limit * abs(other), f"{name}[{step}]: {mine} with megamoe, {other} without"

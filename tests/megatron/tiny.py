"""Runs of scripts/pretrain_tiny.py for the tests: its arguments, and many runs one after another in one process group.

`train` is to be called by every rank of a `run_ranks` group. It ends by clearing Megatron's global state, so that the
next run starts afresh: a new process per run would spend its time importing.
"""

import contextlib
import io
import os
import re
import runpy
import shlex
import sys
from dataclasses import dataclass

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
    """What the last rank printed, in order; empty on the other ranks."""

    losses: tuple[float, ...]  # lm loss of each step
    norms: tuple[float, ...]  # gradient norm of each step
    validation: tuple[float, ...]  # lm loss of each evaluation
    text: str

    @property
    def numbers(self) -> tuple[float, ...]:
        return self.losses + self.norms + self.validation


def read_curve(text: str) -> Curve:
    """The curve in Megatron's output."""
    steps = "\n".join(line for line in text.splitlines() if "iteration" in line and "lm loss:" in line)
    losses, norms = (re.findall(rf"{name}: {NUMBER}", steps) for name in ("lm loss", "grad norm"))
    validation = re.findall(rf"lm loss value: {NUMBER}", text)
    return Curve(*(tuple(map(float, found)) for found in (losses, norms, validation)), text)


def train(*extra: str, dispatcher: str = "megamoe", world_size: int | None = None) -> Curve:
    """One whole `pretrain()` on this process group, as `python -m megamoe_train.run` would run it."""
    import torch.distributed as dist
    from megatron.core.transformer.moe import moe_logging
    from megatron.training import training

    from megamoe_train import install

    install()
    os.environ.update(RANK=str(dist.get_rank()), WORLD_SIZE=str(dist.get_world_size()), LOCAL_RANK=str(dist.get_rank()))
    printed, argv = io.StringIO(), sys.argv
    sys.argv = [SCRIPT, *ARGUMENTS, "--moe-dispatcher", dispatcher, *extra]
    try:
        with contextlib.redirect_stdout(printed):
            runpy.run_path(SCRIPT, run_name="__main__")
    except BaseException:
        print(printed.getvalue()[-3000:])
        raise
    finally:
        sys.argv = argv
    training.destroy_global_state()
    moe_logging.destroy_moe_metrics_tracker()
    return read_curve(printed.getvalue())


def assert_same(ours: Curve, theirs: Curve, tolerance: float = 2e-6, norm_tolerance: float = 2e-3) -> None:
    """Equal losses to the last printed digit (give or take one), equal gradient norms (three decimals are printed)."""
    assert len(ours.losses) == len(theirs.losses) and len(ours.validation) == len(theirs.validation)
    for name, limit in (("losses", tolerance), ("validation", tolerance), ("norms", norm_tolerance)):
        for step, (mine, other) in enumerate(zip(getattr(ours, name), getattr(theirs, name), strict=True)):
            assert abs(mine - other) <= limit * abs(other), f"{name}[{step}]: {mine} with megamoe, {other} without"

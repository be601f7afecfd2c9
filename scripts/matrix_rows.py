"""The rows of gpu_matrix.py that are one training each way: what they are called, and Megatron's command lines."""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from megamoe_train.recipes import World

STEPS = 6

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
NO_FUSION = ["--no-gradient-accumulation-fusion"]
BF16 = ["--bf16"]
SHARDED = ["--use-distributed-optimizer"]
OVERLAPS = [*SHARDED, "--overlap-grad-reduce", "--overlap-param-gather"]
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
    apex: bool = False  # and apex: Megatron's output layer adds its gradient in place by apex alone
    ranks: int = 2
    ours: tuple[str, ...] = ()  # settings that must change no number, and which only our run has
    zipf: bool = False  # not compared: ours alone, under loads that change all the time; its memory has to stay flat


def row(*parts: list[str], engine=False, apex=False, ranks: int = 2, ours: str = "", zipf: bool = False) -> Row:
    return Row(tuple(word for part in parts for word in part), engine, apex, ranks, tuple(shlex.split(ours)), zipf)


# 500 steps of 4096 tokens a rank; a rank's four experts get at most the 16384 rows of both, and padding.
ZIPF = shlex.split("""
--train-iters 500 --lr-decay-iters 500 --eval-interval 1000 --seq-length 1024 --max-position-embeddings 1024
--micro-batch-size 4
""")
ALL_ROWS = "--megamoe-sizing fixed --megamoe-capacity 16896"

ROWS = {
    "EP=1, DDP": row(EP1),
    "EP=2": row(EP2),
    "EP=2, staged experts": row(EP2, ours="--megamoe-experts staged"),
    "distributed optimizer": row(EP2, SHARDED),
    "overlap grad reduce": row(EP2, SHARDED, ["--overlap-grad-reduce"]),
    "overlap grad reduce and param gather": row(EP2, OVERLAPS),
    "overlap param gather, EP=1": row(EP1, OVERLAPS),
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
    "TransformerEngine: distributed optimizer, overlaps": row(EP2, OVERLAPS, engine=True),
    "TransformerEngine and apex: gradient accumulation fusion": row(EP2, engine=True, apex=True),
    "TransformerEngine and apex: the same, distributed optimizer, overlaps": row(
        EP2, OVERLAPS, engine=True, apex=True
    ),
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
    "500 steps of Zipf load, high water": row(EP2, ZIPF, zipf=True),
    "500 steps of Zipf load, fixed rows": row(EP2, ZIPF, ours=ALL_ROWS, zipf=True),
    # Last: torch's switch stays on for the rest of a process.
    "deterministic mode": row(EP2, ["--deterministic-mode"]),
}  # fmt: skip


def missing(name: str, world: World) -> str | None:
    """Why a row cannot run here."""
    if ROWS[name].zipf and not world.on_gpu:
        return "reads a GPU's memory, none is here"
    if ROWS[name].engine and not world.has_transformer_engine:
        return "TransformerEngine is not installed"
    if ROWS[name].apex and not world.has_apex:
        return "apex (fused_weight_gradient_mlp_cuda) is not installed"
    if ROWS[name].ranks > world.num_ranks:
        return f"needs {ROWS[name].ranks} ranks, {world.num_ranks} are here"
    return None


def arguments_of(name: str, dispatcher: str, backend: str, on_gpu: bool) -> list[str]:
    """Megatron's command line for one of the two runs of a row."""
    chosen = ROWS[name]
    layers = [*ENGINE, *([] if chosen.apex else NO_FUSION)] if chosen.engine else LOCAL
    words = [*MODEL, *layers, *(BF16 if on_gpu else []), *chosen.arguments]
    if "--multi-latent-attention" in words:
        for word, values in (("--group-query-attention", 0), ("--num-query-groups", 1)):
            place = words.index(word)
            del words[place : place + 1 + values]
    words += ["--moe-dispatcher", dispatcher, "--distributed-backend", "nccl" if on_gpu else "gloo"]
    return [*words, "--megamoe-backend", backend, *chosen.ours] if dispatcher == "megamoe" else words

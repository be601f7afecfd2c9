"""Two well-known models without DeepSeek-V4's parts, to compare with: Qwen3-30B-A3B and Mixtral-8x7B.

Shapes are those of the published configurations; schedules are ordinary ones, chosen here.
"""

from typing import Any

from megamoe_train.recipes import h100
from megamoe_train.recipes.base import Recipe, World

SEQUENCE = 4096
TRAINING = {
    "seq-length": SEQUENCE,
    "max-position-embeddings": SEQUENCE,
    "rotary-base": 1000000,
    "micro-batch-size": 1,
    "global-batch-size": 1024,
    "train-iters": h100.steps(1e12, 1024, SEQUENCE),
    "lr": 3e-4,
    "min-lr": 3e-5,
    "lr-warmup-iters": 2000,
    "init-method-std": 0.02,
    "eval-interval": 1000,
    "save-interval": 500,
    "moe-router-load-balancing-type": "aux_loss",
    # Softmax over the chosen experts' logits, which equals normalising the chosen probabilities.
    "moe-router-score-function": "softmax",
    "recompute-granularity": "full",
    "recompute-method": "uniform",
    "recompute-num-layers": 1,
}


def qwen3_30b_a3b_pretrain_16gpu_h100_bf16(world: World) -> Recipe:
    """30.5B parameters, 3.3B active: 2 pipeline stages, EP = 8."""
    model = {
        "num-layers": 48,
        "hidden-size": 2048,
        "vocab-size": 151936,
        "num-attention-heads": 32,
        "group-query-attention": True,
        "num-query-groups": 4,
        "kv-channels": 128,
        "qk-layernorm": True,
        "norm-epsilon": 1e-6,
        "num-experts": 128,
        "moe-router-topk": 8,
        "moe-ffn-hidden-size": 768,
        "moe-aux-loss-coeff": 1e-3,
    }
    summary = "Qwen3-30B-A3B: 48 layers, 128 experts, top-8; EP 8 x PP 2 x data parallel"
    return _control("qwen3_30b_a3b_pretrain_16gpu_h100_bf16", summary, world, model)


def mixtral_8x7b_pretrain_16gpu_h100_bf16(world: World) -> Recipe:
    """46.7B parameters, 12.9B active: 2 pipeline stages, EP = 8, one expert of each layer a rank."""
    model = {
        "num-layers": 32,
        "hidden-size": 4096,
        "vocab-size": 32000,
        "num-attention-heads": 32,
        "group-query-attention": True,
        "num-query-groups": 8,
        "kv-channels": 128,
        "norm-epsilon": 1e-5,
        "num-experts": 8,
        "moe-router-topk": 2,
        "moe-ffn-hidden-size": 14336,
        "moe-aux-loss-coeff": 2e-2,
    }
    summary = "Mixtral-8x7B: 32 layers, 8 experts, top-2; EP 8 x PP 2 x data parallel"
    return _control("mixtral_8x7b_pretrain_16gpu_h100_bf16", summary, world, model)


def _control(name: str, summary: str, world: World, model: dict[str, Any]) -> Recipe:
    return Recipe(
        name=name,
        summary=summary,
        settings=h100.settings(
            h100.MODEL,
            h100.RUN,
            TRAINING,
            model,
            h100.PRECISION,
            h100.implementation(world),
            h100.parallel(2, model["num-layers"]),
        ),
        notes=(h100.NEVER_RUN,),
        env=h100.ENV,
        for_h100=True,
        needs_data=True,
    )

"""What DeepSeek-V4-Flash and -Pro share (arXiv 2606.19348 and the published configurations), and what stands in for
the parts that megatron-core 0.19.2 does not have."""

from typing import Any

from megamoe_train.recipes import h100
from megamoe_train.recipes.base import StandIn, World

SEQUENCE = 4096  # the first of the stages 4K, 16K, 64K, 1M

MODEL = {
    "vocab-size": 129280,
    "seq-length": SEQUENCE,
    "max-position-embeddings": SEQUENCE,
    "rotary-base": 10000,
    "norm-epsilon": 1e-6,
    "moe-router-topk": 6,
    "moe-router-score-function": "sqrtsoftplus",  # the top-k scores are normalised to a sum of one
    "moe-router-enable-expert-bias": True,
    "moe-router-bias-update-rate": 1e-3,
    "moe-router-load-balancing-type": "seq_aux_loss",
    "moe-aux-loss-coeff": 1e-4,
    "activation-func-clamp-value": 10.0,  # gate <= 10, linear part in [-10, 10]
}

PREDICTION = {"mtp-num-layers": 1, "mtp-loss-scaling-factor": 0.3}

STAND_INS = (
    StandIn(
        "hash routing",
        "the first 3 layers choose experts by the token's number",
        "they have learned routers like the others",
    ),
    StandIn(
        "hyper-connections (mHC)",
        "4 residual streams mixed by a doubly stochastic matrix, 20 Sinkhorn steps",
        "one residual stream",
    ),
    StandIn(
        "CSA and HCA attention",
        "compressed keys chosen by an indexer, ratios 4 and 128, window 128; dense in the first 1T tokens",
        "dense causal attention",
    ),
    StandIn(
        "Muon",
        "for matrices: momentum 0.95, weight decay 0.1, update RMS 0.18; AdamW for embedding, head, norms",
        "AdamW for all, weight decay 0.1",
    ),
    StandIn("the prediction loss's weight", "0.3, then 0.1", "0.3 throughout"),
    StandIn("the sequence's length", "4K, 16K, 64K, 1M", "4K: the first stage"),
)
LATENT = StandIn(
    "the projections of attention",
    "queries through a latent (q_lora), one key and value of 512 for all heads, grouped latent output (o_lora)",
    "Megatron's MLA: the same q_lora, head and rotary widths, a latent of 512 that every head projects, full output",
)
MULTI_QUERY = StandIn(
    LATENT.part, LATENT.published, "without TransformerEngine no MLA: multi-query heads of 512, full projections"
)


def attention(world: World, *, heads: int, q_lora: int) -> dict[str, Any]:
    """V4's head widths (512, of which 64 rotate) and one key-value head, as Megatron can build them."""
    if world.has_transformer_engine:
        return {
            "num-attention-heads": heads,
            "multi-latent-attention": True,
            "q-lora-rank": q_lora,
            "kv-lora-rank": 512,
            "qk-head-dim": 448,
            "qk-pos-emb-head-dim": 64,
            "v-head-dim": 512,
            "qk-layernorm": True,
            "rope-type": "rope",
        }
    return {
        "num-attention-heads": heads,
        "kv-channels": 512,
        "rotary-percent": 0.125,
        "group-query-attention": True,
        "num-query-groups": 1,
    }


def stand_ins(world: World) -> tuple[StandIn, ...]:
    """The table, for a machine with TransformerEngine or without."""
    return (*STAND_INS, LATENT if world.has_transformer_engine else MULTI_QUERY)


def training(*, tokens: float, batch: int, peak: float, end: float) -> dict[str, Any]:
    """The published schedule over `tokens` tokens. batch: sequences of the largest batch; its warm-up is left out."""
    return {
        "micro-batch-size": 1,
        "global-batch-size": batch,
        "train-iters": h100.steps(tokens, batch, SEQUENCE),
        "lr": peak,
        "min-lr": end,
        "lr-warmup-iters": 2000,
        "init-method-std": 0.02,
        "eval-interval": 1000,
        "save-interval": 500,
        "recompute-granularity": "full",
        "recompute-method": "uniform",
        "recompute-num-layers": 1,
    }


PROXY = {
    # Megatron's flash kernels have no 512-wide heads, and a proxy is to show the MoE layer.
    "group-query-attention": True,
    "num-query-groups": 1,
    "kv-channels": 128,
    "vocab-size": 16384,
    "global-batch-size": 8,
    "train-iters": 200,
    # With the published 2.7e-4 after 20 steps, rounding alone moved the loss by 0.04 (docs/performance.md).
    "lr": 1e-4,
    "min-lr": 1e-5,
    "lr-warmup-fraction": 0.5,
    "init-method-std": 0.02,
    "eval-interval": 100,
    "eval-iters": 2,
    "save-interval": 200,
    "num-workers": 1,
}


def proxy_batch(world: World) -> dict[str, Any]:
    """8192 tokens a micro-batch; half where attention writes its scores down, which are then recomputed."""
    if world.has_transformer_engine:
        return {"micro-batch-size": 2}
    return {"micro-batch-size": 1, "recompute-granularity": "selective", "recompute-modules": ["core_attn"]}


PROXY_NOTES = (
    "a proxy: widths, top-k, router, clamp and shared expert are the published ones; layers, experts, vocabulary, "
    "heads' width and batch are cut to fit, and there is no prediction layer",
    "batches have 32 thousand tokens (64 on 4 GPUs, 128 on 8) instead of millions: the learning rate is 1e-4 at most, "
    "reached half way",
)

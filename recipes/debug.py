"""A DeepSeek-V4-shaped model that learns real text in minutes: on two CPU cores, or on one or two GPUs."""

from megamoe_train.recipes.base import Recipe, World

TRAIN_STEPS = 400


def debug(world: World) -> Recipe:
    """V4's layer with every width cut: 3 layers, 32 + 1 experts, top-6. EP = 2, or 1 where there is one process.

    Widths keep what the fused kernels ask for (hidden size a multiple of 256, expert width of 128).
    """
    return Recipe(
        name="debug",
        summary="3 layers, 32 experts of 128, top-6, hidden 256: DeepSeek-V4's layer, small; minutes on two CPU cores",
        settings={**_MODEL, **_ROUTER, **_TRAINING, **_RUN, **_precision(world), **_parallel(world)},
        most_ranks=2,
        has_run="on the CPU",
        notes=(
            "attention is causal multi-query attention with rotary positions; V4's compressed sparse attention, "
            "hyper-connections and hash-routed first layers are not in megatron-core 0.19.2",
            "the optimizer is AdamW; V4 trains its matrices with Muon",
        ),
        # Stream order that Megatron's overlapped communication relies on; harmless elsewhere.
        env={"CUDA_DEVICE_MAX_CONNECTIONS": "1"},
    )


_MODEL = {
    "num-layers": 3,
    "hidden-size": 256,
    "num-attention-heads": 4,
    "kv-channels": 64,
    "group-query-attention": True,
    "num-query-groups": 1,
    "seq-length": 256,
    "max-position-embeddings": 256,
    "position-embedding-type": "rope",
    "rotary-base": 10000,
    "normalization": "RMSNorm",
    "norm-epsilon": 1e-6,
    "swiglu": True,
    "disable-bias-linear": True,
    "untie-embeddings-and-output-weights": True,
    "attention-dropout": 0.0,
    "hidden-dropout": 0.0,
    "init-method-std": 0.02,
    "transformer-impl": "local",
    # Fusions that need apex or TransformerEngine; the last one also ignores the clamp (see MEGATRON notes in docs).
    "no-persist-layer-norm": True,
    "no-gradient-accumulation-fusion": True,
    "no-masked-softmax-fusion": True,
    "no-rope-fusion": True,
    "no-bias-swiglu-fusion": True,
    # The tokenizer is trained on the text before the job starts; Megatron needs only its size and its end mark.
    "tokenizer-type": "NullTokenizer",
    "vocab-size": 4096,
    "null-tokenizer-eod-id": 0,
    "make-vocab-size-divisible-by": 128,
}

_ROUTER = {
    "num-experts": 32,
    "moe-router-topk": 6,
    "moe-ffn-hidden-size": 128,
    "moe-shared-expert-intermediate-size": 128,
    "moe-layer-freq": 1,
    "moe-router-score-function": "sqrtsoftplus",
    "moe-router-topk-scaling-factor": 1.5,
    "moe-router-dtype": "fp32",
    "moe-router-enable-expert-bias": True,
    # V4 takes 1e-3 and 1e-4, for a million steps; in 400 the experts must even out sooner.
    "moe-router-bias-update-rate": 1e-2,
    "moe-router-load-balancing-type": "seq_aux_loss",
    "moe-aux-loss-coeff": 1e-2,
    "activation-func-clamp-value": 10.0,
    "moe-dispatcher": "megamoe",
}

_TRAINING = {
    "micro-batch-size": 4,
    "global-batch-size": 8,
    "train-iters": TRAIN_STEPS,
    "optimizer": "adam",
    "lr": 2e-3,
    "min-lr": 2e-4,
    "lr-decay-style": "cosine",
    "lr-warmup-fraction": 0.05,
    "weight-decay": 0.1,
    "adam-beta1": 0.9,
    "adam-beta2": 0.95,
    "clip-grad": 1.0,
    "seed": 1234,
    "eval-interval": 100,
    "eval-iters": 8,
}

_RUN = {
    "save-interval": 100,
    "ckpt-format": "torch_dist",
    # On resume, what is asked for now holds (learning rate, number of steps), not what the checkpoint remembers.
    "override-opt-param-scheduler": True,
    "num-workers": 0,
    "no-create-attention-mask-in-dataloader": True,
    "log-interval": 10,
    "tensorboard-log-interval": 1,
    "exit-signal-handler": True,
    "distributed-timeout-minutes": 10,
}


def _precision(world: World) -> dict:
    """bf16 with fp32 gradients on a GPU; fp32 on the CPU, where it is the faster of the two."""
    return {"bf16": True, "accumulate-allreduce-grads-in-fp32": True} if world.on_gpu else {}


def _parallel(world: World) -> dict:
    """Experts over two ranks where there are two."""
    return {
        "expert-model-parallel-size": min(world.num_ranks, 2),
        "tensor-model-parallel-size": 1,
        "pipeline-model-parallel-size": 1,
        "distributed-backend": "nccl" if world.on_gpu else "gloo",
    }

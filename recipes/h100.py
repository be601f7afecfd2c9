"""What all recipes for H100s share: precision, optimizer sharding, TransformerEngine where it is there, layouts."""

from collections.abc import Mapping
from typing import Any

from megamoe_train.recipes.base import World

EXPERT_PARALLEL = 8  # one NVLink domain: the experts of a layer lie on the GPUs of one node
NEVER_RUN = "never run at this scale: values and layout are checked by parsing and by the memory model alone"

# Stream order that Megatron's overlapped communication relies on.
ENV = {"CUDA_DEVICE_MAX_CONNECTIONS": "1", "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"}

PRECISION = {
    "bf16": True,
    "accumulate-allreduce-grads-in-fp32": True,
    "use-distributed-optimizer": True,
    "overlap-grad-reduce": True,
    "overlap-param-gather": True,
    "distributed-backend": "nccl",
}

MODEL = {
    "swiglu": True,
    "disable-bias-linear": True,
    "normalization": "RMSNorm",
    "position-embedding-type": "rope",
    "untie-embeddings-and-output-weights": True,
    "attention-dropout": 0.0,
    "hidden-dropout": 0.0,
    "make-vocab-size-divisible-by": 128,
    # Tokens come from prepared files: Megatron needs only the vocabulary's size and its end mark.
    "tokenizer-type": "NullTokenizer",
    "null-tokenizer-eod-id": 0,
    # The fused SwiGLU of megatron-core 0.19.2 ignores the clamp; its fused rotation wants YaRN with latent attention.
    "no-bias-swiglu-fusion": True,
    "no-rope-fusion": True,
    "moe-layer-freq": 1,
    "moe-router-dtype": "fp32",
    "moe-permute-fusion": False,
    "moe-dispatcher": "megamoe",
}

RUN = {
    "optimizer": "adam",
    "adam-beta1": 0.9,
    "adam-beta2": 0.95,
    "weight-decay": 0.1,
    "clip-grad": 1.0,
    "lr-decay-style": "cosine",
    "seed": 1234,
    "eval-iters": 8,
    "ckpt-format": "torch_dist",
    "override-opt-param-scheduler": True,
    "num-workers": 2,
    "no-create-attention-mask-in-dataloader": True,
    "log-interval": 10,
    "tensorboard-log-interval": 1,
    "exit-signal-handler": True,
    "distributed-timeout-minutes": 30,
}


def run_note(has_run: str) -> str:
    """What a recipe says of its runs. has_run: as Recipe's, of runs on H200s."""
    return f"has run on {has_run}; on H100s never, what fits there is the memory model's word" if has_run else NEVER_RUN


def implementation(world: World) -> dict[str, Any]:
    """TransformerEngine's layers and grouped experts where it is installed, Megatron's own where it is not.

    Gradient accumulation fusion is one switch for all layers, and Megatron's output layer has it from apex alone
    (tensor_parallel/layers.py:1070 of 0.19.2). megamoe's experts add to main_grad either way.
    """
    if world.has_transformer_engine:
        fusion = {} if world.has_apex else {"no-gradient-accumulation-fusion": True}
        return {
            "transformer-impl": "transformer_engine",
            "moe-grouped-gemm": True,
            "moe-permute-fusion": True,
            **fusion,
        }
    return {
        "transformer-impl": "local",
        "no-persist-layer-norm": True,
        "no-gradient-accumulation-fusion": True,
        "no-masked-softmax-fusion": True,
    }


def pipeline(stages: int, layers: int, mtp: int = 0) -> dict[str, Any]:
    """Decoder layers spread over `stages`, as evenly as they go: the last stage, which has the loss and the prediction
    layers, and then the first, which has the embedding, take the fewest."""
    if stages == 1:
        return {"pipeline-model-parallel-size": 1}
    each, more = divmod(layers + mtp, stages)
    last, first, *middle = sorted(each + (number < more) for number in range(stages))
    assert last >= max(mtp, 1), "as many stages as layers at most"
    rows = ["E" + "t" * first, *("t" * count for count in reversed(middle)), "t" * (last - mtp) + "m" * mtp + "L"]
    return {"pipeline-model-parallel-size": stages, "pipeline-model-parallel-layout": "|".join(rows)}


def parallel(stages: int, layers: int, mtp: int = 0, expert: int = EXPERT_PARALLEL) -> dict[str, Any]:
    """Experts over `expert` ranks of a node, layers over `stages` nodes or more; the rest is data parallel."""
    return {
        "expert-model-parallel-size": expert,
        "tensor-model-parallel-size": 1,
        "context-parallel-size": 1,
        **pipeline(stages, layers, mtp),
    }


def steps(tokens: float, batch_sequences: int, sequence: int) -> int:
    """Optimizer steps for `tokens` tokens, rounded up."""
    return -(-int(tokens) // (batch_sequences * sequence))


def settings(*parts: Mapping[str, Any]) -> dict[str, Any]:
    """The parts in one table; a later part wins."""
    return {name: value for part in parts for name, value in part.items()}

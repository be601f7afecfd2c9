"""A hand-written training loop on megatron-core alone: no megatron.training, no pretrain().

Run by torchrun. `install()` and `moe_token_dispatcher_type="megamoe"` are all that names megamoe_train.
usage: own_loop.py DISPATCHER [tokens of each micro-batch ...]
"""

import sys

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
from megatron.core.transformer.transformer_config import TransformerConfig

import megamoe_train

VOCABULARY, EXPERTS = 128, 4
STEPS = 4


def build(dispatcher: str) -> DistributedDataParallel:
    config = TransformerConfig(
        num_layers=2,
        hidden_size=256,
        num_attention_heads=4,
        ffn_hidden_size=256,
        moe_ffn_hidden_size=128,
        num_moe_experts=EXPERTS,
        moe_router_topk=2,
        moe_router_load_balancing_type="none",
        moe_token_dispatcher_type=dispatcher,
        expert_model_parallel_size=parallel_state.get_expert_model_parallel_world_size(),
        gated_linear_unit=True,
        activation_func=F.silu,
        add_bias_linear=False,
        bias_activation_fusion=False,
        gradient_accumulation_fusion=False,
        masked_softmax_fusion=False,
        normalization="RMSNorm",
        hidden_dropout=0.0,
        attention_dropout=0.0,
    )
    spec = get_gpt_layer_local_spec(num_experts=EXPERTS, moe_grouped_gemm=False, normalization="RMSNorm")
    model = GPTModel(config, spec, VOCABULARY, max_sequence_length=64, position_embedding_type="rope")
    return DistributedDataParallel(config, DistributedDataParallelConfig(overlap_grad_reduce=True), model)


def main(dispatcher: str, sizes: list[int]) -> None:
    megamoe_train.install()
    dist.init_process_group("gloo")
    parallel_state.initialize_model_parallel(expert_model_parallel_size=dist.get_world_size())
    model_parallel_cuda_manual_seed(3)
    model = build(dispatcher)
    optimizer = get_megatron_optimizer(OptimizerConfig(optimizer="adam", lr=1e-3), [model])
    data = torch.Generator().manual_seed(dist.get_rank())
    for step in range(STEPS):
        model.zero_grad_buffer()
        optimizer.zero_grad()
        total = torch.zeros(())
        for i, tokens in enumerate(sizes):
            batch = torch.randint(VOCABULARY, (1, tokens + 1), generator=data) // 4
            positions = torch.arange(tokens).unsqueeze(0)
            causal = torch.ones(tokens, tokens, dtype=torch.bool).triu(1)[None, None]
            with model.no_sync() if i + 1 < len(sizes) else torch.enable_grad():
                loss = model(batch[:, :-1], positions, causal, labels=batch[:, 1:]).mean() / len(sizes)
                loss.backward()
            total += loss.detach()
        finalize_model_grads([model])
        _, norm, _ = optimizer.step()
        dist.all_reduce(total)
        if dist.get_rank() == 0:
            print(f"step {step} loss {total.item():.6E} grad norm {norm:.6E}", flush=True)
        model.eval()
        with torch.no_grad():  # an evaluation on another shape after every step
            model(batch[:, :5], positions[:, :5], causal[..., :5, :5])
        model.train()
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], [int(size) for size in sys.argv[2:]])

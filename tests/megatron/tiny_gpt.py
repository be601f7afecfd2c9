"""A small V4-shaped GPT of Megatron's own classes, with DDP and an optimizer, under any token dispatcher.

To be used by every rank of a `run_ranks` group. Experts get weights of their own, drawn by their global number:
Megatron's CPU initialisation makes expert i of every expert-parallel rank the same, which would hide a wrong offset.
"""

import contextlib
import logging
import re
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

LAYERS, HIDDEN, INTERMEDIATE, VOCAB, SEQUENCE, MICRO_BATCH, MICRO_BATCHES = 2, 256, 128, 96, 24, 2, 2
# After the norm a token has deviation 1 in each of 256 places, so with this deviation of fc1's weights its output has
# 8, and a clamp of 10 takes a tenth of the gates and a fifth of the linear parts.
FC1_STD, FC2_STD = 0.5, 0.02


@dataclass(frozen=True)
class Setup:
    """One way of running the model."""

    ep_size: int
    dispatcher: str = "megamoe"
    dtype: torch.dtype = torch.float32
    num_experts: int = 8
    top_k: int = 4
    clamp: float | None = 10.0
    experts: str = "paired"  # of megamoe: "paired" | "staged"
    reseed: bool = True  # False: Megatron's CPU initialisation
    replay: bool = False  # routers that can repeat another run's choice of experts
    moe_layers: tuple[int, ...] = (1,) * LAYERS  # 0: a dense layer
    fields: tuple[tuple[str, Any], ...] = ()  # more of TransformerConfig
    ddp: tuple[tuple[str, Any], ...] = ()  # more of DistributedDataParallelConfig


@dataclass(frozen=True)
class Step:
    """What one step computed before the optimizer changed anything. Tensors of this rank, copied."""

    loss: float  # mean over ranks and micro-batches
    token_losses: Tensor  # [MICRO_BATCHES, MICRO_BATCH, SEQUENCE]
    grads: dict[str, Tensor]  # main_grad of each parameter after the data-parallel reduction
    expert_bias: list[Tensor]  # of the routers, after their update
    outputs: list[Tensor]  # per micro-batch and MoE layer: what the layer returned
    routes: list[Tensor]  # per micro-batch and MoE layer, with `replay`: [T, K] experts


def start(setup: Setup) -> None:
    """Process groups and options for `setup`, in place of those of the setup before."""
    from megatron.core import parallel_state

    from megamoe_train import install

    install(backend="reference", experts=setup.experts)
    parallel_state.destroy_model_parallel()
    parallel_state.initialize_model_parallel(expert_model_parallel_size=setup.ep_size)
    for name in ("megatron", "megamoe_train"):  # each GPTModel warns that it is deprecated
        logging.getLogger(name).setLevel(logging.ERROR)


def transformer_config(setup: Setup):
    """DeepSeek-V4's MoE layer in small: sqrtsoftplus, expert bias, sequence aux loss, clamp, a shared expert."""
    from megatron.core.transformer.transformer_config import TransformerConfig

    fields = dict(
        num_layers=LAYERS, hidden_size=HIDDEN, ffn_hidden_size=INTERMEDIATE, num_attention_heads=4,
        moe_layer_freq=list(setup.moe_layers), num_moe_experts=setup.num_experts, moe_router_topk=setup.top_k,
        moe_ffn_hidden_size=INTERMEDIATE, moe_shared_expert_intermediate_size=INTERMEDIATE,
        moe_token_dispatcher_type=setup.dispatcher,
        moe_router_score_function="sqrtsoftplus", moe_router_enable_expert_bias=True, moe_router_dtype="fp32",
        moe_router_load_balancing_type="seq_aux_loss", moe_aux_loss_coeff=1e-4, moe_router_topk_scaling_factor=1.5,
        moe_enable_routing_replay=setup.replay, activation_func=F.silu, gated_linear_unit=True,
        activation_func_clamp_value=setup.clamp, bias_activation_fusion=False, add_bias_linear=False,
        normalization="RMSNorm", hidden_dropout=0.0, attention_dropout=0.0, expert_model_parallel_size=setup.ep_size,
        use_cpu_initialization=not setup.reseed, bf16=setup.dtype == torch.bfloat16, params_dtype=setup.dtype,
        transformer_impl="local",
    )  # fmt: skip
    return TransformerConfig(**fields | dict(setup.fields))


class Trainer:
    """Model, DDP and optimizer of one setup; `start(setup)` must have been called."""

    def __init__(self, setup: Setup):
        from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
        from megatron.core.models.gpt import GPTModel
        from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec
        from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
        from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed
        from megatron.core.transformer.module import Float16Module

        torch.manual_seed(1234)
        model_parallel_cuda_manual_seed(1234, force_reset_rng=True)
        self.setup, config, bf16 = setup, transformer_config(setup), setup.dtype == torch.bfloat16
        spec = get_gpt_decoder_block_spec(config, use_transformer_engine=False)
        model = GPTModel(config, spec, VOCAB, SEQUENCE, position_embedding_type="rope")
        if setup.reseed:
            reseed_experts(moe_layers(model))
        ddp_config = DistributedDataParallelConfig(**{"grad_reduce_in_fp32": True} | dict(setup.ddp))
        self.model = DistributedDataParallel(config, ddp_config, Float16Module(config, model) if bf16 else model)
        self.model.broadcast_params()
        sharded = ddp_config.use_distributed_optimizer
        # SGD, and a large adam_eps where Adam has to be: Adam makes whole learning rates of rounding errors near zero.
        optimizer = OptimizerConfig(
            optimizer="adam" if sharded else "sgd", adam_eps=1e-2, lr=0.1, clip_grad=1.0, bf16=bf16,
            params_dtype=setup.dtype, use_distributed_optimizer=sharded,
            overlap_param_gather=ddp_config.overlap_param_gather,
        )  # fmt: skip
        self.optimizer = get_megatron_optimizer(optimizer, [self.model])
        self.layers = moe_layers(self.model)
        self._outputs: list[Tensor] = []
        for layer in self.layers:
            layer.register_forward_hook(lambda module, inputs, output: self._outputs.append(output[0].detach().clone()))

    def parameters(self) -> dict[str, Tensor]:
        """By their names in GPTModel."""
        return {re.sub(r"^(module\.)+", "", name): p for name, p in self.model.named_parameters()}

    def biases(self) -> list[Tensor]:
        """What the routers add to their scores to balance the experts, where they do."""
        kinds = ("expert_bias", "qb_beta")
        found = [getattr(layer.router, kind, None) for layer in self.layers for kind in kinds]
        return [bias for bias in found if bias is not None]

    def load(self, other: "Trainer") -> None:
        """Takes parameters and expert biases of another trainer, in this one's dtype."""
        theirs = other.parameters()
        with torch.no_grad():
            for name, parameter in self.parameters().items():
                parameter.copy_(theirs[name])
            for mine, their in zip(self.biases(), other.biases(), strict=True):
                mine.copy_(their)

    def backward(self, step: int, routes: list[Tensor] | None = None) -> Step:
        """Forward and backward of the step's micro-batches, and the data-parallel reduction.

        With `replay`: tokens go to the experts in `routes` (another run's), or, without, the routes are recorded.
        """
        from megatron.core.distributed import finalize_model_grads
        from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed
        from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler

        torch.manual_seed(step)  # jitter
        model_parallel_cuda_manual_seed(step, force_reset_rng=True)  # dropout, random routing
        MoEAuxLossAutoScaler.set_loss_scale(torch.tensor(1.0 / MICRO_BATCHES))
        self.model.zero_grad_buffer()
        self.optimizer.zero_grad()
        self._outputs.clear()
        losses, taken = [], []
        for i in range(MICRO_BATCHES):
            with contextlib.nullcontext() if i == MICRO_BATCHES - 1 else self.model.no_sync():
                self._replay(None if routes is None else routes[i * sum(self.setup.moe_layers) :])
                losses.append(self.model(*batch(step, i)).float())
                taken += self._taken()
                (losses[-1].mean() / MICRO_BATCHES).backward()
        finalize_model_grads([self.model])
        token_losses = torch.stack(losses).detach()
        loss = token_losses.double().mean()
        dist.all_reduce(loss)
        return Step(
            loss.item() / dist.get_world_size(),
            token_losses,
            {name: p.main_grad.clone() for name, p in self.parameters().items()},
            [bias.clone() for bias in self.biases()],
            list(self._outputs),
            taken,
        )

    def update(self) -> None:
        """The optimizer step."""
        done, *_ = self.optimizer.step()
        assert done, "the optimizer skipped the step"

    def _replay(self, routes: list[Tensor] | None) -> None:
        from megatron.core.transformer.moe.router_replay import RouterReplayAction

        for i, layer in enumerate(self.layers if self.setup.replay else ()):
            replay = layer.router.router_replay
            replay.clear_indices()
            if routes is None:
                replay.set_router_replay_action(RouterReplayAction.RECORD)
            else:
                replay.set_target_indices(routes[i])
                replay.set_router_replay_action(RouterReplayAction.REPLAY_FORWARD)

    def _taken(self) -> list[Tensor]:
        """The routes of the last forward, where they were recorded."""
        replays = [layer.router.router_replay for layer in self.layers] if self.setup.replay else []
        return [replay.recorded_topk_idx for replay in replays if replay.recorded_topk_idx is not None]


def moe_layers(model) -> list:
    """The MoE layers of a model, in order."""
    from megatron.core.transformer.moe.moe_layer import MoELayer

    return [module for module in model.modules() if isinstance(module, MoELayer)]


def reseed_experts(layers: list) -> None:
    """Weights of each expert from its layer and its global number alone, whichever rank holds it."""
    for number, layer in enumerate(layers):
        for expert, expert_id in zip(layer.experts.local_experts, layer.local_expert_indices, strict=True):
            generator = torch.Generator().manual_seed(1000 * number + expert_id)
            for weight, std in ((expert.linear_fc1.weight, FC1_STD), (expert.linear_fc2.weight, FC2_STD)):
                weight.data.copy_(torch.randn(weight.shape, generator=generator) * std)


def batch(step: int, micro_batch: int) -> tuple:
    """This rank's tokens, positions, no mask (causal), no decoder input, labels; the same for every ep_size.

    Sequences count on from a random token by a step of 1, 2 or 3: something to learn.
    """
    generator = torch.Generator().manual_seed(1000 * step + 100 * micro_batch + dist.get_rank())
    first = torch.randint(VOCAB, (MICRO_BATCH, 1), generator=generator)
    stride = torch.randint(1, 4, (MICRO_BATCH, 1), generator=generator)
    text = (first + stride * torch.arange(SEQUENCE + 1)) % VOCAB
    return text[:, :-1], torch.arange(SEQUENCE).expand(MICRO_BATCH, -1), None, None, text[:, 1:]

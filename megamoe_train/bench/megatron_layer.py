"""Megatron's own MoELayer (TEGroupedMLP, alltoall) as a candidate, on the same weights, routing and main_grad."""

from __future__ import annotations

import torch
from torch import Tensor

from . import ranks
from .layer_load import Routing, Shape, Weights


def missing(shape: Shape) -> str | None:
    """Why Megatron's layer cannot be measured here; None where it can."""
    try:
        import megatron.core  # noqa: F401
        import transformer_engine.pytorch  # noqa: F401
    except ImportError as error:
        return f"{type(error).__name__}: {error}"
    return None


class GivenRouting(torch.nn.Module):
    """In place of Megatron's router: probabilities and map `[T, E]` that are there already."""

    def __init__(self):
        super().__init__()
        self.given: tuple[Tensor, Tensor] | None = None

    def forward(self, hidden: Tensor, padding_mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self.given


class MegatronLayer:
    """One rank's MoELayer. Its parameters are views of `weights`, their main_grad views of the fp32 gradients.

    Collective: it joins Megatron's process groups.
    """

    def __init__(self, shape: Shape, weights: Weights):
        from megatron.core import parallel_state
        from megatron.core.models.gpt.moe_module_specs import get_moe_module_spec
        from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

        ranks.join_alone()
        parallel_state.initialize_model_parallel(
            expert_model_parallel_size=shape.ranks, create_gloo_process_groups=False
        )
        model_parallel_cuda_manual_seed(1)
        spec = get_moe_module_spec(use_te=True, num_experts=shape.experts, moe_grouped_gemm=True)
        self.layer = spec(config=_config(shape)).cuda()
        self.layer.set_layer_number(1)
        self.layer.router = GivenRouting()
        self.shape = shape
        self.parameters: list[Tensor] = []
        for expert in range(shape.experts_local):
            self._adopt(weights, expert)

    def _adopt(self, weights: Weights, expert: int) -> None:
        experts = self.layer.experts
        for layer, values, gradients in (
            (experts.linear_fc1, weights.fc1, weights.grad1),
            (experts.linear_fc2, weights.fc2, weights.grad2),
        ):
            parameter = getattr(layer, f"weight{expert}")
            parameter.data = values[expert]
            parameter.main_grad, parameter.grad_added_to_main_grad = gradients[expert], False
            self.parameters.append(parameter)

    def dense(self, inputs: Routing) -> tuple[Tensor, Tensor]:
        """Probabilities and map `[T, E]`, which Megatron's router would hand on."""
        probs = torch.zeros(inputs.ids.shape[0], self.shape.experts, device=inputs.ids.device)
        probs.scatter_(1, inputs.ids, inputs.weights)
        routing_map = torch.zeros_like(probs, dtype=torch.bool).scatter_(1, inputs.ids, True)
        return probs.requires_grad_(), routing_map

    def forward(self, x: Tensor, given: tuple[Tensor, Tensor]) -> Tensor:
        """x `[T, H]` that requires a gradient -> y."""
        self.layer.router.given = given
        return self.layer(x[:, None])[0]

    def forget(self) -> None:
        """Drops the placeholders that autograd has left in `grad`."""
        for parameter in self.parameters:
            parameter.grad = None


def _config(shape: Shape):
    from megatron.core.transformer.transformer_config import TransformerConfig

    return TransformerConfig(
        num_layers=1, hidden_size=shape.hidden, ffn_hidden_size=shape.inter, moe_ffn_hidden_size=shape.inter,
        num_attention_heads=8, num_moe_experts=shape.experts, moe_router_topk=shape.top_k,
        moe_router_load_balancing_type="none", moe_token_dispatcher_type="alltoall", moe_router_dtype="fp32",
        moe_grouped_gemm=True, moe_permute_fusion=True, expert_model_parallel_size=shape.ranks, add_bias_linear=False,
        gated_linear_unit=True, activation_func=torch.nn.functional.silu, bias_activation_fusion=True,
        gradient_accumulation_fusion=True, perform_initialization=False, bf16=True, params_dtype=torch.bfloat16,
    )  # fmt: skip

"""The experts that make the one fused call, on the parameters of Megatron's own experts modules.

A paired module *is* a SequentialMLP or TEGroupedMLP, parameters adopted in place: names, initialisation,
`allreduce=False`, `sharded_state_dict` and checkpoint keys are Megatron's. Only `forward` and `backward_dw` differ.
"""

import logging

import torch
from megatron.core.transformer.moe.experts import SequentialMLP, TEGroupedMLP
from torch import Tensor, nn

from megamoe_train import backends, functional
from megamoe_train.megatron.main_grad import MainGradSink
from megamoe_train.reference import wide

logger = logging.getLogger(__name__)


class MegaMoEExperts:
    """Mix-in of the paired experts. The class it is mixed into says where the weights are."""

    backend: str = "auto"
    recompute: str | None = None

    def forward(self, hidden_states: Tensor, plan: backends.Plan, topk_weights: Tensor) -> tuple[Tensor, None]:
        """x `[T,H]`, the plan in place of Megatron's tokens_per_expert, weights `[T,K]` -> y `[T,H]`, no bias."""
        if not isinstance(plan, backends.Plan):
            wanted = "the plan of a paired MegaMoETokenDispatcher"
            raise TypeError(f"{type(self).__name__} takes {wanted}, got {type(plan).__name__}")
        fire_forward_pre_hooks(self)
        if topk_weights.dtype == torch.float64:  # moe_router_dtype="fp64"; the call computes at most in fp32 then
            topk_weights = topk_weights.to(wide(hidden_states.dtype))
        fc1, fc2 = self.expert_weights()
        y = functional.moe(
            hidden_states,
            plan.topk_ids,
            topk_weights,
            fc1,
            fc2,
            clamp=self.config.activation_func_clamp_value,
            group=self.ep_group,
            backend=self.backend,
            plan=plan,
            recompute=self.recompute,
            wgrad_sink=MainGradSink(),
        )
        return y, None

    def backward_dw(self) -> None:
        """Nothing is left to do: backward has made the weight gradients already."""

    def expert_weights(self) -> tuple[list[Tensor], list[Tensor]]:
        """The parameters themselves: L tensors `[2I,H]` (gate rows first) and L tensors `[H,I]`."""
        raise NotImplementedError


class MegaMoESequentialMLP(MegaMoEExperts, SequentialMLP):
    """SequentialMLP whose experts run in one call."""

    def expert_weights(self) -> tuple[list[Tensor], list[Tensor]]:
        experts = self.local_experts
        return [e.linear_fc1.weight for e in experts], [e.linear_fc2.weight for e in experts]


class MegaMoETEGroupedMLP(MegaMoEExperts, TEGroupedMLP):
    """TEGroupedMLP (TransformerEngine's grouped linear layers, one parameter per expert) run in one call."""

    def expert_weights(self) -> tuple[list[Tensor], list[Tensor]]:
        layers, numbers = (self.linear_fc1, self.linear_fc2), range(self.num_local_experts)
        fc1, fc2 = ([getattr(layer, f"weight{i}") for i in numbers] for layer in layers)
        return fc1, fc2


PAIRS = {SequentialMLP: MegaMoESequentialMLP, TEGroupedMLP: MegaMoETEGroupedMLP}


def can_pair(experts: nn.Module) -> bool:
    """True for exactly the two classes whose mathematics we know; a subclass of them may compute something else."""
    return type(experts) in PAIRS


def pair(experts: nn.Module, *, backend: str, recompute: str | None) -> None:
    """Turn Megatron's experts into ours, in place. No parameter is copied, moved or renamed."""
    experts.__class__ = PAIRS[type(experts)]
    experts.backend, experts.recompute = backend, recompute


def fire_forward_pre_hooks(experts: nn.Module) -> None:
    """Call the forward pre-hooks of the modules inside `experts`, which are never called themselves.

    With `--overlap-param-gather` these hooks wait for the all-gather of their module's parameters; without them the
    model trains on stale weights and says nothing. Megatron does the same for its fused experts (experts.py:573).
    Raises RuntimeError where a hook wants to replace its module's input, which does not exist here.
    """
    for module in experts.modules():
        if module is experts:
            continue
        for hook_id, hook in module._forward_pre_hooks.items():
            with_kwargs = hook_id in module._forward_pre_hooks_with_kwargs
            if (hook(module, (), {}) if with_kwargs else hook(module, ())) is not None:
                name = _name_of(module, experts)
                raise RuntimeError(f"a forward pre-hook of {name} replaces its input; experts run in one fused call")
        if module._forward_hooks or module._backward_hooks or module._backward_pre_hooks:
            _warn_once(f"hooks on {_name_of(module, experts)} never fire: all experts run in one fused call")


def _name_of(module: nn.Module, inside: nn.Module) -> str:
    return next(name for name, candidate in inside.named_modules() if candidate is module)


_warned: set[str] = set()


def _warn_once(message: str) -> None:
    if message not in _warned:
        _warned.add(message)
        logger.warning(message)

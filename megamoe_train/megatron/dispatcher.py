"""The token dispatcher: Megatron's six hooks, over one RoutingPlan.

*Paired* with our experts it builds the plan and moves no token: the experts make the one fused call, and the plan
reaches them where Megatron passes `tokens_per_expert`. *Staged*, with any other experts module, it really dispatches
and combines: rows sorted by expert and unpadded, one routing weight per row, counts per local expert.

Letters: T tokens of this rank, K experts per token, E experts in all, H hidden, M rows padded per expert.
"""

import functools
from dataclasses import dataclass

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.moe.token_dispatcher import MoETokenDispatcher
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megamoe_train import autograd
from megamoe_train.backends import Plan
from megamoe_train.plan import DROPPED, build_plan
from megamoe_train.staged import Flight, Staged


def topk_ids_of(routing_map_TE: Tensor, top_k: int) -> Tensor:
    """`[T,E]` bool -> `[T,K]` int64: each token's experts in ascending order, then -1 where fewer than K are kept.

    Raises RuntimeError where a token has more than `top_k` experts.
    """
    num_experts = routing_map_TE.shape[1]
    fits = (routing_map_TE.sum(1) <= top_k).all()
    torch._assert_async(fits, f"a token is routed to more than top_k = {top_k} experts")
    # Experts score E - e, the others 0: the K best scores in order are the K lowest experts.
    score = routing_map_TE * torch.arange(num_experts, 0, -1, device=routing_map_TE.device)
    best = score.topk(min(top_k, num_experts), dim=1).values
    return torch.where(best > 0, num_experts - best, DROPPED)


def topk_weights_of(probs_TE: Tensor, topk_ids_TK: Tensor) -> Tensor:
    """`[T,E]` -> `[T,K]`, dtype of probs, 0 where dropped. Differentiable in probs."""
    weights = probs_TE.gather(1, topk_ids_TK.clamp(min=0))
    return weights.masked_fill(topk_ids_TK == DROPPED, 0)


@dataclass
class _Forward:
    """What the hooks of one forward hand on. Backward never reads it: other micro-batches come in between."""

    shape: torch.Size  # of the hidden states, [S, B, H]
    topk_ids: Tensor  # [T, K]
    plan: Plan | None = None
    flight: Flight | None = None  # staged on CUDA


class MegaMoETokenDispatcher(MoETokenDispatcher):
    """`moe_token_dispatcher_type="megamoe"`. Collective over the expert-parallel group, in backward too."""

    def __init__(
        self,
        num_local_experts: int,
        local_expert_indices: list[int],
        config: TransformerConfig,
        pg_collection: ProcessGroupCollection | None = None,
        *,
        paired: bool = False,
    ) -> None:
        super().__init__(config=config, pg_collection=pg_collection)
        self.num_local_experts = num_local_experts
        self.local_expert_indices = local_expert_indices
        self.num_experts = num_local_experts * self.ep_size
        self.paired = paired
        # What makes a plan of ids [T, K]; install puts the fused backend's here.
        self.planner = functools.partial(build_plan, num_experts=self.num_experts, group=self.ep_group)
        # What moves the rows of the staged mode on CUDA; None: torch's collectives, on any device.
        self.staged: Staged | None = None
        self._forward: _Forward | None = None

    def dispatch_preprocess(self, hidden_states: Tensor, routing_map: Tensor, probs: Tensor) -> tuple[Tensor, Tensor]:
        """Hidden states `[..., H]`, routing_map and probs `[T,E]` -> x `[T,H]`, weights `[T,K]`."""
        x = hidden_states.reshape(-1, hidden_states.shape[-1])
        if self.staged is not None:
            topk_ids, weights = self.staged.route(routing_map, probs)
        else:
            topk_ids = topk_ids_of(routing_map, self.config.moe_router_topk)
            weights = topk_weights_of(probs, topk_ids)
        self._forward = _Forward(hidden_states.shape, topk_ids)
        return x, weights

    def token_dispatch(self, hidden_states: Tensor, probs: Tensor) -> tuple[Tensor, Tensor]:
        """Builds the plan. Paired: x and the weights stay. Staged: -> rows `[sum(rows), H]`, one weight per row."""
        now = self._forward
        if self.staged is not None:
            now.flight, rows, weights = self.staged.dispatch(hidden_states, now.topk_ids, probs)
            return rows, weights
        now.plan = plan = self.planner(now.topk_ids)
        if self.paired:
            return hidden_states, probs
        rows = autograd.dispatch(hidden_states, plan, self.ep_group)
        weights = autograd.dispatch_weights(probs, plan, self.ep_group)
        return rows.index_select(0, plan.rows), weights.index_select(0, plan.rows)

    def dispatch_postprocess(self, hidden_states: Tensor, probs: Tensor) -> tuple[Tensor, Plan | Tensor, Tensor]:
        """The experts' three arguments; the middle one is the plan (paired) or the rows of each local expert."""
        plan, flight = self._forward.plan, self._forward.flight
        if flight is not None:
            return hidden_states, flight.expert_rows, probs
        return hidden_states, plan if self.paired else plan.expert_rows, probs

    def combine_preprocess(self, hidden_states: Tensor) -> Tensor:
        """Staged: rows back to their padded places, `[sum(rows), H]` -> `[M,H]`; on the kernels there is no padding."""
        if self.paired or self.staged is not None:
            return hidden_states
        plan = self._forward.plan
        padded = hidden_states.new_zeros(plan.num_rows, hidden_states.shape[1])
        return padded.index_copy(0, plan.rows, hidden_states)

    def token_combine(self, hidden_states: Tensor) -> Tensor:
        """Staged: `[M,H]` -> `[T,H]`, each token's plain sum over its experts."""
        if self.staged is not None:
            return self.staged.combine(self._forward.flight, hidden_states)
        return hidden_states if self.paired else autograd.combine(hidden_states, self._forward.plan, self.ep_group)

    def combine_postprocess(self, hidden_states: Tensor) -> Tensor:
        """`[T,H]` -> the shape that came in. The forward is over: nothing of it stays here."""
        now, self._forward = self._forward, None
        return hidden_states.view(now.shape)

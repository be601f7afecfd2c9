"""Wrong versions of our own code, each as a context: what the equivalence checks must be able to see."""

import contextlib
from unittest import mock

import torch
from torch import Tensor

from megamoe_train import functional, reference
from megamoe_train.megatron import dispatcher
from megamoe_train.plan import DROPPED


def clamp_off():
    """SwiGLU without the clamp."""
    original = functional.moe
    return mock.patch.object(functional, "moe", lambda *args, clamp, **kwargs: original(*args, clamp=None, **kwargs))


def p_after_fc2():
    """The routing weight on fc2's output instead of its input: the same function, rounded elsewhere."""

    def forward(x, plan, weights, fc1, fc2, *, clamp, group):
        p_M = reference.dispatch_weights(weights.to(reference.wide(x.dtype)), plan, group)
        h_M2I = reference.fc1_forward(reference.dispatch(x, plan, group), plan, fc1)
        y_MH = x.new_zeros((plan.num_rows, x.shape[1]))
        for (start, end), weight in zip(plan.segments, fc2, strict=True):
            act = reference.swiglu(h_M2I[start:end], clamp).to(x.dtype)
            y_MH[start:end] = reference.weigh(act @ weight.t(), p_M[start:end], x.dtype)
        return reference.combine(y_MH, plan, group), h_M2I

    return mock.patch.object(reference, "forward", torch.no_grad()(forward))


def p_missing_in_dfc2():
    """The routing weight left out of fc2's weight gradient, as if it had gone on after fc2."""
    return mock.patch.object(reference, "backward", _without_p_in_dfc2(reference.backward))


def _without_p_in_dfc2(original):
    def backward(*args, **kwargs):
        def weigh(act_I: Tensor, p: Tensor, dtype: torch.dtype) -> Tensor:
            return act_I.to(dtype)

        with mock.patch.object(reference, "weigh", weigh):  # backward weighs only what dfc2 is made of
            return original(*args, **kwargs)

    return backward


def expert_offset(by: int):
    """Every token at the expert `by` places further."""
    return _ids(lambda ids_TK, num_experts: torch.where(ids_TK == DROPPED, DROPPED, (ids_TK + by) % num_experts))


def dropped_slot():
    """The first slot of this rank's first token is lost."""

    def drop(ids_TK: Tensor, num_experts: int) -> Tensor:
        ids_TK[0, 0] = DROPPED
        return ids_TK

    return _ids(drop)


def _ids(change) -> contextlib.AbstractContextManager:
    """`change` applied to the experts that the dispatcher reads from the routing map; weights stay with their slot."""
    original, weights_of = dispatcher.topk_ids_of, dispatcher.topk_weights_of
    right: list[Tensor] = []

    def topk_ids_of(routing_map_TE: Tensor, top_k: int) -> Tensor:
        right[:] = [original(routing_map_TE, top_k)]
        return change(right[0].clone(), routing_map_TE.shape[1])

    def topk_weights_of(probs_TE: Tensor, topk_ids_TK: Tensor) -> Tensor:
        return weights_of(probs_TE, right[0])

    return mock.patch.multiple(dispatcher, topk_ids_of=topk_ids_of, topk_weights_of=topk_weights_of)

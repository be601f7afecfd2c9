"""The workspaces of a Megatron model: one per expert-parallel group and shape, made while the layers are built.

All layers of a shape share one: their kernels run one after another. The rendezvous is collective over the group, which
model building is and a forward is not (pipeline stages and recomputation run it at different times).
"""

from __future__ import annotations

import functools
from argparse import Namespace
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch.distributed as dist
from megatron.core.transformer.moe.moe_layer import MoELayer
from torch import Tensor

from megamoe_train import backends, comm
from megamoe_train.fused_plan import check_workspace
from megamoe_train.ops import DEFAULT_DEADLINE_S
from megamoe_train.staged import Staged
from megamoe_train.workspace import Shape, Workspace

if TYPE_CHECKING:
    from megamoe_train.megatron.install import Options

NO_TOKENS = (
    "megamoe: tokens: got None with {}; allowed: the most tokens of a rank in one "
    "micro-batch, by megamoe_train.install(tokens=...) before the model is built. Megatron's own training "
    "arguments give it by themselves"
)

_made: dict[tuple[str, Shape, float, str, int], Workspace] = {}


def tokens_of(args: Namespace) -> int:
    """The most tokens that one rank brings to one call, of Megatron's validated arguments."""
    sequence = args.seq_length // args.context_parallel_size
    if args.sequence_parallel:
        sequence //= args.tensor_model_parallel_size
    return sequence * max(args.micro_batch_size, getattr(args, "eval_micro_batch_size", None) or 0)


def planner(layer: MoELayer, ep_group: dist.ProcessGroup, options: Options) -> Callable[[Tensor], backends.Plan] | None:
    """What makes a plan of ids `[T,K]` for a layer with paired experts; None where the reference serves it.

    Collective over the group where its workspace has to be made. Raises ValueError where `tokens` is needed and None.
    """
    if backends.resolve(options.backend) != "fused":
        return None
    ranks, experts = comm.size_of(ep_group), layer.num_local_experts * comm.size_of(ep_group)
    hidden = layer.experts.expert_weights()[0][0].shape[1]
    workspace = None
    if options.tokens is not None:
        shape = Shape(ranks, experts, layer.config.moe_router_topk, hidden, options.tokens)
        workspace = shared(shape, ep_group, options)
    elif ranks > 1 or options.sizing != "high_water":
        raise ValueError(NO_TOKENS.format("expert parallelism" if ranks > 1 else f"sizing {options.sizing}"))
    return functools.partial(
        backends.get("fused").plan, num_experts=experts, group=ep_group, workspace=workspace, hidden_size=hidden
    )


def staged(layer: MoELayer, ep_group: dist.ProcessGroup, options: Options) -> Staged | None:
    """What dispatches and combines around a layer's own experts; None where torch's collectives do (the reference).

    Collective over the group where its workspace has to be made. Raises ValueError where `tokens` is None.
    """
    if backends.resolve(options.backend) != "fused":
        return None
    if options.tokens is None:
        raise ValueError(NO_TOKENS.format("staged experts"))
    ranks, config = comm.size_of(ep_group), layer.config
    shape = Shape(ranks, layer.num_local_experts * ranks, config.moe_router_topk, config.hidden_size, options.tokens)
    return Staged(shared(shape, ep_group, options))


def shared(shape: Shape, group: dist.ProcessGroup, options: Options) -> Workspace:
    """The group's workspace of that shape, made by the first layer that asks. Collective then."""
    deadline_s, sizing, capacity = options.deadline_s or DEFAULT_DEADLINE_S, options.sizing, options.capacity
    key = (group.group_name, shape, deadline_s, sizing, capacity)
    if key not in _made or _made[key].closed:
        _made[key] = Workspace.create(
            shape, group=group, device="cuda", deadline_s=deadline_s, sizing=sizing, capacity=capacity
        )
    return _made[key]


def check() -> None:
    """Raises what calls of the fixed mode have found on the device up to here; such a call has written nothing, so
    that a step with one must not be saved."""
    for workspace in made():
        if workspace.sizing == "fixed":
            check_workspace(workspace, wait=True)


def made() -> list[Workspace]:
    """Every workspace that layers of this process share: their bytes are on no layer's account."""
    return [workspace for workspace in _made.values() if not workspace.closed]

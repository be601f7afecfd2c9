"""The workspaces of a Megatron model: one per expert-parallel group and shape, made while the layers are built.

All layers of a shape share one: their kernels run one after another. The rendezvous is collective over the group, which
model building is and a forward is not (pipeline stages and recomputation run it at different times).
"""

import functools
from argparse import Namespace
from collections.abc import Callable

import torch.distributed as dist
from megatron.core.transformer.moe.moe_layer import MoELayer
from torch import Tensor

from megamoe_train import backends, comm
from megamoe_train.ops import DEFAULT_DEADLINE_S
from megamoe_train.staged import Staged
from megamoe_train.workspace import Shape, Workspace

NO_TOKENS = (
    "megamoe: tokens: got None with {}; allowed: the most tokens of a rank in one "
    "micro-batch, by megamoe_train.install(tokens=...) before the model is built. Megatron's own training "
    "arguments give it by themselves"
)

_made: dict[tuple[str, Shape, float], Workspace] = {}


def tokens_of(args: Namespace) -> int:
    """The most tokens that one rank brings to one call, of Megatron's validated arguments."""
    sequence = args.seq_length // args.context_parallel_size
    if args.sequence_parallel:
        sequence //= args.tensor_model_parallel_size
    return sequence * max(args.micro_batch_size, getattr(args, "eval_micro_batch_size", None) or 0)


def planner(
    layer: MoELayer, ep_group: dist.ProcessGroup, *, backend: str, tokens: int | None, deadline_s: float | None
) -> Callable[[Tensor], backends.Plan] | None:
    """What makes a plan of ids `[T,K]` for a layer with paired experts; None where the reference serves it.

    Collective over the group where its workspace has to be made. Raises ValueError where `tokens` is needed and None.
    """
    if backends.resolve(backend) != "fused":
        return None
    ranks, experts = comm.size_of(ep_group), layer.num_local_experts * comm.size_of(ep_group)
    hidden = layer.experts.expert_weights()[0][0].shape[1]
    workspace = None
    if ranks > 1 or tokens is not None:
        if tokens is None:
            raise ValueError(NO_TOKENS.format("expert parallelism"))
        shape = Shape(ranks, experts, layer.config.moe_router_topk, hidden, tokens)
        workspace = shared(shape, ep_group, deadline_s or DEFAULT_DEADLINE_S)
    return functools.partial(
        backends.get("fused").plan, num_experts=experts, group=ep_group, workspace=workspace, hidden_size=hidden
    )


def staged(
    layer: MoELayer, ep_group: dist.ProcessGroup, *, backend: str, tokens: int | None, deadline_s: float | None
) -> Staged | None:
    """What dispatches and combines around a layer's own experts; None where torch's collectives do (the reference).

    Collective over the group where its workspace has to be made. Raises ValueError where `tokens` is None.
    """
    if backends.resolve(backend) != "fused":
        return None
    if tokens is None:
        raise ValueError(NO_TOKENS.format("staged experts"))
    ranks, config = comm.size_of(ep_group), layer.config
    shape = Shape(ranks, layer.num_local_experts * ranks, config.moe_router_topk, config.hidden_size, tokens)
    return Staged(shared(shape, ep_group, deadline_s or DEFAULT_DEADLINE_S))


def shared(shape: Shape, group: dist.ProcessGroup, deadline_s: float) -> Workspace:
    """The group's workspace of that shape, made by the first layer that asks. Collective then."""
    key = (group.group_name, shape, deadline_s)
    if key not in _made or _made[key].closed:
        _made[key] = Workspace.create(shape, group=group, device="cuda", deadline_s=deadline_s)
    return _made[key]


def made() -> list[Workspace]:
    """Every workspace that layers of this process share: their bytes are on no layer's account."""
    return [workspace for workspace in _made.values() if not workspace.closed]

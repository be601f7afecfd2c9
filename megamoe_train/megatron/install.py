"""`install()`: make `moe_token_dispatcher_type="megamoe"` something Megatron can build.

`MoELayer.__init__` is wrapped once. A layer of another dispatcher type is untouched. In one of ours, Megatron builds
router, experts and shared experts as always; then the dispatcher is replaced, and experts we know become paired.
The data-parallel wrappers are wrapped too, to refuse what cannot work around such a model.
"""

import dataclasses
import functools
import importlib.util
import inspect
import logging

from megatron.core import distributed
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.transformer.moe.moe_utils import get_default_pg_collection
from megatron.core.utils import log_single_rank

from megamoe_train import backends, placement
from megamoe_train.config import BACKENDS, RECOMPUTE, check_choice
from megamoe_train.megatron import cpu, experts, wheel, workspaces
from megamoe_train.megatron.dispatcher import MegaMoETokenDispatcher
from megamoe_train.megatron.validate import validate
from megamoe_train.workspace import check_sizing

NAME = "megamoe"
EXPERTS = ("paired", "staged")

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Options:
    """How the layers built from now on run. Not in TransformerConfig, because checkpoints do not depend on it."""

    backend: str = "auto"  # "auto" | "fused" | "reference"
    recompute: str | None = None  # "fc1": h is not kept for backward but computed again
    experts: str = "paired"  # "staged": dispatch and combine around Megatron's own experts, also where we could pair
    tokens: int | None = None  # most tokens of a rank in one micro-batch; Megatron's training arguments give it
    deadline_s: float | None = None  # seconds a wait in a kernel may last; None: 600
    sizing: str = "high_water"  # rows that a rank allocates for, see Workspace.create: or "fixed", "exact"
    capacity: int = 0  # rows with "fixed"

    def __post_init__(self):
        check_choice("backend", self.backend, BACKENDS)
        check_choice("recompute", self.recompute, RECOMPUTE)
        check_choice("experts", self.experts, EXPERTS)
        check_sizing(self.sizing, self.capacity)


_options = Options()


def install(**options: str | int | float | None) -> None:
    """Accept "megamoe" as a token dispatcher type, on the command line too. Calling it again changes `options` only.

    Keywords: the fields of `Options`. Raises ValueError for a value that is not allowed.
    """
    global _options
    _options = dataclasses.replace(_options, **options)
    cpu.apply()
    wheel.use_shipped_dataset_helper()
    _wrap_once(MoELayer, _with_megamoe)
    _wrap_once(distributed.DistributedDataParallel, _with_validation)
    for sharded in (distributed.FullyShardedDataParallel, distributed.TorchFullyShardedDataParallel):
        _wrap_once(sharded, _with_refusal)
    if importlib.util.find_spec("megatron.training") is not None:
        from megamoe_train.megatron import arguments

        arguments.patch_parser()


def options() -> Options:
    """What the layers built from now on will be."""
    return _options


def _wrap_once(cls: type, wrapper) -> None:
    if not hasattr(cls.__init__, "__megamoe__"):
        cls.__init__ = wrapper(cls.__init__)
        cls.__init__.__megamoe__ = True


def _with_megamoe(original):
    """`MoELayer.__init__` that knows one more dispatcher type."""
    signature = inspect.signature(original)

    @functools.wraps(original)
    def init(self, *args, **kwargs):
        given = signature.bind(self, *args, **kwargs).arguments
        config = given["config"]
        if config.moe_token_dispatcher_type != NAME:
            return original(self, *args, **kwargs)
        validate(config, experts="staged")  # what no experts module can do; the rest when its class is known
        backends.resolve(_options.backend)
        config.moe_token_dispatcher_type = "alltoall"  # the nearest of the types that the original can build
        try:
            original(self, *args, **kwargs)
        finally:
            config.moe_token_dispatcher_type = NAME
        _take_over(self, given.get("pg_collection") or get_default_pg_collection())

    return init


def _take_over(layer: MoELayer, pg_collection: ProcessGroupCollection) -> None:
    """Our dispatcher, and our experts where we know Megatron's."""
    if _options.backend != "reference":  # which works over any process group, wherever its ranks sit
        placement.check_group(pg_collection.ep)
    paired = _options.experts == "paired" and experts.can_pair(layer.experts)
    layer.token_dispatcher = MegaMoETokenDispatcher(
        layer.num_local_experts, layer.local_expert_indices, layer.config, pg_collection, paired=paired
    )
    _announce(type(layer.experts).__name__, paired, _options)
    if hasattr(layer.experts, "config"):
        # SequentialMLP copies the config where ffn_hidden_size differs, and did so under the borrowed name.
        layer.experts.config.moe_token_dispatcher_type = NAME
    if not paired:
        layer.token_dispatcher.staged = workspaces.staged(layer, pg_collection.ep, _options)
    if paired:
        validate(layer.config, backend=_options.backend)
        experts.pair(layer.experts, backend=_options.backend, recompute=_options.recompute)
        on_device = workspaces.planner(layer, pg_collection.ep, _options)
        layer.token_dispatcher.planner = on_device or layer.token_dispatcher.planner


@functools.cache
def _announce(experts_name: str, paired: bool, options: Options) -> None:
    """Once: what the MoE layers are."""
    mode = "one call for all experts" if paired else "dispatch and combine around"
    backend = backends.resolve(options.backend)
    log_single_rank(logger, logging.INFO, f"megamoe: {mode} {experts_name}, backend {backend}")


def _with_validation(original):
    """`DistributedDataParallel.__init__` that validates its config too: a loop of one's own has no command line."""

    @functools.wraps(original)
    def init(self, config, ddp_config, *args, **kwargs):
        validate(config, ddp_config, experts="staged")
        original(self, config, ddp_config, *args, **kwargs)

    return init


def _with_refusal(original):
    """`__init__` of a wrapper that shards weights: refused around a model of ours."""

    @functools.wraps(original)
    def init(self, config, *args, **kwargs):
        if config.moe_token_dispatcher_type == NAME:
            instead = "DistributedDataParallel, with use_distributed_optimizer=True to shard optimizer state"
            raise ValueError(f"{type(self).__name__}: it frees expert weights that one call reads whole. Use {instead}")
        original(self, config, *args, **kwargs)

    return init

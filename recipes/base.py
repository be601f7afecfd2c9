"""What a recipe is: one full Megatron configuration, and the machine it is written for."""

import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


def _has_transformer_engine() -> bool:
    return importlib.util.find_spec("transformer_engine") is not None


def _has_apex() -> bool:
    """Whether there is the part of NVIDIA's apex that Megatron's output layer needs to add its gradient in place."""
    return importlib.util.find_spec("fused_weight_gradient_mlp_cuda") is not None


@dataclass(frozen=True)
class World:
    """The processes a job runs on."""

    num_ranks: int  # all processes of the job
    num_gpus: int  # GPUs on this machine; 0 means the job runs on the CPU over gloo
    has_transformer_engine: bool = field(default_factory=_has_transformer_engine)
    has_apex: bool = field(default_factory=_has_apex)

    @property
    def on_gpu(self) -> bool:
        return self.num_gpus > 0


@dataclass(frozen=True)
class StandIn:
    """A published part of a model that a recipe does not build, and what stands in its place."""

    part: str
    published: str
    here: str

    def __str__(self) -> str:
        return f"stand-in for {self.part} ({self.published}): {self.here}"


@dataclass(frozen=True)
class Recipe:
    """One full configuration. `settings` holds Megatron arguments without the leading dashes, in the spelling of
    Megatron's help: `True` is a bare flag, `None` and `False` leave the argument out, a list is several values."""

    name: str
    summary: str  # one line, for the list of recipes
    settings: Mapping[str, Any]
    most_ranks: int | None = None  # processes to start on one machine at most; None: as many as it has GPUs
    notes: tuple[str, ...] = ()  # limits, printed when the job starts
    stand_ins: tuple[StandIn, ...] = ()  # printed when the job starts
    env: Mapping[str, str] = field(default_factory=dict)  # environment variables, where the user has not set them
    has_run: str = ""  # where, and how far; empty: never
    for_h100: bool = False  # refused without a GPU, and where the memory model says that 80 GB are too few
    needs_data: bool = False  # refused without --data: the texts that Python carries would be no training

"""What a recipe is: one full Megatron configuration, and the machine it is written for."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class World:
    """The processes a job runs on."""

    num_ranks: int  # all processes of the job
    num_gpus: int  # GPUs on this machine; 0 means the job runs on the CPU over gloo

    @property
    def on_gpu(self) -> bool:
        return self.num_gpus > 0


@dataclass(frozen=True)
class Recipe:
    """One full configuration. `settings` holds Megatron arguments without the leading dashes, in the spelling of
    Megatron's help: `True` is a bare flag, `None` and `False` leave the argument out, a list is several values."""

    name: str
    summary: str  # one line, for the list of recipes
    settings: Mapping[str, Any]
    most_ranks: int | None = None  # processes to start on one machine at most; None: as many as it has GPUs
    notes: tuple[str, ...] = ()  # stand-ins and limits, printed when the job starts
    env: Mapping[str, str] = field(default_factory=dict)  # environment variables, where the user has not set them

"""Frozen shapes and knobs of one MoE layer, and the one table of MEGAMOE_* environment variables.

Standard library only: setup and doctor read it where torch is missing or broken.
"""

from __future__ import annotations

import math
import os
from dataclasses import dataclass

BACKENDS = ("auto", "fused", "reference")
RECOMPUTE = (None, "fc1")

# What the fused kernels are built for (DESIGN section 5, "Shapes").
HIDDEN_MULTIPLE = 256
INTERMEDIATE_MULTIPLE = 128
MAX_TOP_K = 16


@dataclass(frozen=True)
class MegaMoEConfig:
    """One expert-parallel MoE layer. `validate()` is called by whatever takes a config."""

    hidden_size: int  # H
    intermediate_size: int  # I, per expert
    num_experts: int  # E, in all ranks together
    top_k: int  # K
    ep_size: int = 1  # R, ranks of the expert-parallel group
    clamp: float | None = None  # SwiGLU clamp c: gate <= c, up in [-c, c]; None = off
    backend: str = "auto"  # "auto" | "fused" | "reference"
    recompute: str | None = None  # "fc1": h is not kept for backward but computed again

    @property
    def num_local_experts(self) -> int:
        """L = E / R."""
        return self.num_experts // self.ep_size

    def validate(self) -> None:
        """Raises ValueError naming the field, its value and what is allowed.

        The shape rules of the fused kernels hold for "auto" as well, so that what runs on a CPU runs on a GPU;
        backend="reference" takes any shape.
        """
        check_choice("backend", self.backend, BACKENDS)
        check_choice("recompute", self.recompute, RECOMPUTE)
        for name in ("hidden_size", "intermediate_size", "num_experts", "top_k", "ep_size"):
            _check_positive_int(name, getattr(self, name))
        if self.top_k > self.num_experts:
            raise ValueError(f"top_k: got {self.top_k}; allowed: 1..num_experts = {self.num_experts}")
        if self.num_experts % self.ep_size:
            raise ValueError(f"num_experts: got {self.num_experts}; allowed: a multiple of ep_size = {self.ep_size}")
        check_clamp(self.clamp)
        if self.backend != "reference":
            self._validate_kernel_shapes()

    def _validate_kernel_shapes(self) -> None:
        for name, multiple in (("hidden_size", HIDDEN_MULTIPLE), ("intermediate_size", INTERMEDIATE_MULTIPLE)):
            if getattr(self, name) % multiple:
                allowed = f'a multiple of {multiple} (any with backend="reference")'
                raise ValueError(f"{name}: got {getattr(self, name)}; allowed: {allowed}")
        if self.top_k > MAX_TOP_K:
            raise ValueError(f'top_k: got {self.top_k}; allowed: 1..{MAX_TOP_K} (any with backend="reference")')


def check_choice(name: str, value: object, allowed: tuple) -> None:
    """Raises ValueError unless `value` is one of `allowed`."""
    if value not in allowed:
        raise ValueError(f"{name}: got {value!r}; allowed: {', '.join(repr(choice) for choice in allowed)}")


def check_clamp(clamp: object) -> None:
    """Raises ValueError unless `clamp` is None or a finite number above 0."""
    number = isinstance(clamp, (int, float)) and not isinstance(clamp, bool)
    if clamp is not None and not (number and math.isfinite(clamp) and clamp > 0):
        raise ValueError(f"clamp: got {clamp!r}; allowed: None (off) or a finite number > 0")


def _check_positive_int(name: str, value: object) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{name}: got {value!r}; allowed: an integer >= 1")


@dataclass(frozen=True)
class EnvVariable:
    default: str
    meaning: str


# Every MEGAMOE_* variable this project reads, in Python, shell or C++. A test finds names that are missing here.
ENVIRONMENT = {
    "MEGAMOE_PYTHON": EnvVariable("", "the Python >= 3.12 that make builds .venv with; empty: the first one found"),
    "MEGAMOE_SKIP_CUDA_BUILD": EnvVariable("0", "1: install without building the CUDA extension"),
    "MEGAMOE_RECORD_DIR": EnvVariable("", "where a rank writes the record of a failed wait; empty: where it runs"),
    "MEGAMOE_NVLINK_DOMAIN": EnvVariable(
        "", "the NVLink domain this host's GPUs belong to; empty: the host. Expert-parallel groups must lie in one"
    ),
    "MEGAMOE_RANDOM_DELAYS": EnvVariable(
        "0", "1: kernels are built to sleep at random before each signal and after each wait, for tests of their order"
    ),
    "MEGAMOE_TRACE": EnvVariable("0", "1: kernels are built to record when each role did what, for `bench trace`"),
    "MEGAMOE_FORCE_CUDA_BUILD": EnvVariable("0", "1: an install that cannot build the CUDA extension fails"),
}


def env(name: str) -> str:
    """Value of a MEGAMOE_* variable of the table, or its default. KeyError for a name outside the table."""
    return os.environ.get(name, ENVIRONMENT[name].default)


def env_flag(name: str) -> bool:
    """A MEGAMOE_* variable that is "0" or "1". Raises ValueError for anything else."""
    value = env(name)
    check_choice(name, value, ("0", "1"))
    return value == "1"

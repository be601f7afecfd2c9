"""The versions this project is tested with, in one place, and what happens outside them.

Standard library only: doctor and setup read it where torch is missing or broken.
"""

from __future__ import annotations

import platform
import re
import warnings
from dataclasses import dataclass
from importlib import metadata

__version__ = "0.1.0"

TESTED = {"python": "3.12", "torch": "2.11", "megatron-core": "0.19.2"}

# Older than this cannot work. Python 3.12: megatron-core 0.19 needs it. torch 2.9: the first whose stable ABI the
# extension can be built on. megatron-core 0.19: the first whose dispatcher and experts have the hooks we implement.
MINIMUM = {"python": "3.12", "torch": "2.9", "megatron-core": "0.19"}


@dataclass(frozen=True)
class VersionState:
    """What is installed of one of TESTED's packages, and the verdict."""

    name: str
    found: str | None  # None: not installed
    state: str  # "tested" | "untested" | "too old" | "missing"

    def describe(self) -> str:
        found = self.found or "not installed"
        tested, oldest = TESTED[self.name], MINIMUM[self.name]
        return f"{self.name} {found}: {self.state} (tested: {tested}, oldest that works: {oldest})"


def installed_version(name: str) -> str | None:
    """Version of the running Python or of an installed distribution; None where it is not installed."""
    if name == "python":
        return platform.python_version()
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def version_state(name: str) -> VersionState:
    """Compares what is installed of `name` (a key of TESTED) with TESTED and MINIMUM."""
    found = installed_version(name)
    if found is None:
        return VersionState(name, None, "missing")
    if _numbers(found) < _numbers(MINIMUM[name]):
        return VersionState(name, found, "too old")
    tested = _numbers(TESTED[name])
    return VersionState(name, found, "tested" if _numbers(found)[: len(tested)] == tested else "untested")


def check_versions(names: tuple[str, ...] = ("python", "torch")) -> None:
    """Warns for a version outside the tested range; raises RuntimeError for one that is missing or cannot work.

    names: keys of TESTED; megamoe_train.megatron asks for "megatron-core" too.
    """
    for state in map(version_state, names):
        if state.state in ("missing", "too old"):
            raise RuntimeError(f"megamoe_train cannot run: {state.describe()}")
        if state.state == "untested":
            warnings.warn(f"megamoe_train: {state.describe()}", stacklevel=2)


def _numbers(version: str) -> tuple[int, ...]:
    """Leading numbers of a version: "2.11.0+cu130" -> (2, 11, 0)."""
    return tuple(int(part) for part in re.match(r"\d+(\.\d+)*", version).group().split("."))

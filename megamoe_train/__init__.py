"""Expert-parallel MoE layers for training: one fused kernel forward, one backward, behind Megatron's own interfaces.

`moe` is the function, `MegaMoE` the module, `MegaMoEConfig` its shapes and knobs; a group of GPUs shares a `Workspace`;
`install()` turns the layer on inside Megatron. Names load on first use, so that `python -m megamoe_train.doctor` speaks
even where torch does not import.
"""

from __future__ import annotations

import importlib

from .versions import __version__, check_versions

_HOMES = {  # name here -> module, or module:name there
    "BackendUnavailable": "backends",
    "MegaMoE": "module",
    "MegaMoEConfig": "config",
    "MegaMoETimeout": "watchdog",
    "RoutingPlan": "plan",
    "RowOverflow": "ops_plan",
    "Workspace": "workspace",
    "WorkspaceShape": "workspace:Shape",
    "build_plan": "plan",
    "check_workspace": "fused_plan",
    "install": "megatron.install",
    "moe": "functional",
}
__all__ = ["__version__", *_HOMES]


def __getattr__(name: str):
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    check_versions()
    home, _, there = _HOMES[name].partition(":")
    globals()[name] = getattr(importlib.import_module(f"{__name__}.{home}"), there or name)
    return globals()[name]


def __dir__() -> list[str]:
    return sorted(__all__)

"""Megatron arguments as a flat table: `{"num-layers": ["4"], "swiglu": []}`, an argument without values is a flag.

A recipe fills the table; a flat YAML file, `--set key=value` and `-- --megatron-flag value` overwrite its rows, in this
order; the table becomes the argument list that Megatron parses. No torch, no Megatron.
"""

import difflib
import shlex
from collections.abc import Collection, Mapping
from typing import Any

from megamoe_train.megatron import flat_yaml

Settings = dict[str, list[str]]


def from_recipe(values: Mapping[str, Any]) -> Settings:
    """The table of a recipe: True is a flag, None and False leave the row out, a list is several values."""
    settings: Settings = {}
    for key, value in values.items():
        if value is None or value is False:
            continue
        listed = value if isinstance(value, list | tuple) else [] if value is True else [value]
        settings[_name(key)] = [str(item) for item in listed]
    return settings


def apply_yaml(settings: Settings, path: str) -> None:
    """Each `key: value` of a flat YAML file overwrites a row; `false` takes it out. Raises ValueError."""
    for key, value in flat_yaml.read(path).items():
        settings.pop(_name(key), None)
        settings |= from_recipe({key: value})


def apply_sets(settings: Settings, pairs: Collection[str]) -> None:
    """`key=value` overwrites a row, `key=true` sets a flag, `key=false` and `key=none` take the row out.

    Several values are written as on a command line: `--set "recompute-modules=moe layernorm"`. Raises ValueError.
    """
    for pair in pairs:
        key, separator, value = pair.partition("=")
        if not separator or not key.strip():
            raise ValueError(f"--set: {pair!r} is not key=value, for example --set train-iters=500")
        name = _name(key)
        if value.lower() in ("false", "none"):
            settings.pop(name, None)
        else:
            settings[name] = [] if value.lower() == "true" else shlex.split(value)


def apply_arguments(settings: Settings, arguments: Collection[str]) -> None:
    """`--flag`, `--flag value ...` and `--flag=value`, as given after `--`, overwrite rows. Raises ValueError."""
    name = ""
    for word in arguments:
        if word.startswith("--") and len(word) > 2:
            key, separator, value = word.partition("=")
            name = _name(key)
            settings[name] = [value] if separator else []
        elif not name:
            raise ValueError(f"after --: {word!r} is not a Megatron argument, for example -- --train-iters 500")
        else:
            settings[name].append(word)


def to_arguments(settings: Settings) -> list[str]:
    """The argument list for Megatron's parser."""
    return [word for name, values in settings.items() for word in (f"--{name}", *values)]


def check_known(settings: Settings, known: Collection[str]) -> None:
    """Raises ValueError for a name that is not among Megatron's `--` option strings; says the nearest ones."""
    names = {option.removeprefix("--") for option in known}
    for name in settings:
        if name not in names:
            near = difflib.get_close_matches(name, names, n=3, cutoff=0.6)
            hint = f"; nearest: {', '.join(f'--{option}' for option in near)}" if near else ""
            raise ValueError(f"--{name} is not a Megatron argument{hint}")


def integer(settings: Settings, name: str, default: int) -> int:
    """The row `name` as a number, `default` where it is absent. Raises ValueError."""
    if name not in settings:
        return default
    try:
        (value,) = settings[name]
        return int(value)
    except ValueError as error:
        raise ValueError(f"{name}: {' '.join(settings[name]) or '(nothing)'!r} is not a whole number") from error


def dispatcher(settings: Settings) -> str | None:
    """The token dispatcher of the MoE layers; None where there are none, or Megatron chooses."""
    if "num-experts" not in settings:
        return None
    (name,) = settings.get("moe-dispatcher") or settings.get("moe-token-dispatcher-type") or (None,)
    return name


def check_shape(settings: Settings, num_ranks: int) -> None:
    """Raises ValueError for a job that cannot be laid out: ranks, experts and batch sizes that do not divide."""
    tensor, pipeline, context, expert = (
        integer(settings, f"{name}-parallel-size", 1)
        for name in ("tensor-model", "pipeline-model", "context", "expert-model")
    )
    for name, size in (("tensor", tensor), ("pipeline", pipeline), ("context", context), ("expert", expert)):
        if size < 1:
            raise ValueError(f"{name} parallel size: {size} is not 1 or more")
    for product, names in (
        (expert * pipeline, f"expert-model-parallel-size {expert} x pipeline-model-parallel-size {pipeline}"),
        (tensor * pipeline * context, f"tensor {tensor} x pipeline {pipeline} x context {context} parallel size"),
    ):
        if num_ranks % product:
            raise ValueError(f"world size: {num_ranks} is not a multiple of {names}")
    _check_experts(settings, expert)
    _check_batch(settings, num_ranks // (tensor * pipeline * context))


def check_steps(settings: Settings) -> None:
    """Raises ValueError unless the job has a number of steps, and evaluates and saves every so many of them."""
    for name in ("train-iters", "eval-interval", "eval-iters", "save-interval"):
        steps = integer(settings, name, 0)
        if steps < 1:
            raise ValueError(f"{name}: {steps if name in settings else 'absent'}, must be 1 or more")


def _check_experts(settings: Settings, expert: int) -> None:
    experts, top_k = integer(settings, "num-experts", 0), integer(settings, "moe-router-topk", 2)
    if experts % expert:
        raise ValueError(f"num-experts: {experts} is not divisible by expert-model-parallel-size {expert}")
    if experts and not 1 <= top_k <= experts:
        raise ValueError(f"moe-router-topk: {top_k} is not between 1 and num-experts ({experts})")


def _check_batch(settings: Settings, replicas: int) -> None:
    micro = integer(settings, "micro-batch-size", 1)
    batch = integer(settings, "global-batch-size", micro * replicas)
    if micro < 1 or batch < 1 or batch % (micro * replicas):
        raise ValueError(
            f"global-batch-size: {batch} is not a multiple of micro-batch-size {micro} x {replicas} data-parallel ranks"
        )


def _name(key: str) -> str:
    return key.strip().removeprefix("--").replace("_", "-")

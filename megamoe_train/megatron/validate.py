"""Refuse, before any GPU work, what a model dispatched by megamoe cannot do. The judgements are in fields.py."""

import dataclasses

from megamoe_train.config import BACKENDS, check_choice
from megamoe_train.megatron import fields
from megamoe_train.versions import TESTED

DISPATCHER = "megamoe"


def validate(transformer_config, ddp_config=None, optimizer_config=None, *, experts="paired", backend="auto") -> None:
    """Raise one ValueError that lists every refused setting: field, value, why, what instead.

    Does nothing unless `transformer_config.moe_token_dispatcher_type` is "megamoe". `experts` is "paired" (ours) or
    "staged" (Megatron's or the user's own between a real dispatch and combine), which support more activations.
    `backend` is "auto", "fused" or "reference"; the shape rules of the kernels do not hold for the last.
    A field that the table does not know (a newer Megatron's) is refused unless it has its default.
    """
    check_choice("experts", experts, ("paired", "staged"))
    check_choice("backend", backend, BACKENDS)
    if transformer_config.moe_token_dispatcher_type != DISPATCHER:
        return
    scopes = [fields.ANY]
    if experts == "paired":
        scopes += [fields.PAIRED] if backend == "reference" else [fields.PAIRED, fields.KERNELS]
    refusals = []
    configs = (transformer_config, ddp_config, optimizer_config)
    for config, (name, rules) in zip(configs, fields.tables().items(), strict=True):
        if config is not None:
            refusals += _refusals(config, name, rules, tuple(scopes))
    if refusals:
        count = f"{len(refusals)} setting" + "s" * (len(refusals) > 1)
        raise ValueError(f"megamoe refuses {count}:\n" + "\n".join(f"  {refusal}" for refusal in refusals))


def _refusals(config, name: str, rules: dict[str, fields.Rule], scopes: tuple[str, ...]) -> list[str]:
    """One line for each refused field of `config`, in the order of its fields."""
    refusals = []
    for field in fields.megatron_fields(type(config)).values():
        value = getattr(config, field.name, dataclasses.MISSING)
        if value is dataclasses.MISSING:  # a field without a default that __post_init__ has not set
            continue
        rule = rules.get(field.name)
        if rule is None:
            if not fields.is_default(field, value):
                refusals.append(_line(name, field.name, value, *_unknown(field)))
        elif rule.refuses(value, config, scopes):
            refusals.append(_line(name, field.name, value, rule.why, rule.instead))
    return refusals


def _unknown(field: dataclasses.Field) -> tuple[str, str]:
    why = f"megamoe_train does not know this field; its table covers megatron-core {TESTED['megatron-core']}"
    default = "" if field.default is dataclasses.MISSING else f" ({fields.show(field.default)})"
    return why, f"leave it at its default{default}, or dispatch with alltoall"


def _line(config: str, name: str, value, why: str, instead: str) -> str:
    return f"{config}.{name} = {fields.show(value)}: {why}. Instead: {instead}."

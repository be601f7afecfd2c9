"""Every field of Megatron's configs, judged for a model whose MoE layers are dispatched by megamoe.

A field is
- supported: it concerns the MoE layer and works (`refused` may still name values outside our limits),
- irrelevant: it acts elsewhere, whatever dispatches the tokens,
- refused: the named values cannot work here; `why` says so and `instead` says what to set.

Two kinds of experts exist: *paired* (ours, one fused call) and *staged* (any other module between a real dispatch and
a real combine). A rule's scope says where its refusal holds: ANY, PAIRED (staged experts read the field themselves),
KERNELS (paired, and not on the reference backend).

The tables are `fields_parallel`, `fields_transformer`, `fields_moe`, `fields_ddp`, `fields_optimizer`; `validate.py`
applies them, and `python -m megamoe_train.megatron.fields` prints them.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

SUPPORTED, IRRELEVANT, REFUSED = "supported", "irrelevant", "refused"
ANY, PAIRED, KERNELS = "any", "paired", "kernels"


@dataclasses.dataclass(frozen=True)
class Values:
    """A set of values of one field: its name for people, and its test, given the value and the whole config."""

    label: str
    contains: Callable[[Any, Any], bool]


TRUE = Values("True", lambda value, config: bool(value))
SET = Values("anything but None", lambda value, config: value is not None)


def but(*allowed) -> Values:
    """Every value except `allowed`."""
    return Values("anything but " + " or ".join(map(show, allowed)), lambda value, config: value not in allowed)


def values(label: str, contains: Callable[[Any, Any], bool]) -> Values:
    """A set of values under a name of its own."""
    return Values(label, contains)


@dataclasses.dataclass(frozen=True)
class Rule:
    """What happens to one field."""

    status: str
    why: str
    refused: Values | None = None
    instead: str = ""
    scope: str = ANY

    def refuses(self, value, config, scopes: tuple[str, ...]) -> bool:
        """Whether `value` of this field is refused, in this config, by a rule of one of `scopes`."""
        return self.refused is not None and self.scope in scopes and self.refused.contains(value, config)


def supported(why: str) -> Rule:
    """A field of the MoE layer that works with every value Megatron accepts."""
    return Rule(SUPPORTED, why)


def limited(why: str, refused: Values, instead: str, scope: str = ANY) -> Rule:
    """A field of the MoE layer that works, within limits."""
    return Rule(SUPPORTED, why, refused, instead, scope)


def irrelevant(why: str) -> Rule:
    """A field that acts elsewhere."""
    return Rule(IRRELEVANT, why)


def refuse(why: str, refused: Values, instead: str, scope: str = ANY) -> Rule:
    """A field whose every use (the values `refused`) cannot work here."""
    return Rule(REFUSED, why, refused, instead, scope)


def show(value) -> str:
    """A value as a person would write it."""
    if isinstance(value, list | tuple | set):
        return "[" + ", ".join(map(show, value)) + "]"
    return getattr(value, "name", None) or getattr(value, "__name__", None) or repr(value)


def tables() -> dict[str, dict[str, Rule]]:
    """The rules of each config: config name -> field name -> rule. MLATransformerConfig is a TransformerConfig here."""
    from megamoe_train.megatron import fields_ddp, fields_moe, fields_optimizer, fields_parallel, fields_transformer

    return {
        "TransformerConfig": fields_parallel.RULES | fields_transformer.RULES | fields_moe.RULES,
        "DistributedDataParallelConfig": fields_ddp.RULES,
        "OptimizerConfig": fields_optimizer.RULES,
    }


def megatron_fields(config_class: type) -> dict[str, dataclasses.Field]:
    """The fields that Megatron itself defines; those of a user's own subclass of its configs are the user's."""
    fields = {}
    for base in config_class.__mro__:
        if base.__module__.startswith("megatron.core.") and dataclasses.is_dataclass(base):
            fields.update({field.name: field for field in dataclasses.fields(base) if field.name not in fields})
    return fields


def is_default(field: dataclasses.Field, value) -> bool:
    """Whether `value` is the field's default. A field without one has no default to equal."""
    if field.default is not dataclasses.MISSING:
        default = field.default
    elif field.default_factory is not dataclasses.MISSING:
        default = field.default_factory()
    else:
        return False
    return value is default or value == default


_SCOPES = {ANY: "", PAIRED: " (works staged)", KERNELS: " (works staged, and on the reference backend)"}


def lines() -> list[str]:
    """The whole table as text, one field a line, tab-separated: config, field, status, refused, why, instead."""
    rows = []
    for config, rules in tables().items():
        for name, rule in rules.items():
            refused = rule.refused.label + _SCOPES[rule.scope] if rule.refused else ""
            rows.append("\t".join([config, name, rule.status, refused, rule.why, rule.instead]))
    return rows


if __name__ == "__main__":
    print("\n".join(lines()))

"""Writes the tables of docs/configuration.md and docs/recipes.md from the code. `--check` only compares them."""

from __future__ import annotations

import argparse
import ast
import re
import sys

import toolchain
from megamoe_train.config import ENVIRONMENT

PAGE = toolchain.ROOT / "docs" / "configuration.md"
RECIPES_PAGE = toolchain.ROOT / "docs" / "recipes.md"
SOURCE = toolchain.ROOT / "megamoe_train" / "config.py"


def table(header: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    lines = [header, tuple("---" for _ in header), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def environment_table() -> str:
    rows = [(f"`{name}`", _default(row.default), row.meaning) for name, row in ENVIRONMENT.items()]
    return table(("variable", "default", "meaning"), rows)


def _default(text: str) -> str:
    return f"`{text}`" if text else "empty"


def field_table() -> str:
    """Fields of MegaMoEConfig: the meaning is the comment at the end of each field's line."""
    source = SOURCE.read_text()
    lines = source.splitlines()
    (body,) = (node.body for node in ast.parse(source).body if getattr(node, "name", "") == "MegaMoEConfig")
    rows = []
    for field in body:
        if isinstance(field, ast.AnnAssign):
            default = f"`{ast.unparse(field.value)}`" if field.value else "required"
            meaning = lines[field.end_lineno - 1].partition("  # ")[2]
            rows.append((f"`{field.target.id}`", f"`{ast.unparse(field.annotation)}`", default, meaning))
    return table(("field", "type", "default", "meaning"), rows)


def command_table() -> str:
    """Options of `python -m megamoe_train.pretrain`: the meaning is argparse's help."""
    from megamoe_train import pretrain

    rows = []
    for action in pretrain.parser()._actions:
        if action.help != "==SUPPRESS==" and action.dest != "help":
            value = "" if action.nargs == 0 else f" {action.metavar or action.dest.upper()}"
            rows.append((f"`{action.option_strings[0]}{value}`", action.help))
    return table(("option", "meaning"), rows)


def megatron_table() -> str:
    """Our options in Megatron's parser, as it has them after `patch_parser`: the meaning is argparse's help."""
    from megamoe_train.megatron import arguments

    arguments.patch_parser()
    from megatron.training.arguments import add_megatron_arguments

    parser = add_megatron_arguments(argparse.ArgumentParser(allow_abbrev=False))
    (group,) = (group for group in parser._action_groups if group.title == arguments.GROUP)
    rows = []
    for action in group._group_actions:
        value = "|".join(action.choices) if action.choices else action.metavar or action.dest.upper()
        rows.append((f"`{action.option_strings[0]} {value}`", action.help))
    return table(("option", "meaning"), rows)


def recipe_table() -> str:
    """Every recipe with TransformerEngine: what it trains, and what the memory model says at the GPUs of its name."""
    from megamoe_train import memory, recipes
    from megamoe_train.shapes import Layout, ModelShape

    rows = []
    for name in recipes.names():
        ranks = recipes.ranks_of(name)
        recipe = recipes.find(name, recipes.World(ranks, 0 if name == "debug" else 8, True))
        model = ModelShape.of(recipe.settings)
        most = memory.largest(model, Layout.of(recipe.settings, ranks, model))
        billions = memory.total_parameters(model) / 1e9
        size = f"{billions:,.0f}B" if billions >= 100 else f"{billions:.3g}B"
        holds = f"{most.total / memory.GIB:.1f} GiB"
        rows.append((f"`{name}`", recipe.summary, size, holds, recipe.has_run or "never"))
    return table(("recipe", "what it trains", "parameters", "a GPU holds", "has run"), rows)


def stand_in_table() -> str:
    """The parts of DeepSeek-V4 that megatron-core does not have."""
    from megamoe_train.recipes import deepseek_v4

    every = (*deepseek_v4.STAND_INS, deepseek_v4.LATENT, deepseek_v4.MULTI_QUERY)
    return table(("part", "published", "here"), [(one.part, one.published, one.here) for one in every])


TABLES = {
    PAGE: {
        "environment": environment_table,
        "fields": field_table,
        "command": command_table,
        "megatron": megatron_table,
    },
    RECIPES_PAGE: {"recipes": recipe_table, "stand-ins": stand_in_table},
}


def rendered(page: str, path=PAGE) -> str:
    """The page with what stands between each pair of markers replaced by the table of that name."""
    for name, make in TABLES[path].items():
        text = make()
        begin, end = f"<!-- begin {name} -->", f"<!-- end {name} -->"
        page, found = re.subn(f"{begin}.*?{end}", lambda _: f"{begin}\n{text}\n{end}", page, flags=re.DOTALL)  # noqa: B023
        assert found == 1, f"{path}: {found} places for the table {name!r}, 1 expected"
    return page


def main() -> None:
    for path in TABLES:
        page = path.read_text()
        wanted = rendered(page, path)
        if "--check" not in sys.argv[1:]:
            path.write_text(wanted)
        elif page != wanted:
            sys.exit(f"{path.name} does not match the code: run `make docs`")


if __name__ == "__main__":
    main()

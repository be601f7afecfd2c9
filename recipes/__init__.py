"""Recipes: one function is one full configuration. `python -m megamoe_train.pretrain --recipe NAME` runs it."""

from collections.abc import Callable

from megamoe_train.recipes.base import Recipe, World
from megamoe_train.recipes.debug import debug

__all__ = ["Recipe", "World", "find", "names"]

_RECIPES: dict[str, Callable[[World], Recipe]] = {"debug": debug}


def names() -> list[str]:
    """Names of all recipes, in the order of the table."""
    return list(_RECIPES)


def find(name: str, world: World) -> Recipe:
    """The recipe `name`, written out for `world`. Raises ValueError, which lists the recipes, for another name."""
    if name not in _RECIPES:
        raise ValueError(f"recipe: {name!r} is unknown; recipes are: {', '.join(_RECIPES)}")
    return _RECIPES[name](world)

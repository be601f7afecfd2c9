"""Recipes: one function is one full configuration. `python -m megamoe_train.pretrain --recipe NAME` runs it.

Names read MODEL_JOB_NGPU_HARDWARE_DTYPE; `debug` runs anywhere.
"""

import re
from collections.abc import Callable

from megamoe_train.recipes import controls, deepseek_v4_flash, deepseek_v4_pro
from megamoe_train.recipes.base import Recipe, StandIn, World
from megamoe_train.recipes.debug import debug

__all__ = ["Recipe", "StandIn", "World", "find", "names", "ranks_of"]

_RECIPES: dict[str, Callable[[World], Recipe]] = {
    function.__name__: function
    for function in (
        debug,
        deepseek_v4_flash.deepseek_v4_flash_proxy_1gpu_h100_bf16,
        deepseek_v4_flash.deepseek_v4_flash_proxy_2gpu_h100_bf16,
        deepseek_v4_flash.deepseek_v4_flash_proxy_4gpu_h100_bf16,
        deepseek_v4_flash.deepseek_v4_flash_proxy_8gpu_h100_bf16,
        deepseek_v4_flash.deepseek_v4_flash_pretrain_120gpu_h100_bf16,
        deepseek_v4_flash.deepseek_v4_flash_pretrain_256gpu_h100_bf16,
        deepseek_v4_pro.deepseek_v4_pro_proxy_1gpu_h100_bf16,
        deepseek_v4_pro.deepseek_v4_pro_proxy_2gpu_h100_bf16,
        deepseek_v4_pro.deepseek_v4_pro_pretrain_1488gpu_h100_bf16,
        deepseek_v4_pro.deepseek_v4_pro_pretrain_1984gpu_h100_bf16,
        controls.qwen3_30b_a3b_pretrain_16gpu_h100_bf16,
        controls.mixtral_8x7b_pretrain_16gpu_h100_bf16,
    )
}
_DEBUG_RANKS = 2


def names() -> list[str]:
    """Names of all recipes, in the order of the table."""
    return list(_RECIPES)


def find(name: str, world: World) -> Recipe:
    """The recipe `name`, written out for `world`. Raises ValueError, which lists the recipes, for another name."""
    _check(name)
    return _RECIPES[name](world)


def ranks_of(name: str) -> int:
    """The number of GPUs in a recipe's name; 2 for `debug`. Raises ValueError for an unknown recipe."""
    _check(name)
    count = re.search(r"_(\d+)gpu_", name)
    return int(count.group(1)) if count else _DEBUG_RANKS


def _check(name: str) -> None:
    if name not in _RECIPES:
        raise ValueError(f"recipe: {name!r} is unknown; recipes are: {', '.join(_RECIPES)}")

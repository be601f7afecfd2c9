"""Whether a recipe for H100s fits the ranks it is started on, by the memory model, before anything is started."""

from collections.abc import Mapping

from megamoe_train import memory
from megamoe_train.recipes import Recipe
from megamoe_train.shapes import Layout, ModelShape, Reader

_MOST_TIMES = 64  # the smallest number of ranks is looked for among so many multiples of one model's


def check(recipe: Recipe, table: Mapping[str, list[str]], ranks: int) -> None:
    """Raises ValueError with the model's number where `ranks` ranks are too few for the settings of `table`."""
    if not recipe.for_h100:
        return
    read = Reader(table)
    if any(read.integer(name, 1) > 1 for name in ("tensor-model-parallel-size", "expert-tensor-parallel-size")):
        return  # not covered by the model; `header` says so
    unit = read.integer("expert-model-parallel-size", 1) * read.integer("pipeline-model-parallel-size", 1)
    model = ModelShape.of(table)
    if ranks < unit:
        raise ValueError(
            f"world size: {ranks} is too few for {recipe.name}: {_smallest(table, model, unit)}; one copy of the model "
            f"takes {unit} ranks"
        )
    if ranks % unit:
        return  # settings.check_shape names what does not divide
    need = memory.largest(model, Layout.of(table, ranks, model))
    if need.total > memory.USABLE_BYTES:
        raise ValueError(
            f"world size: {ranks} is too few for {recipe.name}: the memory model says "
            f"{memory.describe(model, Layout.of(table, ranks, model))}, of {memory.USABLE_BYTES / memory.GIB:.0f} "
            f"usable on an 80 GB H100; {_smallest(table, model, unit)}"
        )


def _smallest(table: Mapping[str, list[str]], model: ModelShape, unit: int) -> str:
    """The smallest number of ranks that the model says fits."""
    for times in range(1, _MOST_TIMES + 1):
        layout = Layout.of(table, times * unit, model)
        need = memory.largest(model, layout).total
        if need <= memory.USABLE_BYTES:
            return f"the smallest that fits is {times * unit} ({need / memory.GIB:.1f} GiB a GPU)"
    return "no number of ranks fits these settings"


def line(args, ranks: int) -> str:
    """The estimate in one line for the log; why there is none where the model does not cover the settings."""
    try:
        model = ModelShape.of(args)
        return f"memory model: {memory.describe(model, Layout.of(args, ranks, model))}"
    except ValueError as error:
        return f"memory model: no estimate ({error})"

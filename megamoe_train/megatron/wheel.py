"""What the megatron-core wheel needs and its git checkout does not, on any machine."""

import importlib
import importlib.util


def use_shipped_dataset_helper() -> None:
    """Keep `compile_helpers` from running `make` where the compiled helper is already there.

    `initialize_megatron` runs `make` in core/datasets; the wheel ships the compiled module but no Makefile, and the
    failure is `sys.exit(1)` (core/datasets/utils.py:20). A checkout without the compiled helper still compiles it.
    """
    if importlib.util.find_spec("megatron.core.datasets.helpers_cpp") is not None:
        importlib.import_module("megatron.core.datasets.utils").compile_helpers = lambda: None

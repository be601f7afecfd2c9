"""How fast a step was, and what it took: tokens/s, model TFLOP/s of each GPU, MFU, memory."""

from argparse import Namespace
from typing import ClassVar

import torch

from megamoe_train import flops
from megamoe_train.shapes import ModelShape

GIB = 2**30


class Speed:
    """Measures for the steps of one run. `args`: Megatron's, validated."""

    # Key of a metrics line -> name of its curve in TensorBoard and W&B.
    CURVES: ClassVar[dict[str, str]] = {
        "tokens_per_s": "tokens-per-second",
        "tflops": "tflops-per-gpu",
        "mfu": "mfu",
        "allocated_gib": "memory-allocated-gib",
        "reserved_gib": "memory-reserved-gib",
    }

    def __init__(self, args: Namespace) -> None:
        self.ranks = args.world_size
        self.device_name = torch.cuda.get_device_name() if torch.cuda.is_available() else ""
        try:
            self.model: ModelShape | None = ModelShape.of(args)
        except ValueError:  # settings that the FLOP model does not cover: no figure rather than a wrong one
            self.model = None

    def measured(self, tokens: int, seconds: float) -> dict[str, object]:
        """One step of `tokens` tokens (of all ranks) in `seconds`. Memory: the peaks of this rank so far.

        `tflops` is None where the FLOP model does not cover the model, `mfu` where the device's peak is not known.
        """
        line: dict[str, object] = {"tokens_per_s": tokens / seconds}
        tflops = None if self.model is None else flops.tflops_per_gpu(self.model, tokens, seconds, self.ranks)
        line["tflops"] = tflops
        line["mfu"] = None if tflops is None else flops.mfu(tflops, self.device_name)
        if self.device_name:
            line["allocated_gib"] = torch.cuda.max_memory_allocated() / GIB
            line["reserved_gib"] = torch.cuda.max_memory_reserved() / GIB
        return line

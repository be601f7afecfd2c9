"""How long the experts' passes of each layer take on this rank, and how much of that the arithmetic alone would.

CUDA events stand around the one call of a layer's experts, in forward and in backward: what lies between them is the
pass as training sees it, launches and waits for other ranks included. Only paired experts are timed, and only in the
steps asked for.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from megamoe_train import comm, flops
from megamoe_train.megatron.experts import MegaMoEExperts

LINK = 360e9  # bytes/s that an H100 pulls from its peers over NVLink; arithmetic takes longer from I = 350 on
ROWS = 8192  # of the products whose rate is taken
PRODUCTS = 20


@dataclass(frozen=True)
class PassTime:
    """The passes of one layer since the last reading."""

    forward_ms: float  # of one pass, on average
    backward_ms: float
    forward_overlap: float  # flops.overlap_efficiency
    backward_overlap: float


@dataclass
class _Layer:
    experts: MegaMoEExperts
    spans: dict[str, list] = field(default_factory=lambda: {"forward": [], "backward": []})  # begin, end, slots
    slots: int = 0  # (token, choice) pairs of the last forward


class PassTimes:
    """Hooks on all paired experts of a model. `active` says whether this step's passes are timed."""

    def __init__(
        self, model_chunks: list[torch.nn.Module], num_layers: int, rate: Callable[[int, int], float] | None = None
    ) -> None:
        """num_layers: decoder layers of the whole model, as in load.ExpertLoad. rate: of products (measured)."""
        self.active = False
        self._rate, self._rates = rate or product_rate, {}
        self._layers: dict[int, _Layer] = {}
        for chunk in model_chunks:
            for name, module in chunk.named_modules():
                if isinstance(getattr(module, "experts", None), MegaMoEExperts):
                    number = module.layer_number - 1 + (num_layers if ".mtp." in f".{name}" else 0)
                    self._watch(self._layers.setdefault(number, _Layer(module.experts)))

    def _watch(self, layer: _Layer) -> None:
        def before(what: str):
            def hook(module, *arguments) -> None:
                if self.active:
                    if what == "forward":
                        x, _, weights = arguments[0]
                        layer.slots = x.shape[0] * weights.shape[1]
                    layer.spans[what].append([_now(), None, layer.slots])

            return hook

        def after(what: str):
            def hook(*_) -> None:
                if self.active and layer.spans[what]:
                    layer.spans[what][-1][1] = _now()

            return hook

        layer.experts.register_forward_pre_hook(before("forward"))
        layer.experts.register_forward_hook(after("forward"))
        layer.experts.register_full_backward_pre_hook(before("backward"))
        layer.experts.register_full_backward_hook(after("backward"))

    def read(self) -> dict[int, PassTime]:
        """Of every layer that ran both passes; then starts again. Waits for the GPU."""
        torch.cuda.synchronize()
        found = {}
        for number, layer in self._layers.items():
            hidden, width = layer.experts.expert_weights()[1][0].shape
            ranks = comm.size_of(layer.experts.ep_group)
            times = {}
            for what, travels, work in (("forward", 1, flops.moe_forward), ("backward", 2, flops.moe_backward)):
                spans = [span for span in layer.spans[what] if span[1] is not None]
                layer.spans[what].clear()
                seconds = sum(begin.elapsed_time(end) for begin, end, _ in spans) / 1e3
                slots = sum(span[2] for span in spans)
                if seconds > 0:
                    arithmetic = work(slots, 1, hidden, width) / self._rate_of(hidden, width)
                    travel = travels * flops.moe_bytes_off_rank(slots, 1, hidden, ranks) / LINK
                    overlap = flops.overlap_efficiency(travel, arithmetic, seconds)
                    times |= {f"{what}_ms": 1e3 * seconds / len(spans), f"{what}_overlap": overlap}
            if len(times) == 4:
                found[number] = PassTime(**times)
        return found

    def _rate_of(self, hidden: int, width: int) -> float:
        if (hidden, width) not in self._rates:
            self._rates[hidden, width] = self._rate(hidden, width)
        return self._rates[hidden, width]


def _now() -> torch.cuda.Event:
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def product_rate(hidden: int, width: int) -> float:
    """FLOP/s of torch's own bf16 products of a layer's two shapes, in turn, one after another."""
    x, fc1 = (torch.randn(rows, hidden, device="cuda", dtype=torch.bfloat16) for rows in (ROWS, 2 * width))
    a, fc2 = (torch.randn(rows, width, device="cuda", dtype=torch.bfloat16) for rows in (ROWS, hidden))
    begin = None
    for number in range(PRODUCTS + 2):
        if number == 2:
            begin = _now()
        x @ fc1.t()
        a @ fc2.t()
    end = _now()
    torch.cuda.synchronize()
    return PRODUCTS * flops.moe_forward(ROWS, 1, hidden, width) / (begin.elapsed_time(end) / 1e3)

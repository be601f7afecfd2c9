"""Fused kernels of one device run one after another, in the order of their launches, on whatever streams those are.

Two of one rank at once would take each other's signals, and SMs from each other.
"""

from __future__ import annotations

import torch

_last: dict[int, tuple[int, torch.cuda.Stream | None]] = {}  # device -> raw stream of the last launch, and itself
_NOWHERE = (None, None)


class in_order:
    """Around launches on the current stream of a CUDA device: they run after those of the block before. `as`: that raw
    stream, None while it is captured.

    A captured graph is not chained: whoever replays it orders it against the calls around it.
    """

    def __init__(self, device: torch.device):
        self.device = device

    def __enter__(self) -> int | None:
        if torch.cuda.is_current_stream_capturing():
            return None
        device = self.device
        index = torch.cuda.current_device() if device.index is None else device.index
        raw = torch._C._cuda_getCurrentRawStream(index)
        last, stream = _last.get(index, (raw, None))
        if last != raw:
            torch.cuda.current_stream(device).wait_stream(stream)
        if last != raw or stream is None:
            _last[index] = raw, torch.cuda.current_stream(device)  # also where the block fails: what it launched counts
        return raw

    def __exit__(self, *_) -> None:
        pass


def unchanged_stream(index: int) -> int | None:
    """The raw current stream of device `index`, where the last launches were on it too, so that a block has nothing to
    order. None where they were not, or a graph captures it."""
    if torch.cuda.is_current_stream_capturing():
        return None
    raw = torch._C._cuda_getCurrentRawStream(index)
    return raw if _last.get(index, _NOWHERE)[0] == raw else None

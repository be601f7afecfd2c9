"""Fused kernels of one device run one after another, in the order of their launches, on whatever streams those are.

Two of one rank at once would take each other's signals, and SMs from each other.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch

_last: dict[int, tuple[torch.cuda.Event, int]] = {}  # device -> (after the last launch, its stream)


@contextlib.contextmanager
def in_order(device: torch.device) -> Iterator[None]:
    """Around launches on the current stream of a CUDA device: they run after those of the block before.

    A captured graph is not chained: whoever replays it orders it against the calls around it.
    """
    if torch.cuda.is_current_stream_capturing():
        yield
        return
    index = torch.cuda.current_device() if device.index is None else device.index
    stream = torch.cuda.current_stream(device)
    event, last_stream = _last.get(index, (None, stream.cuda_stream))
    if last_stream != stream.cuda_stream:
        stream.wait_event(event)
    try:
        yield
    finally:  # what a failed block has launched counts too
        event = event or torch.cuda.Event()
        event.record(stream)
        _last[index] = event, stream.cuda_stream

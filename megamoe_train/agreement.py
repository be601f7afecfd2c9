"""Before rows travel, the ranks of a group compare what has to be equal: a difference is one error on every rank
instead of a hang or silent nonsense, and backward learns which gradients any rank needs."""

from __future__ import annotations

import struct

import torch
import torch.distributed as dist
from torch import Tensor

from . import comm
from .checks import FLOATS
from .config import RECOMPUTE
from .reference import Need


def agree(
    x: Tensor,
    weights: Tensor,
    fc1: tuple[Tensor, ...],
    fc2: tuple[Tensor, ...],
    *,
    clamp: float | None,
    recompute: str | None,
    group: dist.ProcessGroup | None,
) -> Need:
    """The union over the ranks of what needs a gradient. Collective; raises ValueError on every rank alike."""
    wanted = [wants(tensors) for tensors in ((x,), (weights,), fc1, fc2)]
    if comm.size_of(group) == 1:
        return Need(*wanted)
    fields = {
        "gradient mode": any(wanted),
        "x dtype": FLOATS.index(x.dtype),
        "hidden size": x.shape[1],
        "intermediate size": fc2[0].shape[-1],
        "clamp": _bits(clamp),
        "recompute": RECOMPUTE.index(recompute),
    }
    mine = torch.tensor([*wanted, *fields.values()], dtype=torch.int64, device=x.device)
    everyone = comm.gather(mine, group).tolist()
    for number, name in enumerate(fields, start=len(wanted)):
        for rank, theirs in enumerate(everyone):
            if theirs[number] != everyone[0][number]:
                got, first = _show(name, theirs[number]), _show(name, everyone[0][number])
                raise ValueError(f"{name}: rank {rank} of the EP group has {got}, rank 0 has {first}; they must agree")
    return Need(*(any(theirs[i] for theirs in everyone) for i in range(len(wanted))))


def wants(tensors: tuple[Tensor, ...]) -> bool:
    """Whether autograd will ask for the gradient of any of them."""
    return torch.is_grad_enabled() and (tensors[0].requires_grad or any(tensor.requires_grad for tensor in tensors))


def _bits(clamp: float | None) -> int:
    """The number's bits as an int64; 0 for None (a clamp is never 0.0)."""
    return 0 if clamp is None else struct.unpack("<q", struct.pack("<d", clamp))[0]


def _show(name: str, value: int) -> object:
    """The reverse of what `agree` sends, for its message."""
    if name == "gradient mode":
        return "on (it will call backward)" if value else "off (no input needs a gradient, or no_grad)"
    if name == "x dtype":
        return FLOATS[value]
    if name == "clamp":
        return struct.unpack("<d", struct.pack("<q", value))[0] if value else None
    return RECOMPUTE[value] if name == "recompute" else value

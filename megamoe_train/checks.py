"""What `moe` accepts. Every error names the argument, its value and what is allowed."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

FLOATS = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


def as_tuple(name: str, weight: Tensor | Sequence[Tensor]) -> tuple[Tensor, ...]:
    """A stack `[L, a, b]` as a tuple of one, or L tensors `[a, b]` as a tuple of L. Raises ValueError for others."""
    if isinstance(weight, Tensor):
        if weight.dim() != 3 or weight.shape[0] < 1:
            raise ValueError(f"{name}: got shape {tuple(weight.shape)}; allowed: [L, rows, columns] or L tensors")
        return (weight,)
    experts = tuple(weight)
    if not experts or not all(isinstance(expert, Tensor) and expert.dim() == 2 for expert in experts):
        got = [tuple(expert.shape) if isinstance(expert, Tensor) else type(expert).__name__ for expert in experts]
        raise ValueError(f"{name}: got a sequence of {got}; allowed: one tensor [L, rows, columns] or L 2-D tensors")
    return experts


def num_experts_of(experts: tuple[Tensor, ...]) -> int:
    """L: how many local experts the tuple of `as_tuple` holds."""
    return experts[0].shape[0] if experts[0].dim() == 3 else len(experts)


def check_call(x: Tensor, topk_ids: Tensor, weights: Tensor, fc1: tuple[Tensor, ...], fc2: tuple[Tensor, ...]) -> None:
    """Shapes, dtypes and devices of one call. Raises ValueError.

    What is asked of a tensor twice is asked once and kept: an attribute makes a new object, of every expert's weight
    in every forward.
    """
    shape, dtype, device, slots = x.shape, x.dtype, x.device, topk_ids.shape
    if len(shape) != 2:
        raise ValueError(f"x: got shape {tuple(shape)}; allowed: [T, H]")
    if dtype not in FLOATS:
        raise ValueError(f"x: got dtype {dtype}; allowed: {_names(FLOATS)}")
    if len(slots) != 2 or slots[0] != shape[0]:
        raise ValueError(f"topk_ids: got shape {tuple(slots)}; allowed: [T, K] with T = {shape[0]} as in x")
    if weights.shape != slots:
        raise ValueError(f"topk_weights: got shape {tuple(weights.shape)}; allowed: that of topk_ids, {tuple(slots)}")
    allowed_dtypes = (dtype, torch.float64 if dtype == torch.float64 else torch.float32)
    if weights.dtype not in allowed_dtypes:
        raise ValueError(f"topk_weights: got dtype {weights.dtype}; allowed: {_names(allowed_dtypes)} (x is {dtype})")
    _check_experts(shape[1], dtype, device, fc1, fc2)
    for name, tensor in (("topk_ids", topk_ids), ("topk_weights", weights)):
        if tensor.device != device:
            raise ValueError(f"{name}: got device {tensor.device}; allowed: {device}, where x is")


def _check_experts(
    hidden: int, dtype: torch.dtype, device: torch.device, fc1: tuple[Tensor, ...], fc2: tuple[Tensor, ...]
) -> None:
    *_, rows, _ = fc1[0].shape
    if (got := num_experts_of(fc2)) != (wanted := num_experts_of(fc1)):
        raise ValueError(f"fc2: got {got} experts; allowed: {wanted}, as many as fc1")
    if rows % 2 or rows == 0:
        raise ValueError(f"fc1: got {rows} rows an expert; allowed: 2I, gate rows first, then up")
    for name, experts, shape in (("fc1", fc1, (rows, hidden)), ("fc2", fc2, (hidden, rows // 2))):
        size = (*experts[0].shape[:-2], *shape)
        if all([e.shape == size and e.dtype is dtype and e.device == device for e in experts]):
            continue  # every forward asks this of every expert
        for number, expert in enumerate(experts):
            label = name if expert.dim() == 3 else f"{name}[{number}]"
            if tuple(expert.shape[-2:]) != shape:
                allowed = f"{list(shape)} an expert (H = {hidden} as in x, 2I = {rows} as in fc1)"
                raise ValueError(f"{label}: got shape {tuple(expert.shape)}; allowed: {allowed}")
            if expert.dtype != dtype:
                raise ValueError(f"{label}: got dtype {expert.dtype}; allowed: {dtype}, that of x")
            if expert.device != device:
                raise ValueError(f"{label}: got device {expert.device}; allowed: {device}, where x is")


def _names(dtypes: tuple[torch.dtype, ...]) -> str:
    return ", ".join(str(dtype).removeprefix("torch.") for dtype in dict.fromkeys(dtypes))

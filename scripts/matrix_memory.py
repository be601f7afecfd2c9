"""Loads that change all the time, for the rows that watch a GPU's reserved memory."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

LOOKED_AT = (50, 500)  # steps
GROWTH = 0.02  # between them, at most; pools that follow the load would grow by half
STEEPEST = 2.0


def bias(call: int, experts: int):
    """`[E]` logarithms of a Zipf law, another exponent and another order of the experts at each call."""
    import torch

    generator = torch.Generator().manual_seed(call)
    exponent = STEEPEST * torch.rand((), generator=generator)
    place = torch.randperm(experts, generator=generator)
    return -exponent * (place + 1.0).log()


@contextlib.contextmanager
def zipf_load() -> Iterator[None]:
    """Inside, every router draws its experts by such a law, alike on all ranks, whatever it has learned."""
    import torch
    from megatron.core.transformer.moe.router import TopKRouter

    from training_faults import replaced

    calls = iter(range(1 << 40))

    def wrap(original):
        def routing(self, logits, *rest, **more):
            uniform = torch.rand(logits.shape, device=logits.device).clamp_(1e-9, 1 - 1e-6)
            noise = -(-uniform.log()).log()  # Gumbel's: the K largest sums are a draw without replacement
            law = bias(next(calls), logits.shape[-1]).to(logits.device)
            return original(self, (logits * 0 + noise + law).to(logits.dtype), *rest, **more)

        return routing

    with replaced(TopKRouter, "routing", wrap):
        yield


def reserved_bytes() -> int:
    """What torch holds of this GPU now, on the rank that holds most. Collective."""
    import torch
    import torch.distributed as dist

    most = torch.tensor(torch.cuda.memory_reserved(), device="cuda")
    dist.all_reduce(most, op=dist.ReduceOp.MAX)
    return int(most)


def is_flat(reserved: list[int]) -> bool:
    """reserved: bytes at the two steps of LOOKED_AT."""
    first, last = reserved
    return 0 < last <= first * (1 + GROWTH)

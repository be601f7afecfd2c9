"""Known faults, put around the layer for one training: a comparison that does not notice each of them proves nothing.

Nothing of this is in the product: each fault wraps a function of it, and is gone when its block ends.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

EXPERT = 1  # whose routing weights are wrong
FACTOR = 1.1
EVERY = 16  # of so many tokens, one loses an expert


@contextlib.contextmanager
def replaced(owner: object, name: str, wrap: Callable) -> Iterator[None]:
    """`owner.name` is `wrap(original)` inside the block."""
    original = getattr(owner, name)
    setattr(owner, name, wrap(original))
    try:
        yield
    finally:
        setattr(owner, name, original)


def weight() -> contextlib.AbstractContextManager:
    """The routing weights of one expert are too large by a tenth, in every layer."""
    from megamoe_train.megatron.dispatcher import MegaMoETokenDispatcher

    def wrap(original):
        def dispatch_preprocess(self, *arguments):
            import torch

            x, weights = original(self, *arguments)
            return x, torch.where(self._forward.topk_ids == EXPERT, FACTOR * weights, weights)

        return dispatch_preprocess

    return replaced(MegaMoETokenDispatcher, "dispatch_preprocess", wrap)


def slot() -> contextlib.AbstractContextManager:
    """One of the K rows of some tokens is never added to their sum."""
    from megamoe_train.megatron.dispatcher import MegaMoETokenDispatcher
    from megamoe_train.plan import DROPPED

    def wrap(original):
        def dispatch_preprocess(self, *arguments):
            found = original(self, *arguments)
            self._forward.topk_ids[::EVERY, 0] = DROPPED
            return found

        return dispatch_preprocess

    return replaced(MegaMoETokenDispatcher, "dispatch_preprocess", wrap)


def wgrad() -> contextlib.AbstractContextManager:
    """The gradient of the first expert's fc1 goes nowhere, in every layer."""
    import torch

    from megamoe_train.megatron.main_grad import MainGradSink

    def wrap(original):
        def buffer(self, weight):
            given = original(self, weight)
            first = getattr(self, "first_asked", None) is None  # a sink serves one backward, expert after expert
            self.first_asked = weight
            if first and given is None:
                raise RuntimeError("the fault `wgrad` needs gradients that are added to main_grad in fp32")
            return torch.zeros_like(given) if first else given

        return buffer

    return replaced(MainGradSink, "buffer", wrap)


def clamp() -> contextlib.AbstractContextManager:
    """The layer ignores SwiGLU's clamp. Noticed only where the clamp binds: `activation-func-clamp-value` small."""
    from megamoe_train import functional

    return replaced(functional, "moe", lambda original: lambda *x, clamp=None, **more: original(*x, **more))


FAULTS: dict[str, Callable[[], contextlib.AbstractContextManager]] = {
    "weight": weight,
    "slot": slot,
    "wgrad": wgrad,
    "clamp": clamp,
}

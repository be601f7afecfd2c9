"""The autograd twin of reference.py: the layer's formula as differentiable torch, one expert at a time, on one rank and
without a plan. Shares no code with the package: it is what the hand-written backward is checked against."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def twin(x: Tensor, ids: Tensor, weights: Tensor, fc1: Tensor, fc2: Tensor, clamp: float | None = None) -> Tensor:
    """y `[T,H]` of x `[T,H]`, ids, weights `[T,K]`, fc1 `[E,2I,H]`, fc2 `[E,H,I]`; rounds where the layer rounds."""
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    y = torch.zeros_like(x, dtype=wide)
    for k in range(ids.shape[1]):
        for e in range(fc1.shape[0]):
            tokens = (ids[:, k] == e).nonzero().flatten()
            gate, up = (x[tokens] @ fc1[e].t()).to(wide).chunk(2, dim=-1)
            if clamp is not None:
                gate, up = gate.clamp(max=clamp), up.clamp(-clamp, clamp)
            a = (weights[tokens, k, None].to(wide) * F.silu(gate) * up).to(x.dtype)
            y = y.index_add(0, tokens, (a @ fc2[e].t()).to(wide))
    return y.to(x.dtype)


def twin_with_grads(
    x: Tensor, ids: Tensor, weights: Tensor, dy: Tensor, fc1: Tensor, fc2: Tensor, clamp: float | None = None
) -> dict[str, Tensor]:
    """y and the four gradients, by autograd."""
    leaves = {"x": x, "weights": weights, "fc1": fc1, "fc2": fc2}
    leaves = {name: value.detach().clone().requires_grad_() for name, value in leaves.items()}
    y = twin(leaves["x"], ids, leaves["weights"], leaves["fc1"], leaves["fc2"], clamp)
    grads = torch.autograd.grad(y, list(leaves.values()), dy, materialize_grads=True)
    return {"y": y.detach(), **{f"d{name}": grad for name, grad in zip(leaves, grads, strict=True)}}

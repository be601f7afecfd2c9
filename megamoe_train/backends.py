"""Which implementation serves a call: "reference" is plain torch, "fused" the CUDA extension, once it registers here.

"auto" is the reference on CPU tensors and the fused kernels on CUDA tensors. It never puts CUDA tensors on the
reference by itself: it says what is missing, and that backend="reference" exists.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from . import extension, reference
from .config import BACKENDS, check_choice
from .plan import RoutingPlan


class BackendUnavailable(RuntimeError):
    """The backend asked for cannot serve these tensors; the message says what is missing and what to do."""


class Backend(Protocol):
    """The two passes, with the signatures of reference.forward and reference.backward."""

    name: str

    def forward(
        self, x: Tensor, plan: RoutingPlan, weights: Tensor, fc1: list[Tensor], fc2: list[Tensor],
        *, clamp: float | None, group: dist.ProcessGroup | None,
    ) -> tuple[Tensor, Tensor]: ...  # fmt: skip

    def backward(
        self, dy: Tensor, x: Tensor, h: Tensor | None, plan: RoutingPlan, weights: Tensor,
        fc1: list[Tensor], fc2: list[Tensor], *, clamp: float | None, group: dist.ProcessGroup | None,
        need: reference.Need, dfc1: list[Tensor | None] | None, dfc2: list[Tensor | None] | None,
    ) -> reference.Grads: ...  # fmt: skip


class ReferenceBackend:
    """reference.py, looked up at each call."""

    name = "reference"

    def forward(self, *args, **kwargs) -> tuple[Tensor, Tensor]:
        return reference.forward(*args, **kwargs)

    def backward(self, *args, **kwargs) -> reference.Grads:
        return reference.backward(*args, **kwargs)


_BACKENDS: dict[str, Backend] = {"reference": ReferenceBackend()}


@dataclass(frozen=True)
class Choice:
    """The outcome for one kind of device: `name` is None where nothing can serve it, and `why` says why either way."""

    name: str | None
    why: str


def register(backend: Backend) -> None:
    """Makes a backend available under its name; the CUDA extension's loader calls it with the fused one."""
    check_choice("backend name", backend.name, BACKENDS[1:])
    _BACKENDS[backend.name] = backend


def get(name: str) -> Backend:
    """The backend object that `resolve` named."""
    return _BACKENDS[name]


def choose(backend: str, device_type: str) -> Choice:
    """What `backend` means for tensors of a device type ("cpu", "cuda", ...), without raising."""
    if backend == "reference":
        return Choice("reference", 'backend="reference" was asked for')
    if device_type != "cuda":
        if backend == "auto":
            return Choice("reference", f'"auto" on {device_type} tensors is the plain torch reference')
        return Choice(
            None, f'backend="fused" runs on CUDA tensors, not on {device_type}; use backend="reference" there'
        )
    if "fused" in _BACKENDS:
        return Choice("fused", "the CUDA extension is loaded and serves CUDA tensors")
    advice = '`python -m megamoe_train.doctor` shows more; backend="reference" (plain torch, slow) runs if asked for'
    return Choice(None, f'backend="{backend}" on CUDA tensors: {extension.fused_missing()}; {advice}')


def resolve(backend: str, *tensors: Tensor) -> str:
    """Name of the backend that serves `tensors`. Raises ValueError for an unknown name, BackendUnavailable else."""
    check_choice("backend", backend, BACKENDS)
    device_type = tensors[0].device.type if tensors else ("cuda" if torch.cuda.is_available() else "cpu")
    choice = choose(backend, device_type)
    if choice.name is None:
        raise BackendUnavailable(choice.why)
    return choice.name

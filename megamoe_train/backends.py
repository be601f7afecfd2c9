"""Which implementation serves a call: "reference" is plain torch, "fused" the CUDA extension, once it registers here.

"auto" is the reference on CPU tensors and the fused kernels on CUDA tensors. It never puts CUDA tensors on the
reference by itself: it says what is missing, and that backend="reference" exists.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
import torch.distributed as dist
from torch import Tensor

from . import agreement, extension, ops, reference
from .config import BACKENDS, check_choice
from .plan import RoutingPlan, build_plan


class BackendUnavailable(RuntimeError):
    """The backend asked for cannot serve these tensors; the message says what is missing and what to do."""


@runtime_checkable
class Plan(Protocol):
    """A routing as a backend planned it: plan.RoutingPlan or fused_plan.FusedPlan."""

    rank: int
    ep_size: int
    num_experts: int
    num_tokens: int
    top_k: int
    topk_ids: Tensor  # [T, K]

    def to_routing_plan(self) -> RoutingPlan: ...


class Backend(Protocol):
    """One call: `check`, then `plan` or `accept`, then `need`, `forward` and, for every forward, `backward`."""

    name: str
    backward_once: bool  # a second backward of one forward is refused
    writes_bf16: bool  # fresh weight gradients may be asked for in bf16; else fp32 ones are rounded

    def check(
        self, x: Tensor, topk_ids: Tensor, weights: Tensor, fc1: tuple[Tensor, ...], fc2: tuple[Tensor, ...],
        *, clamp: float | None,
    ) -> None: ...  # fmt: skip

    def plan(
        self, topk_ids: Tensor, num_experts: int, group: dist.ProcessGroup | None, workspace: object | None,
        *, hidden_size: int,
    ) -> Plan: ...  # fmt: skip

    def accept(
        self, plan: object, topk_ids: Tensor, num_experts: int, group: dist.ProcessGroup | None,
        workspace: object | None, *, hidden_size: int,
    ) -> Plan: ...  # fmt: skip

    def need(
        self, x: Tensor, weights: Tensor, fc1: tuple[Tensor, ...], fc2: tuple[Tensor, ...],
        *, clamp: float | None, recompute: str | None, group: dist.ProcessGroup | None,
    ) -> reference.Need: ...  # fmt: skip

    def forward(
        self, x: Tensor, plan: Plan, weights: Tensor, fc1: list[Tensor], fc2: list[Tensor],
        *, clamp: float | None, group: dist.ProcessGroup | None,
    ) -> tuple[Tensor, Tensor]: ...  # fmt: skip

    def backward(
        self, dy: Tensor, x: Tensor, h: Tensor | None, plan: Plan, weights: Tensor,
        fc1: list[Tensor], fc2: list[Tensor], *, clamp: float | None, group: dist.ProcessGroup | None,
        need: reference.Need, dfc1: list[Tensor | None] | None, dfc2: list[Tensor | None] | None,
        overwrite: tuple[bool, bool],
    ) -> reference.Grads: ...  # fmt: skip


class ReferenceBackend:
    """reference.py, looked up at each call; the ranks compare by collectives what has to be equal."""

    name = "reference"
    backward_once = False
    writes_bf16 = False

    def check(self, x: Tensor, *_, clamp: float | None) -> None:
        """It takes whatever checks.check_call takes."""

    def plan(self, topk_ids, num_experts, group, workspace, *, hidden_size: int) -> RoutingPlan:
        self._no(workspace)
        return build_plan(topk_ids, num_experts, group=group)

    def accept(self, plan, topk_ids, num_experts, group, workspace, *, hidden_size: int) -> RoutingPlan:
        """A plan that the caller has; one of the fused backend is read from the device."""
        self._no(workspace)
        return plan if isinstance(plan, RoutingPlan) else plan.to_routing_plan()

    def need(self, *args, **kwargs) -> reference.Need:
        return agreement.agree(*args, **kwargs)

    def forward(self, *args, **kwargs) -> tuple[Tensor, Tensor]:
        return reference.forward(*args, **kwargs)

    def backward(self, *args, **kwargs) -> reference.Grads:
        return reference.backward(*args, **kwargs)

    @staticmethod
    def _no(workspace: object | None) -> None:
        if workspace is not None:
            raise ValueError(f"workspace: got {type(workspace).__name__}; allowed: None with the reference backend")


_BACKENDS: dict[str, Backend] = {"reference": ReferenceBackend()}


@dataclass(frozen=True)
class Choice:
    """The outcome for one kind of device: `name` is None where nothing can serve it, and `why` says why either way."""

    name: str | None
    why: str


_FUSED = Choice("fused", "the CUDA extension is loaded and serves CUDA tensors")


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
    if "fused" in _BACKENDS or _load_fused():
        return _FUSED
    advice = '`python -m megamoe_train.doctor` shows more; backend="reference" (plain torch, slow) runs if asked for'
    return Choice(None, f'backend="{backend}" on CUDA tensors: {extension.fused_missing()}; {advice}')


def _load_fused() -> bool:
    """Registers the fused backend where the extension is built with its kernels and a CUDA device is there."""
    if not extension.built_files() or not torch.cuda.is_available():
        return False
    ops.load()
    if not hasattr(torch.ops.megamoe, "fused_forward"):
        return False
    from .fused import FusedBackend  # here: few processes need it, and it needs the extension

    register(FusedBackend())
    return True


def resolve(backend: str, *tensors: Tensor) -> str:
    """Name of the backend that serves `tensors`. Raises ValueError for an unknown name, BackendUnavailable else."""
    check_choice("backend", backend, BACKENDS)
    device_type = tensors[0].device.type if tensors else ("cuda" if torch.cuda.is_available() else "cpu")
    choice = choose(backend, device_type)
    if choice.name is None:
        raise BackendUnavailable(choice.why)
    return choice.name

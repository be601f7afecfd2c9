"""MegaMoE: the experts of one MoE layer as an nn.Module. The router is the caller's."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn

from . import backends, comm
from .config import MegaMoEConfig
from .functional import moe
from .ops import DEFAULT_DEADLINE_S
from .workspace import Shape, Workspace


class MegaMoE(nn.Module):
    """Owns this rank's expert weights and calls `moe`.

    Parameters: `fc1 [L, 2I, H]` (gate rows first, then up) and `fc2 [L, H, I]`. They belong to this rank: a
    data-parallel wrapper must not average them over the expert-parallel group.

    Initialised from N(0, 1/fan_in), each expert from its own seed, drawn from torch's default generator and the global
    expert number: with equal seeds on all ranks, expert e starts equal whatever the size of the group.

    tokens: the most tokens a rank brings to one call. On CUDA with the fused backend, a group meets in a `Workspace` of
    that size here (collective, so that no forward has to), which `close()` gives back; one rank makes its own if
    `tokens` is given, and else takes a shared one. Nothing else reads it. deadline_s: seconds that a wait in a kernel
    may last.

    Raises ValueError where the config is not allowed, its ep_size is not the size of `group`, or `tokens` is missing.
    """

    def __init__(
        self,
        config: MegaMoEConfig,
        group: dist.ProcessGroup | None = None,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        tokens: int | None = None,
        deadline_s: float = DEFAULT_DEADLINE_S,
    ):
        super().__init__()
        config.validate()
        if config.ep_size != comm.size_of(group):
            allowed = f"{comm.size_of(group)}, the size of the given group (None: 1)"
            raise ValueError(f"ep_size: got {config.ep_size}; allowed: {allowed}")
        self.config, self.group = config, group
        experts, hidden, inner = config.num_local_experts, config.hidden_size, config.intermediate_size
        self.fc1 = nn.Parameter(torch.empty(experts, 2 * inner, hidden, device=device, dtype=dtype))
        self.fc2 = nn.Parameter(torch.empty(experts, hidden, inner, device=device, dtype=dtype))
        self.reset_parameters()
        self.workspace = self._make_workspace(tokens, deadline_s)

    def _make_workspace(self, tokens: int | None, deadline_s: float) -> Workspace | None:
        config, device = self.config, self.fc1.device
        if backends.choose(config.backend, device.type).name != "fused":
            return None
        if tokens is None and config.ep_size > 1:
            raise ValueError("tokens: got None; allowed: the most tokens a rank brings to one call, for the workspace")
        if tokens is None:
            return None
        shape = Shape.of(config, tokens)
        return Workspace.create(shape, group=self.group, device=device, deadline_s=deadline_s)

    def close(self) -> None:
        """Gives the workspace back, if there is one. Collective over the group; no forward or backward may follow."""
        if self.workspace is not None:
            self.workspace.close()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draws one number from torch's default generator, then fills both weights (see the class)."""
        seed = int(torch.randint(2**40, ()))
        first = comm.rank_in(self.group) * self.config.num_local_experts
        for e in range(self.config.num_local_experts):
            generator = torch.Generator().manual_seed(seed + first + e)
            for weight in (self.fc1[e], self.fc2[e]):
                values = torch.randn(weight.shape, generator=generator) * weight.shape[1] ** -0.5
                weight.copy_(values)

    def forward(self, x: Tensor, topk_ids: Tensor, topk_weights: Tensor) -> Tensor:
        """x `[T,H]`, topk_ids `[T,K]` int (-1 = dropped), topk_weights `[T,K]` -> y `[T,H]`. See `moe`."""
        config = self.config
        for name, tensor, width in (("x", x, config.hidden_size), ("topk_ids", topk_ids, config.top_k)):
            if tensor.dim() != 2 or tensor.shape[1] != width:
                raise ValueError(f"{name}: got shape {tuple(tensor.shape)}; allowed: [T, {width}], as in the config")
        return moe(
            x, topk_ids, topk_weights, self.fc1, self.fc2, clamp=config.clamp, group=self.group,
            workspace=self.workspace, backend=config.backend, recompute=config.recompute,
        )  # fmt: skip

    def extra_repr(self) -> str:
        return str(self.config)

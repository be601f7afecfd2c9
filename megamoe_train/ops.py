"""The CUDA extension's operators: loading, tensor maps and the six grouped products. No policy.

Legend of shapes: L local experts, M rows of a row pool (every expert's segment starts at a multiple of ROW_TILE),
H hidden size, I expert intermediate size. Activations and weights are bf16, weight gradients fp32, or bf16 where they
are written once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from functools import cache

import torch
from torch import Tensor

from . import extension

ROW_TILE = 128
MAP_BYTES, ADDRESS_BYTES = 128, 8  # of a tensor map; of what it describes
DEFAULT_DEADLINE_S = 600.0


class Gemm(IntEnum):
    """csrc/schedule/ring.cuh: enum class Gemm."""

    FC1 = 0
    FC2 = 1
    DGRAD2 = 2
    DGRAD1 = 3
    WGRAD = 4
    WGRAD_BF16 = 5  # written, not added to


class MapKind(IntEnum):
    """csrc/host/tensor_map.hpp: enum class MapKind; the kinds that describe per-expert matrices."""

    WEIGHT = 1  # right operand of fc1 and fc2
    WEIGHT_MN = 2  # right operand of dgrad1 and dgrad2
    GRADIENT_BF16 = 4  # result of a wgrad in bf16: kOutput
    GRADIENT = 5  # in fp32


def raw_stream(device: torch.device) -> int:
    """cudaStream_t of the current stream. Calls are short of host time: a Stream object costs ten times as much."""
    index = torch.cuda.current_device() if device.index is None else device.index
    return torch._C._cuda_getCurrentRawStream(index)


def pinned_bytes(*size: int) -> Tensor:
    """uint8 on the host, from where a copy to the GPU is asynchronous."""
    return torch.empty(*size, dtype=torch.uint8, pin_memory=True)


@cache
def load() -> None:
    """Loads the extension into torch once. RuntimeError where it is not built."""
    files = extension.built_files()
    if len(files) != 1:
        raise RuntimeError(f"the CUDA extension cannot be loaded: {extension.fused_missing()}")
    torch.ops.load_library(str(files[0]))


def ask(operator, *numbers: int, answers: int) -> list[int]:
    """What an operator that computes on the host writes into its last argument."""
    out = torch.empty(answers, dtype=torch.int64, device="cpu")
    operator(*numbers, out)
    return out.tolist()


def expert_maps(matrices: Sequence[Tensor], kind: MapKind) -> Tensor:
    """Tensor maps of one matrix per expert, wherever each lies.

    matrices: L tensors of one shape [rows, cols] on one CUDA device, contiguous, 16-byte aligned; bf16, or fp32 for
    MapKind.GRADIENT.
    Returns uint8 [L, 128] on that device. Valid as long as the matrices stay where they are.
    """
    table = pinned_bytes(len(matrices), MAP_BYTES)
    encode_maps(matrices, kind, table)
    return table.to(matrices[0].device)


def encode_maps(matrices: Sequence[Tensor], kind: MapKind, out: Tensor) -> None:
    """The same into `out`, uint8 [L, 128] on the CPU."""
    load()
    check_matrices(matrices, torch.float32 if kind == MapKind.GRADIENT else torch.bfloat16)
    rows, cols = matrices[0].shape
    torch.ops.megamoe.encode_maps(addresses(matrices), rows, cols, int(kind), out)


@dataclass(frozen=True)
class GradientTable:
    """Where the gradients of a layer lie. Valid as long as they stay there."""

    table: Tensor  # uint8 [L * 136] on the device: L tensor maps, then L addresses
    in_bf16: bool  # else fp32

    @classmethod
    def of(cls, gradients: Sequence[Tensor]) -> GradientTable:
        """gradients: L tensors [out, in] on one CUDA device, wherever each lies; contiguous, 16-byte aligned, all fp32
        or all bf16."""
        in_bf16 = gradients[0].dtype == torch.bfloat16
        end = len(gradients) * MAP_BYTES
        table = pinned_bytes(end + len(gradients) * ADDRESS_BYTES)
        encode_maps(gradients, MapKind.GRADIENT_BF16 if in_bf16 else MapKind.GRADIENT, table[:end].view(-1, MAP_BYTES))
        table[end:].view(torch.int64).copy_(addresses(gradients))
        return cls(table.to(gradients[0].device), in_bf16)

    @property
    def experts(self) -> int:
        return len(self.table) // (MAP_BYTES + ADDRESS_BYTES)

    @property
    def maps(self) -> Tensor:
        """uint8 [L, 128]"""
        return self.table[: self.experts * MAP_BYTES].view(-1, MAP_BYTES)

    @property
    def addresses(self) -> Tensor:
        """int64 [L]"""
        return self.table[self.experts * MAP_BYTES :].view(torch.int64)


def addresses(tensors: Sequence[Tensor]) -> Tensor:
    return torch.tensor([tensor.data_ptr() for tensor in tensors], dtype=torch.int64)


def check_matrices(matrices: Sequence[Tensor], dtype: torch.dtype) -> None:
    """ValueError naming the first expert whose matrix the kernels cannot take."""
    shape = matrices[0].shape
    for index, matrix in enumerate(matrices):
        if matrix.dtype != dtype or matrix.shape != shape or not matrix.is_contiguous() or matrix.data_ptr() % 16:
            raise ValueError(
                f"matrix of expert {index}: {matrix.dtype} {tuple(matrix.shape)}, contiguous={matrix.is_contiguous()},"
                f" address {matrix.data_ptr():#x}; allowed: contiguous {dtype} {tuple(shape)}, 16-byte aligned"
            )


@dataclass(frozen=True)
class Groups:
    """How the rows of a pool belong to experts, and how a product is launched."""

    rows: Tensor  # [L] int32 on the device: rows of each expert
    offset: Tensor  # [L] int32 on the device: first row of each expert, a multiple of ROW_TILE
    num_sms: int = 0  # SMs to use; 0: all
    deadline_s: float = DEFAULT_DEADLINE_S

    @classmethod
    def of(cls, rows: Sequence[int], device: torch.device | str, **launch) -> tuple[Groups, int]:
        """Groups for the given row counts, and the rows of their pool with its padding."""
        counts = torch.tensor(list(rows), dtype=torch.int32)
        padded = (counts + ROW_TILE - 1) // ROW_TILE * ROW_TILE
        offset = torch.cumsum(padded, 0, dtype=torch.int32) - padded
        return cls(counts.to(device), offset.to(device), **launch), int(padded.sum())


def _launch(gemm, groups, a, maps, *, b=None, h=None, out=None, act=None, row_weights=None, dp_partials=None,
            gradients=None, m=0, n=0, k=0, clamp=None, accumulate=False):  # fmt: skip
    claims = torch.empty(1, dtype=torch.int32, device=a.device)
    torch.ops.megamoe.grouped_gemm(
        int(gemm), a, b, h, out, act, maps, gradients, groups.rows, groups.offset, row_weights, dp_partials, claims,
        m, n, k, float("inf") if clamp is None else float(clamp), accumulate, groups.num_sms,
        int(groups.deadline_s * 1e9), 0,
        raw_stream(a.device),
    )  # fmt: skip


def fc1(x: Tensor, maps: Tensor, groups: Groups, row_weights: Tensor, h: Tensor, act: Tensor, clamp=None) -> None:
    """h = x fc1^T (bf16), act = p silu(g') u' from the rounded h.

    x [M, H], maps of fc1 (MapKind.WEIGHT, [2I, H]), row_weights p [M] fp32, h [M, 2I] and act [M, I] written.
    """
    _launch(Gemm.FC1, groups, x, maps, out=h, act=act, row_weights=row_weights, n=act.shape[1], k=x.shape[1],
            clamp=clamp)  # fmt: skip


def fc2(act: Tensor, maps: Tensor, groups: Groups, y: Tensor) -> None:
    """y = act fc2^T. act [M, I], maps of fc2 (MapKind.WEIGHT, [H, I]), y [M, H] written."""
    _launch(Gemm.FC2, groups, act, maps, out=y, n=y.shape[1], k=act.shape[1])


def dgrad2(dy: Tensor, maps: Tensor, groups: Groups, h: Tensor, row_weights: Tensor, dh: Tensor, act: Tensor,
           dp_partials: Tensor, clamp=None) -> None:  # fmt: skip
    """da_bar = dy fc2, then dSwiGLU: dh, act again, and each row's <da_bar, silu(g')u'> in parts.

    dy [M, H], maps of fc2 (MapKind.WEIGHT_MN, [H, I]), h [M, 2I]; written: dh [M, 2I], act [M, I],
    dp_partials [M, ceil(I / 256)] fp32, to be summed in ascending order.
    """
    _launch(Gemm.DGRAD2, groups, dy, maps, h=h, out=dh, act=act, row_weights=row_weights, dp_partials=dp_partials,
            n=act.shape[1], k=dy.shape[1], clamp=clamp)  # fmt: skip


def dgrad1(dh: Tensor, maps: Tensor, groups: Groups, dx: Tensor) -> None:
    """dx = dh fc1. dh [M, 2I], maps of fc1 (MapKind.WEIGHT_MN, [2I, H]), dx [M, H] written."""
    _launch(Gemm.DGRAD1, groups, dh, maps, out=dx, n=dx.shape[1], k=dh.shape[1])


def wgrad(dout: Tensor, inputs: Tensor, table: GradientTable, groups: Groups, accumulate: bool = True) -> None:
    """gradient (+)= dout_rows^T inputs_rows for every expert, in fp32; written in bf16 only (RuntimeError).

    dout [M, out], inputs [M, in]; table: the gradients [out, in]. Rows between an expert's count
    and the next multiple of 64 must be zero in both.
    """
    _launch(
        Gemm.WGRAD_BF16 if table.in_bf16 else Gemm.WGRAD,
        groups,
        dout,
        table.maps,
        gradients=table.addresses,
        b=inputs,
        m=dout.shape[1],
        n=inputs.shape[1],
        accumulate=accumulate,
    )

"""The elementwise steps of the unfused composition, one Triton kernel each: a pass over the data, no temporary."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 1024


@triton.jit
def _swiglu(h, p, a, inter, limit, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < inter
    gate = tl.load(h + row * 2 * inter + column, mask=inside, other=0).to(tl.float32)
    up = tl.load(h + row * 2 * inter + inter + column, mask=inside, other=0).to(tl.float32)
    gate = tl.minimum(gate, limit)
    up = tl.minimum(tl.maximum(up, -limit), limit)
    value = tl.load(p + row) * gate * tl.sigmoid(gate) * up
    tl.store(a + row * inter + column, value.to(a.dtype.element_ty), mask=inside)


@triton.jit
def _swiglu_backward(da_bar, h, p, dh, dp, inter: tl.constexpr, limit, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    weight = tl.load(p + row)
    product = tl.zeros([BLOCK], tl.float32)
    for first in range(0, inter, BLOCK):
        column = first + tl.arange(0, BLOCK)
        inside = column < inter
        g = tl.load(h + row * 2 * inter + column, mask=inside, other=0).to(tl.float32)
        u = tl.load(h + row * 2 * inter + inter + column, mask=inside, other=0).to(tl.float32)
        bar = tl.load(da_bar + row * inter + column, mask=inside, other=0).to(tl.float32)
        gate = tl.minimum(g, limit)
        up = tl.minimum(tl.maximum(u, -limit), limit)
        sigmoid = tl.sigmoid(gate)
        silu = gate * sigmoid
        product += bar * silu * up
        da = weight * bar
        dg = tl.where(g <= limit, da * up * (sigmoid + silu * (1 - sigmoid)), 0.0)
        du = tl.where(tl.abs(u) <= limit, da * silu, 0.0)
        tl.store(dh + row * 2 * inter + column, dg.to(dh.dtype.element_ty), mask=inside)
        tl.store(dh + row * 2 * inter + inter + column, du.to(dh.dtype.element_ty), mask=inside)
    tl.store(dp + row, tl.sum(product, 0))


@triton.jit
def _gather_sum(rows, row_of, y, hidden, K: tl.constexpr, BLOCK: tl.constexpr):
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < hidden
    total = tl.zeros([BLOCK], tl.float32)
    for k in range(K):
        row = tl.load(row_of + token * K + k)
        total += tl.load(rows + row * hidden + column, mask=inside, other=0).to(tl.float32)
    tl.store(y + token * hidden + column, total.to(y.dtype.element_ty), mask=inside)


def _blocks(columns: int) -> int:
    return triton.cdiv(columns, BLOCK)


def swiglu(h: Tensor, p: Tensor, clamp: float | None) -> Tensor:
    """a `[M, I]` = p * silu(g') * u' of h `[M, 2I]` and p `[M]` fp32."""
    rows, inter = h.shape[0], h.shape[1] // 2
    a = h.new_empty(rows, inter)
    if rows:
        _swiglu[(rows, _blocks(inter))](h, p, a, inter, _limit(clamp), BLOCK)
    return a


def swiglu_backward(da_bar: Tensor, h: Tensor, p: Tensor, clamp: float | None) -> tuple[Tensor, Tensor]:
    """dh `[M, 2I]` and dp `[M]` fp32 of da_bar `[M, I]`, the gradient with respect to a / p."""
    dh, dp = torch.empty_like(h), torch.empty_like(p)
    if h.shape[0]:
        _swiglu_backward[(h.shape[0],)](da_bar, h, p, dh, dp, h.shape[1] // 2, _limit(clamp), BLOCK)
    return dh, dp


def gather_sum(rows: Tensor, row_of: Tensor) -> Tensor:
    """y `[T, H]`, the sum over k of rows `[N, H]` at row_of `[T, K]`, in fp32, rounded once."""
    tokens, top_k = row_of.shape
    y = rows.new_empty(tokens, rows.shape[1])
    if tokens:
        _gather_sum[(tokens, _blocks(rows.shape[1]))](rows, row_of, y, rows.shape[1], top_k, BLOCK)
    return y


def _limit(clamp: float | None) -> float:
    return float("inf") if clamp is None else clamp

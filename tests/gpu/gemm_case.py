"""Inputs, fp64 oracle and the plain bf16 computation for the grouped products."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from megamoe_train import ops


def swiglu64(h: Tensor, p: Tensor, clamp: float | None, da_bar: Tensor | None = None):
    """a from h [rows, 2I] in h's dtype; with da_bar also (dh, dp). DESIGN section 2, written out."""
    g, u = h.chunk(2, dim=-1)
    limit = float("inf") if clamp is None else clamp
    gc = torch.where(g > limit, torch.full_like(g, limit), g)
    uc = torch.where(u > limit, torch.full_like(u, limit), torch.where(u < -limit, torch.full_like(u, -limit), u))
    sig = torch.sigmoid(gc)
    silu = gc * sig
    act = p[:, None] * silu * uc
    if da_bar is None:
        return act
    da = p[:, None] * da_bar
    dg = da * uc * (sig + silu * (1 - sig)) * ~(g > limit)
    du = da * silu * ~(u.abs() > limit)
    return act, torch.cat([dg, du], -1), (da_bar * silu * uc).sum(-1)


def product64(left: Tensor, right: Tensor) -> Tensor:
    return left.double() @ right.double()


def plain_product(left: Tensor, right: Tensor) -> Tensor:
    """The tensor cores' own arithmetic: bf16 operands, fp32 accumulators and result."""
    return torch.mm(left, right, out_dtype=torch.float32) if left.is_cuda else left.float() @ right.float()


@dataclass
class Case:
    """One layer's pools. Rows between an expert's count and its padding are zero in the inputs."""

    rows: list[int]
    hidden: int
    inter: int
    clamp: float | None = None
    scale: float = 1.0
    seed: int = 0
    num_sms: int = 0
    device: str = "cuda"
    groups: ops.Groups = field(init=False)
    pool_rows: int = field(init=False)

    def __post_init__(self):
        gen = torch.Generator(self.device).manual_seed(self.seed)
        self.groups, self.pool_rows = ops.Groups.of(self.rows, self.device, num_sms=self.num_sms, deadline_s=4.0)
        count, hidden, inter = len(self.rows), self.hidden, self.inter

        def normal(*shape, std=1.0):
            return (torch.randn(*shape, device=self.device, generator=gen) * std).bfloat16()

        mask = torch.zeros(self.pool_rows, 1, dtype=torch.bfloat16, device=self.device)
        for begin, rows in self.segments():
            mask[begin : begin + rows] = 1
        self.x = normal(self.pool_rows, hidden) * mask
        self.dy = normal(self.pool_rows, hidden) * mask
        self.fc1 = [normal(2 * inter, hidden, std=self.scale * hidden**-0.5) for _ in range(count)]
        self.fc2 = [normal(hidden, inter, std=inter**-0.5) for _ in range(count)]
        self.p = torch.rand(self.pool_rows, device=self.device, generator=gen)

    def segments(self):
        begin = 0
        for rows in self.rows:
            yield begin, rows
            begin += (rows + ops.ROW_TILE - 1) // ops.ROW_TILE * ops.ROW_TILE

    def poisoned(self, *shape, dtype=torch.bfloat16) -> Tensor:
        return torch.full(shape, float("nan"), dtype=dtype, device=self.device)

    def run_kernels(self, accumulate: bool = True, gradients: torch.dtype = torch.float32) -> dict[str, Tensor]:
        """All six products, each on the result of the one before; outputs poisoned first, but for gradients that are
        added to: they are 1."""
        M, H, I = self.pool_rows, self.hidden, self.inter  # noqa: E741
        kinds, g = ops.MapKind, self.groups
        out = {"h": self.poisoned(M, 2 * I), "a": self.poisoned(M, I), "y": self.poisoned(M, H)}
        out |= {"dh": self.poisoned(M, 2 * I), "a2": self.poisoned(M, I), "dx": self.poisoned(M, H)}
        partials = self.poisoned(M, -(-I // 256), dtype=torch.float32)
        fill = torch.ones if accumulate else self.poisoned
        kw = {"device": self.device} if accumulate else {}
        out["dfc1"] = fill(len(self.rows), 2 * I, H, dtype=gradients, **kw)
        out["dfc2"] = fill(len(self.rows), H, I, dtype=gradients, **kw)
        ops.fc1(self.x, ops.expert_maps(self.fc1, kinds.WEIGHT), g, self.p, out["h"], out["a"], self.clamp)
        ops.fc2(out["a"], ops.expert_maps(self.fc2, kinds.WEIGHT), g, out["y"])
        ops.dgrad2(self.dy, ops.expert_maps(self.fc2, kinds.WEIGHT_MN), g, out["h"], self.p, out["dh"], out["a2"],
                   partials, self.clamp)  # fmt: skip
        ops.dgrad1(out["dh"], ops.expert_maps(self.fc1, kinds.WEIGHT_MN), g, out["dx"])
        ops.wgrad(out["dh"], self.x, ops.GradientTable.of(list(out["dfc1"])), g, accumulate)
        ops.wgrad(self.dy, out["a"], ops.GradientTable.of(list(out["dfc2"])), g, accumulate)
        out["dp"] = partials.sum(-1)
        return out

    def oracle(self, expert: int, ours: dict[str, Tensor], accumulate: bool = True, product=product64):
        """Each product of one expert from the inputs our kernel had (ours' h, a, dh), by `product`, unrounded."""
        begin, rows = list(self.segments())[expert]
        tile = slice(begin, begin + -(-rows // ops.ROW_TILE) * ops.ROW_TILE)  # a single row is no matrix to torch
        part = slice(begin, begin + rows)

        def by_row(left: Tensor, right: Tensor) -> Tensor:
            return product(left[tile], right)[:rows]

        x, dy, a, dh = self.x[part], self.dy[part], ours["a"][part], ours["dh"][part]
        fc1, fc2, base = self.fc1[expert], self.fc2[expert], 1.0 if accumulate else 0.0
        da = by_row(self.dy, fc2)
        act, dh_wanted, dp = swiglu64(ours["h"][part].to(da.dtype), self.p[part].to(da.dtype), self.clamp, da)
        return {
            "h": by_row(self.x, fc1.t()), "a": act, "y": by_row(ours["a"], fc2.t()), "dh": dh_wanted, "a2": act,
            "dp": dp, "dx": by_row(ours["dh"], fc1),
            "dfc1": base + product(dh.t(), x), "dfc2": base + product(dy.t(), a),
        }  # fmt: skip

    def ours_of(self, expert: int, ours: dict[str, Tensor]) -> dict[str, Tensor]:
        begin, rows = list(self.segments())[expert]
        return {k: v[expert] if k.startswith("dfc") else v[begin : begin + rows] for k, v in ours.items()}


def rel(got, want):
    return ((got.double() - want.double()).norm() / want.double().norm().clamp_min(1e-30)).item()


def assert_close(what, got, want, plain):
    """The 2x rule of DESIGN section 8: at most twice the error of the same computation in plain torch, rounded to got's
    dtype."""
    plain, is_fp32 = plain.to(got.dtype), got.dtype == torch.float32
    assert torch.isfinite(got.double()).all(), f"{what}: not every element was written, or not finite"
    floor = 2.0**-22 if is_fp32 else 2.0**-9
    allowed = 2 * max(rel(plain, want), floor)
    assert rel(got, want) <= allowed, f"{what}: rel-L2 {rel(got, want):.3e} > {allowed:.3e}"
    ulp = want.abs().max().item() * (2.0**-22 if is_fp32 else 2.0**-8)
    worst, plain_worst = (got.double() - want).abs().max().item(), (plain.double() - want).abs().max().item()
    assert worst <= 2 * plain_worst + ulp, f"{what}: max error {worst:.3e}, plain {plain_worst:.3e}, ulp {ulp:.3e}"


def assert_products(case: Case, accumulate: bool, gradients: torch.dtype = torch.float32) -> None:
    """All six products of every expert by the 2x rule."""
    ours = case.run_kernels(accumulate, gradients)
    for expert, rows in enumerate(case.rows):
        got, want = case.ours_of(expert, ours), case.oracle(expert, ours, accumulate)
        if rows == 0:
            base = float(accumulate)
            assert (got["dfc1"] == base).all() and (got["dfc2"] == base).all()
            continue
        plain = case.oracle(expert, ours, accumulate, plain_product)
        for name, value in want.items():
            assert_close(f"expert {expert} of {case.rows[expert]} rows: {name}", got[name], value, plain[name])
        assert torch.equal(got["a"], got["a2"]), "the recomputed a differs from forward's"


def assert_wgrad(case: Case, gradients: list[Tensor]) -> None:
    """gradients: of every expert, [out, H] of ones; fp32 is added to, bf16 overwritten."""
    dout = torch.randn(case.pool_rows, len(gradients[0]), device=case.device).bfloat16() * (case.x[:, :1] != 0)
    adds = gradients[0].dtype == torch.float32
    ops.wgrad(dout, case.x, ops.GradientTable.of(gradients), case.groups, accumulate=adds)
    for gradient, (begin, rows) in zip(gradients, case.segments(), strict=True):
        part = slice(begin, begin + rows)
        assert rel(gradient, adds + dout[part].double().t() @ case.x[part].double()) < (1e-5 if adds else 2.0**-8)

"""How close is close: relative L2 errors, and the 2x rule of DESIGN section 8."""

from __future__ import annotations

import torch
from torch import Tensor


def relative_error(got: Tensor, exact: Tensor) -> float:
    """||got - exact|| / ||exact||, in fp64; 0 where both are zero, inf where a NaN or inf is in `got`."""
    difference = (got.double() - exact.double()).norm().item()
    size = exact.double().norm().item()
    if not torch.isfinite(got).all():
        return float("inf")
    return difference / size if size else (0.0 if difference == 0 else float("inf"))


def assert_close(got: Tensor, exact: Tensor, tolerance: float, name: str) -> None:
    """Relative L2 error within `tolerance`, shapes equal."""
    assert got.shape == exact.shape, f"{name}: shape {tuple(got.shape)}, expected {tuple(exact.shape)}"
    error = relative_error(got, exact)
    assert error <= tolerance, f"{name}: relative L2 error {error:.3e} > {tolerance:.1e}"


def assert_twice_as_good(got: Tensor, plain: Tensor, exact: Tensor, name: str) -> None:
    """The 2x rule for one tensor: L2 error <= 2x that of `plain` (the same computation in plain torch of the same
    dtype), max error <= 2x that + one bf16 unit in the last place of the largest element."""
    got_error, plain_error = relative_error(got, exact), relative_error(plain, exact)
    assert got_error <= 2 * plain_error, f"{name}: relative L2 error {got_error:.3e}, plain torch has {plain_error:.3e}"
    if not exact.numel():
        return
    largest = exact.abs().max().item()
    got_max = (got.double() - exact.double()).abs().max().item()
    plain_max = (plain.double() - exact.double()).abs().max().item()
    limit = 2 * plain_max + largest * torch.finfo(torch.bfloat16).eps
    assert got_max <= limit, f"{name}: max error {got_max:.3e} > {limit:.3e} (plain torch {plain_max:.3e})"

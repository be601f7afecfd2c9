"""The six grouped products on a GPU: against fp64, bitwise repeatable, independent of the SM count, any group sizes."""

from __future__ import annotations

import pytest
import torch

from megamoe_train import ops

from .gemm_case import Case, assert_products, assert_wgrad

pytestmark = pytest.mark.gpu

SHAPES = {
    "even": dict(rows=[256, 256], hidden=512, inter=256),
    "uneven": dict(rows=[1, 63, 64, 65, 127, 128, 129, 191, 193, 255, 257, 400], hidden=512, inter=256),
    "empty experts": dict(rows=[0, 300, 0, 0, 70, 0], hidden=256, inter=128),
    "odd column tiles": dict(rows=[130, 200, 40, 600], hidden=768, inter=384, clamp=1.0),
    "clamp hit": dict(rows=[500, 90], hidden=512, inter=512, clamp=2.0, scale=4.0),
    "many experts": dict(rows=[(37 * i) % 200 for i in range(96)], hidden=256, inter=128),
    "long reduction": dict(rows=[3000, 100], hidden=1024, inter=768),
}


WAYS = {"add": (True, torch.float32), "first write": (False, torch.float32), "in bf16": (False, torch.bfloat16)}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_matches_fp64(shape, way):
    assert_products(Case(**SHAPES[shape], seed=sum(map(ord, shape))), *WAYS[way])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("out", [64, 384])
def test_wgrad_of_any_number_of_rows(out, dtype):
    """An odd number of row tiles ends in a pair of column tiles."""
    gradients = torch.ones(3, out, 512, device="cuda", dtype=dtype)
    assert_wgrad(Case(rows=[100, 0, 333], hidden=512, inter=128), list(gradients))


def test_bf16_gradients_are_never_added_to():
    case = Case(rows=[100], hidden=256, inter=128)
    table = ops.GradientTable.of([torch.ones(256, 256, device="cuda", dtype=torch.bfloat16)])
    with pytest.raises(RuntimeError, match="never added to"):
        ops.wgrad(case.x, case.x, table, case.groups)


def test_bf16_gradients_are_the_fp32_ones_rounded():
    shape = SHAPES["uneven"]
    wide, narrow = (Case(**shape).run_kernels(*WAYS[way]) for way in ("first write", "in bf16"))
    for name in ("dfc1", "dfc2"):
        assert torch.equal(wide[name].bfloat16(), narrow[name])


@pytest.mark.parametrize("num_sms", [2, 14, 100])
def test_bitwise_for_any_sm_count(num_sms):
    shape = SHAPES["uneven"]
    whole, again = Case(**shape).run_kernels(), Case(**shape).run_kernels()
    part = Case(**shape, num_sms=num_sms).run_kernels()
    case = Case(**shape)
    for expert in range(len(shape["rows"])):
        first, second, third = (case.ours_of(expert, out) for out in (whole, again, part))
        for name in first:
            assert torch.equal(first[name], second[name]), f"{name} differs between two runs"
            assert torch.equal(first[name], third[name]), f"{name} differs with {num_sms} SMs"


def test_gradients_at_arbitrary_addresses():
    """wgrad adds into buffers that are views of one flat tensor, in reverse order, as Megatron's main_grad are."""
    case = Case(rows=[100, 0, 333], hidden=256, inter=128)
    flat = torch.ones(3 * 256 * 256 + 3 * 16, device="cuda")
    size = 256 * 256
    views = [flat[i * (size + 16) : i * (size + 16) + size].view(256, 256) for i in (2, 1, 0)]
    assert_wgrad(case, views)
    gaps = torch.cat([flat[i * (size + 16) + size : (i + 1) * (size + 16)] for i in range(3)])
    assert (gaps == 1).all(), "something was written between the gradients"

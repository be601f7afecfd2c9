"""What `moe` accepts and refuses on one rank."""

from __future__ import annotations

import re

import pytest
import torch

import megamoe_train
from megamoe_train.backends import BackendUnavailable
from megamoe_train.functional import moe
from megamoe_train.plan import build_plan, plans_of
from tests.twin import twin
from tests.workloads import make_layer


def arguments(**replaced):
    """x [6,32], ids [6,2], weights, fc1 [8,32,32], fc2 [8,32,16], fp32; named arguments replace parts."""
    x, ids, weights, _, fc1, fc2 = make_layer([6], dtype=torch.float32).merged()
    parts = {"x": x, "topk_ids": ids, "topk_weights": weights, "fc1": fc1, "fc2": fc2}
    return {**parts, **replaced}


def test_the_face_is_exported():
    assert megamoe_train.moe is moe
    assert megamoe_train.MegaMoEConfig(256, 128, 4, 2).num_local_experts == 4
    assert megamoe_train.build_plan is build_plan
    assert {"moe", "MegaMoE", "MegaMoEConfig", "install", "__version__"} <= set(dir(megamoe_train))
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        _ = megamoe_train.nothing


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_every_float_dtype(dtype):
    x, ids, weights, _, fc1, fc2 = make_layer([40], dtype=dtype).merged()
    y = moe(x, ids, weights, fc1, fc2, clamp=10)
    assert y.dtype == dtype
    tolerance = {torch.float64: 1e-13, torch.float32: 1e-5}.get(dtype, 2e-2)
    torch.testing.assert_close(y, twin(x, ids, weights, fc1, fc2, 10.0), rtol=tolerance, atol=tolerance)


def test_weights_may_have_the_dtype_of_x():
    x, ids, weights, dy, fc1, fc2 = make_layer([40], dtype=torch.bfloat16).merged()
    low = weights.bfloat16().requires_grad_()
    y = moe(x, ids, low, fc1, fc2)
    assert torch.equal(y, moe(x, ids, low.detach().float(), fc1, fc2))
    y.backward(dy)
    assert low.grad.dtype == torch.bfloat16 and (low.grad != 0).any()


def test_strided_inputs():
    x, ids, weights, _, fc1, fc2 = make_layer([40]).merged()
    strided = [part.transpose(-1, -2).contiguous().transpose(-1, -2) for part in (x, ids, weights, fc1, fc2)]
    torch.testing.assert_close(moe(*strided), moe(x, ids, weights, fc1, fc2), rtol=1e-13, atol=1e-13)


def test_a_plan_that_is_there_is_used():
    x, ids, weights, _, fc1, fc2 = make_layer([40]).merged()
    assert torch.equal(moe(x, ids, weights, fc1, fc2, plan=build_plan(ids, 8)), moe(x, ids, weights, fc1, fc2))
    with pytest.raises(ValueError, match=r"plan: got num_experts = 16; allowed: 8, that of this call"):
        moe(x, ids, weights, fc1, fc2, plan=build_plan(ids, 16))
    with pytest.raises(ValueError, match=r"plan: got num_tokens = 3; allowed: 40"):
        moe(x, ids, weights, fc1, fc2, plan=build_plan(ids[:3], 8))
    with pytest.raises(ValueError, match=r"plan: got ep_size = 2; allowed: 1"):
        moe(x, ids, weights, fc1, fc2, plan=plans_of([ids, ids], 8)[0])


def test_tokens_may_be_none_and_all_slots_dropped():
    for layer in (make_layer([0]), make_layer([9], routing="all_dropped")):
        x, ids, weights, dy, fc1, fc2 = layer.merged()
        leaves = [leaf.requires_grad_() for leaf in (x, weights, fc1, fc2)]
        y = moe(x, ids, weights, fc1, fc2)
        assert y.shape == x.shape and (y == 0).all()
        y.backward(dy)
        assert all(leaf.grad.shape == leaf.shape and (leaf.grad == 0).all() for leaf in leaves)


@pytest.mark.parametrize(
    ("replaced", "message"),
    [
        ({"x": torch.zeros(6, 4, 8)}, "x: got shape (6, 4, 8); allowed: [T, H]"),
        ({"x": torch.zeros(6, 32, dtype=torch.int32)}, "x: got dtype torch.int32; allowed: bfloat16, float16, float32"),
        ({"x": torch.zeros(5, 32)}, "topk_ids: got shape (6, 2); allowed: [T, K] with T = 5 as in x"),
        ({"x": torch.zeros(6, 48)}, "fc1: got shape (8, 32, 32); allowed: [32, 48] an expert (H = 48 as in x"),
        ({"x": torch.zeros(6, 32).bfloat16()}, "fc1: got dtype torch.float32; allowed: torch.bfloat16, that of x"),
        ({"topk_ids": torch.zeros(6, dtype=torch.int64)}, "topk_ids: got shape (6,); allowed: [T, K]"),
        ({"topk_ids": torch.zeros(6, 2)}, "topk_ids: got dtype torch.float32; allowed: int16, int32, int64"),
        ({"topk_ids": torch.full((6, 2), 8)}, "topk_ids: got expert 8 on rank 0; allowed: -1 (dropped) and 0..7"),
        ({"topk_ids": torch.full((6, 2), -3)}, "topk_ids: got expert -3 on rank 0"),
        ({"topk_weights": torch.zeros(6, 3)}, "topk_weights: got shape (6, 3); allowed: that of topk_ids, (6, 2)"),
        ({"topk_weights": torch.zeros(6, 2).half()}, "topk_weights: got dtype torch.float16; allowed: float32 (x is"),
        ({"fc1": torch.zeros(32, 32)}, "fc1: got shape (32, 32); allowed: [L, rows, columns] or L tensors"),
        ({"fc1": torch.zeros(8, 31, 32)}, "fc1: got 31 rows an expert; allowed: 2I, gate rows first, then up"),
        ({"fc1": [torch.zeros(32, 32)] * 3}, "fc2: got 8 experts; allowed: 3, as many as fc1"),
        ({"fc1": []}, "fc1: got a sequence of []; allowed: one tensor [L, rows, columns] or L 2-D tensors"),
        ({"fc2": [torch.zeros(32, 16)] * 7 + [torch.zeros(32, 15)]}, "fc2[7]: got shape (32, 15); allowed: [32, 16]"),
        ({"fc2": [torch.zeros(32, 16)] * 7 + [None]}, "'NoneType']; allowed: one tensor"),
        ({"fc2": torch.zeros(8, 16, 32)}, "fc2: got shape (8, 16, 32); allowed: [32, 16] an expert"),
        ({"fc2": torch.zeros(8, 32, 16, dtype=torch.float64)}, "fc2: got dtype torch.float64; allowed: torch.float32"),
        ({"fc2": torch.zeros(8, 32, 16, device="meta")}, "fc2: got device meta; allowed: cpu, where x is"),
        ({"topk_ids": torch.zeros(6, 2, dtype=torch.int64, device="meta")}, "topk_ids: got device meta; allowed: cpu"),
        ({"topk_weights": torch.zeros(6, 2, device="meta")}, "topk_weights: got device meta; allowed: cpu"),
        ({"clamp": 0.0}, "clamp: got 0.0; allowed: None (off) or a finite number > 0"),
        ({"clamp": float("nan")}, "clamp: got nan; allowed"),
        ({"recompute": "all"}, "recompute: got 'all'; allowed: None, 'fc1'"),
        ({"backend": "cuda"}, "backend: got 'cuda'; allowed: 'auto', 'fused', 'reference'"),
        ({"workspace": object()}, "workspace: got object; allowed: None with the reference backend"),
    ],
)
def test_every_refusal_names_field_value_and_what_is_allowed(replaced, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        moe(**arguments(**replaced))


def test_fused_on_cpu_tensors_is_refused():
    with pytest.raises(BackendUnavailable, match=re.escape('fused" runs on CUDA tensors, not on cpu')):
        moe(**arguments(backend="fused"))

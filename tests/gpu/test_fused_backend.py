"""`moe` on the fused kernels, one rank: gradients and sinks, order of calls, refusals."""

import re

import pytest
import torch
from torch import Tensor

from megamoe_train import Workspace, WorkspaceShape, backends
from megamoe_train.functional import moe
from tests.gpu.layer_case import Case, Layer
from tests.gpu.leaves import (
    SAME_BYTES,
    Leaves,
    MainGrads,
    assert_fresh_buffers,
    assert_plain_passes,
    assert_same,
    assert_through_autograd,
    buffers_of,
)
from tests.gpu.virtual import Load

pytestmark = [pytest.mark.gpu, pytest.mark.filterwarnings("ignore:.*deterministic:UserWarning")]
CASE = Case(Load("some_dropped", (600,), 3, 8), 512, 256, 1.0, 2.0)


# ---- numbers ---------------------------------------------------------------------------------------------------------


def test_auto_is_fused_here():
    assert backends.choose("auto", "cuda").name == "fused"


@pytest.mark.parametrize("recompute", [None, "fc1"])
def test_against_fp64_through_autograd(poisoned, recompute):
    assert_through_autograd(Layer(CASE), recompute=recompute)


@pytest.mark.parametrize("sizing", [{}, {"sizing": "fixed", "capacity": 4096}], ids=["high-water", "fixed"])
def test_the_second_step_takes_one_operator_a_pass(poisoned, sizing):
    assert_plain_passes(Leaves(Layer(CASE)))
    space = Workspace.create(WorkspaceShape(1, 8, 3, 512, 600), deadline_s=5.0, **sizing)
    assert_plain_passes(Leaves(Layer(CASE)), workspace=space)
    space.close()


def test_gradients_in_fresh_tensors(poisoned):
    layers = [Layer(Case(Load("uniform", (40,), 1, 2), h, i)) for h, i in SAME_BYTES]
    assert_fresh_buffers(layers, [None, None])


def test_recompute_gives_the_same_bits(poisoned):
    layer = Layer(CASE)
    assert_same(Leaves(layer).run(), Leaves(layer).run(recompute="fc1"))


@pytest.mark.parametrize("frozen", [("x",), ("p",), ("fc1",), ("fc2",), ("fc1", "fc2"), ("x", "p", "fc2")])
def test_frozen_inputs_change_no_other_gradient(poisoned, frozen):
    layer = Layer(CASE)
    full, part = Leaves(layer).run(), Leaves(layer, frozen).run()
    assert all(tensor.grad is None for name in frozen for tensor in part.named()[name])
    assert_same(full, part, only_present=True)


def test_micro_batches_accumulate_in_fp32(poisoned):
    """Buffers are views of one flat tensor in reverse order, as main_grad is; one of them unaligned. Sums are exact."""
    layers = [Layer(CASE, seed) for seed in range(3)]
    leaves = Leaves(layers[0])
    weights = [*leaves.fc1, *leaves.fc2]
    flat = torch.zeros(sum(w.numel() + 4 for w in weights) + 1, device="cuda")
    buffers, end = {}, flat.numel() - 1
    for number, weight in enumerate(weights):
        begin = end - weight.numel() - 4 + (number == 5)  # expert 5 of fc1 is off by four bytes
        buffers[id(weight)] = flat[begin : begin + weight.numel()].view(weight.shape)
        end -= weight.numel() + 4
    total = [torch.zeros_like(w, dtype=torch.float32) for w in weights]
    for layer in layers:
        alone = Leaves(layer)
        alone.fc1, alone.fc2 = leaves.fc1, leaves.fc2
        written = buffers_of(alone, 0.0)
        alone.run(wgrad_sink=MainGrads(written))
        total = [t + written[id(w)] for t, w in zip(total, weights, strict=True)]
        alone.run(wgrad_sink=MainGrads(buffers))
    for number, (weight, exact) in enumerate(zip(weights, total, strict=True)):
        torch.testing.assert_close(buffers[id(weight)], exact, rtol=1e-5, atol=1e-5, msg=f"weight {number}")
    assert buffers[id(weights[5])].data_ptr() % 16 != 0


def test_forwards_in_flight_and_backwards_in_any_order(poisoned):
    layers = [Layer(Case(Load("uniform", (tokens,), 2, 8), 512, 256), tokens) for tokens in (64, 700, 0, 333)]
    together, alone = [Leaves(layer) for layer in layers], [Leaves(layer).run() for layer in layers]
    for leaves in together:
        leaves.y = leaves.forward()
    for number in (0, 3, 1, 2):
        together[number].y.backward(together[number].dy)
    for one, other in zip(together, alone, strict=True):
        assert_same(one, other)


def test_calls_on_other_streams_run_in_order(poisoned):
    layer = Layer(CASE)
    expected = Leaves(layer).run()
    space = Workspace.create(WorkspaceShape(1, 8, 3, 512, 600), deadline_s=5.0)
    leaves = [Leaves(layer) for _ in range(4)]
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in leaves]
    for one, stream in zip(leaves, streams, strict=True):
        with torch.cuda.stream(stream):
            if stream is streams[0]:
                torch.cuda._sleep(20_000_000)
            one.run(workspace=space)
    torch.cuda.synchronize()
    for one in leaves:
        assert_same(one, expected)


# ---- refusals --------------------------------------------------------------------------------------------------------


def changed(leaves: Leaves, **replaced):
    arguments = {"x": leaves.x, "topk_ids": leaves.ids, "topk_weights": leaves.p, "fc1": leaves.fc1, "fc2": leaves.fc2}
    return moe(**arguments | replaced)


def unaligned(weight: Tensor) -> Tensor:
    return torch.empty(weight.numel() + 1, dtype=weight.dtype, device="cuda")[1:].view(weight.shape).copy_(weight)


def with_id(ids: Tensor, value: int) -> Tensor:
    ids = ids.clone()
    ids[400, 2] = value
    return ids


REFUSED = {
    "dtype": (lambda v: {"x": v.x.float(), "fc1": [w.float() for w in v.fc1], "fc2": [w.float() for w in v.fc2]},
              "x: got dtype torch.float32; allowed: torch.bfloat16"),
    "hidden": (lambda v: {"x": v.x[:, :320].contiguous(), "fc1": [w[:, :320].contiguous() for w in v.fc1],
                          "fc2": [w[:320].contiguous() for w in v.fc2]}, "H: got 320; allowed: a multiple of 256"),
    "device of ids": (lambda v: {"topk_ids": v.ids.cpu()}, "topk_ids: got device cpu; allowed: cuda:0"),
    "one expert unaligned": (lambda v: {"fc1": [*v.fc1[:3], unaligned(v.fc1[3].detach()), *v.fc1[4:]]},
                             "fc1[3]: got strides (512, 1) at address"),
    "one expert strided": (lambda v: {"fc2": [v.fc2[0].detach().t().contiguous().t(), *v.fc2[1:]]},
                           "fc2[0]: got strides (1, 512)"),
    "clamp": (lambda v: {"clamp": 1.0001}, "clamp: got 1.0001; allowed: None or a number that bf16 holds exactly"),
    "an id too large": (lambda v: {"topk_ids": with_id(v.ids, 8)},
                        "topk_ids: got expert 8 at rank 0, token 400, k = 2; allowed: -1 (dropped) and 0..7"),
    "an id too small": (lambda v: {"topk_ids": torch.full_like(v.ids, -2)},
                        "topk_ids: got expert -2 at rank 0, token 0, k = 0"),
    "too many tokens": (lambda v: {"workspace": Workspace.create(WorkspaceShape(1, 8, 3, 512, 599))},
                        "x: got 600 tokens; allowed: at most 599, the tokens of the workspace"),
    "workspace of another shape": (lambda v: {"workspace": Workspace.create(WorkspaceShape(1, 16, 3, 512, 600))},
                                   "workspace: got experts = 16; allowed: 8, as in this call"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_refused_by_name_and_the_next_call_works(name):
    layer = Layer(CASE)
    leaves = Leaves(layer)
    change, message = REFUSED[name]
    with pytest.raises(ValueError, match=re.escape(message)):
        changed(leaves, **change(leaves))
    assert_same(Leaves(layer).run(), Leaves(layer).run())
    torch.cuda.synchronize()


def test_a_second_backward_is_refused_by_name():
    leaves = Leaves(Layer(CASE))
    y = leaves.forward()
    y.backward(leaves.dy, retain_graph=True)
    with pytest.raises(RuntimeError, match="megamoe: backward of this forward has run already"):
        y.backward(leaves.dy)

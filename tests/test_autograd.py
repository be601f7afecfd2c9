"""What autograd keeps, what it returns, who receives weight gradients, and the two differentiable moves."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from megamoe_train import autograd, reference
from megamoe_train.functional import moe
from megamoe_train.plan import build_plan
from tests.workloads import make_layer

NAMES = ("x", "weights", "fc1", "fc2")


def leaves_of(layer, frozen: tuple[str, ...] = ()) -> tuple[dict[str, Tensor], Tensor, Tensor]:
    """(x, weights, fc1, fc2 as leaves that want a gradient unless frozen), ids, dy."""
    x, ids, weights, dy, fc1, fc2 = layer.merged()
    leaves = dict(zip(NAMES, (x, weights, fc1, fc2), strict=True))
    for name, leaf in leaves.items():
        leaf.requires_grad_(name not in frozen)
    return leaves, ids, dy


def run(leaves: dict[str, Tensor], ids: Tensor, dy: Tensor, **options) -> Tensor:
    y = moe(leaves["x"], ids, leaves["weights"], leaves["fc1"], leaves["fc2"], **options)
    y.backward(dy)
    return y.detach()


def packed_by(function) -> tuple[list[Tensor], Tensor]:
    """The tensors autograd was asked to keep while `function` ran, and its result."""
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        result = function()
    return kept, result


@pytest.mark.parametrize("recompute", [None, "fc1"])
def test_keeps_x_h_plan_and_weights_only(recompute):
    leaves, ids, dy = leaves_of(make_layer([90], top_k=3))
    plan = build_plan(ids, 8)
    experts = [*leaves["fc1"].detach().unbind(0)], [*leaves["fc2"].detach().unbind(0)]
    _, h = reference.forward(leaves["x"], plan, leaves["weights"], *experts, clamp=None, group=None)
    kept, y = packed_by(lambda: moe(leaves["x"], ids, *[leaves[n] for n in NAMES[1:]], plan=plan, recompute=recompute))
    inputs = {leaf.data_ptr() for leaf in leaves.values()}
    others = [tensor for tensor in kept if tensor.data_ptr() not in inputs]
    assert inputs == {tensor.data_ptr() for tensor in kept} - {tensor.data_ptr() for tensor in others}
    assert [tuple(tensor.shape) for tensor in others] == ([] if recompute else [(plan.num_rows, 32)])
    assert all(torch.equal(tensor, h) for tensor in others)
    # Nor does the node hold anything else that is as large as a row pool.
    held = [value for value in vars(y.grad_fn).values() if isinstance(value, Tensor)]
    assert held == [] and y.grad_fn.call.plan is plan
    y.backward(dy)


def test_recompute_gives_the_same_bits():
    for dtype in (torch.float32, torch.bfloat16):
        layer = make_layer([150], top_k=3, dtype=dtype)
        kept, ids, dy = leaves_of(layer)
        again, _, _ = leaves_of(layer)
        assert torch.equal(run(kept, ids, dy, clamp=0.5), run(again, ids, dy, clamp=0.5, recompute="fc1"))
        assert all(torch.equal(kept[name].grad, again[name].grad) for name in NAMES)


@pytest.mark.parametrize("recompute", [None, "fc1"])
@pytest.mark.parametrize("frozen", [("x",), ("weights",), ("fc1",), ("fc2",), ("fc1", "fc2"), ("x", "weights", "fc2")])
def test_frozen_inputs_get_no_gradient_and_change_no_other(frozen, recompute):
    layer = make_layer([60])
    full, ids, dy = leaves_of(layer)
    part, _, _ = leaves_of(layer, frozen)
    run(full, ids, dy)
    run(part, ids, dy, recompute=recompute)
    for name in NAMES:
        if name in frozen:
            assert part[name].grad is None
        else:
            assert torch.equal(part[name].grad, full[name].grad), name


def test_lists_of_experts_give_the_gradients_of_a_stack():
    layer = make_layer([60])
    stack, ids, dy = leaves_of(layer)
    run(stack, ids, dy)
    x, _, weights, _, fc1, fc2 = layer.merged()
    # Each expert on its own storage and with its own strides; expert 3 frozen in fc1.
    fc1 = [expert.t().contiguous().t().requires_grad_(e != 3) for e, expert in enumerate(fc1)]
    fc2 = [expert.clone().requires_grad_() for expert in fc2]
    moe(x.requires_grad_(), ids, weights.requires_grad_(), fc1, fc2).backward(dy)
    torch.testing.assert_close(x.grad, stack["x"].grad, rtol=1e-13, atol=1e-13)
    for name, experts in (("fc1", fc1), ("fc2", fc2)):
        for e, expert in enumerate(experts):
            if name == "fc1" and e == 3:
                assert expert.grad is None
            else:
                torch.testing.assert_close(expert.grad, stack[name].grad[e], rtol=1e-13, atol=1e-13)


def test_a_list_of_one_and_a_stack_of_one():
    layer = make_layer([10], top_k=1, num_experts=1)
    stack, ids, dy = leaves_of(layer)
    run(stack, ids, dy)
    x, _, weights, _, fc1, fc2 = layer.merged()
    single = fc1[0].clone().requires_grad_()
    moe(x, ids, weights, [single], fc2).backward(dy)
    assert torch.equal(single.grad, stack["fc1"].grad[0])


class MainGrads:
    """A sink with one fp32 buffer per weight, as Megatron's main_grad is used."""

    def __init__(self, *weights: Tensor):
        self.main_grad = {id(weight): torch.full_like(weight, 0.5, dtype=torch.float32) for weight in weights}
        self.finished: list[tuple[int, bool]] = []

    def buffer(self, weight: Tensor) -> Tensor | None:
        return self.main_grad.get(id(weight))

    def finish(self, weight: Tensor, grad: Tensor | None) -> Tensor | None:
        self.finished.append((id(weight), grad is None))
        return torch.zeros_like(weight) if grad is None else grad.to(weight.dtype)


@pytest.mark.parametrize("as_list", [False, True])
def test_a_sink_is_added_to_in_fp32_and_decides_what_autograd_gets(as_list):
    layer = make_layer([80], dtype=torch.bfloat16)
    x, ids, weights, dy, fc1, fc2 = layer.merged()
    plan = build_plan(ids, 8)
    args = plan, weights, list(fc1), list(fc2)
    _, h = reference.forward(x, *args, clamp=None, group=None)
    expected = reference.backward(dy, x, h, *args, clamp=None, group=None)
    fc1 = [w.clone().requires_grad_() for w in fc1] if as_list else fc1.requires_grad_()
    fc2 = [w.clone().requires_grad_() for w in fc2] if as_list else fc2.requires_grad_()
    parameters = [*fc1, *fc2] if as_list else [fc1, fc2]
    without_buffer = parameters[-1]
    sink = MainGrads(*parameters[:-1])
    moe(x, ids, weights, fc1, fc2, wgrad_sink=sink).backward(dy)
    assert sink.finished == [(id(w), w is not without_buffer) for w in parameters]  # the very parameters, each once
    found = [sink.main_grad.get(id(w), w.grad) for w in parameters]
    exact = [*expected.dfc1, *expected.dfc2] if as_list else [torch.stack(expected.dfc1), torch.stack(expected.dfc2)]
    for weight, value, grad in zip(parameters, found, exact, strict=True):
        if weight is without_buffer:
            assert torch.equal(value, grad.bfloat16())
        else:
            assert value.dtype == torch.float32 and (weight.grad == 0).all()
            torch.testing.assert_close(value, grad + 0.5, rtol=1e-6, atol=1e-6)


def test_a_sink_sees_the_parameter_even_when_hooks_replace_what_is_kept():
    """Activation offloading hands backward a copy of each kept tensor; main_grad hangs on the original."""
    leaves, ids, dy = leaves_of(make_layer([20], dtype=torch.float32))
    sink = MainGrads(leaves["fc1"], leaves["fc2"])
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t.clone(), lambda t: t):
        y = moe(leaves["x"], ids, *[leaves[name] for name in NAMES[1:]], wgrad_sink=sink)
    y.backward(dy)
    assert sink.finished == [(id(leaves["fc1"]), True), (id(leaves["fc2"]), True)]
    assert (sink.main_grad[id(leaves["fc1"])] != 0.5).any()


def test_frozen_weights_never_reach_the_sink():
    leaves, ids, dy = leaves_of(make_layer([20]), frozen=("fc1",))
    sink = MainGrads()
    run(leaves, ids, dy, wgrad_sink=sink)
    assert sink.finished == [(id(leaves["fc2"]), False)]


def test_micro_batches_accumulate():
    layers = [make_layer([size], seed=seed) for seed, size in enumerate((40, 40, 7))]
    total: dict[str, Tensor] = {}
    first, _, _ = leaves_of(layers[0])
    outputs = []
    for layer in layers:  # every forward before any backward, as a pipeline schedule does
        x, ids, weights, dy, _, _ = layer.merged()
        outputs.append((moe(x, ids, weights, first["fc1"], first["fc2"]), dy))
        alone = first["fc1"].detach().clone().requires_grad_(), first["fc2"].detach().clone().requires_grad_()
        moe(x, ids, weights, *alone).backward(dy)
        for name, leaf in zip(("fc1", "fc2"), alone, strict=True):
            total[name] = leaf.grad + total.get(name, 0)
    for y, dy in outputs:
        y.backward(dy)
    for name in ("fc1", "fc2"):
        torch.testing.assert_close(first[name].grad, total[name], rtol=1e-13, atol=1e-13)


def test_a_second_backward_is_torchs_own_error():
    leaves, ids, dy = leaves_of(make_layer([20]))
    y = moe(leaves["x"], ids, *[leaves[name] for name in NAMES[1:]])
    y.backward(dy, retain_graph=True)
    once = {name: leaf.grad.clone() for name, leaf in leaves.items()}
    y.backward(dy)  # allowed: the graph was kept
    assert all(torch.equal(leaf.grad, 2 * once[name]) for name, leaf in leaves.items())
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        y.backward(dy)


def test_second_derivatives_are_refused():
    leaves, ids, dy = leaves_of(make_layer([20]))
    y = moe(leaves["x"], ids, *[leaves[name] for name in NAMES[1:]])
    (dx,) = torch.autograd.grad(y, leaves["x"], dy.requires_grad_(), create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dx.sum().backward()


def test_a_weight_changed_between_forward_and_backward_is_an_error():
    leaves, ids, dy = leaves_of(make_layer([20]))
    y = moe(leaves["x"], ids, *[leaves[name] for name in NAMES[1:]])
    with torch.no_grad():
        leaves["fc1"].add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward(dy)


def test_no_grad_keeps_nothing_and_gives_the_same_bits():
    leaves, ids, dy = leaves_of(make_layer([50]))
    with torch.no_grad():
        kept, quiet = packed_by(lambda: moe(leaves["x"], ids, *[leaves[name] for name in NAMES[1:]]))
    assert kept == [] and not quiet.requires_grad
    assert torch.equal(quiet, run(leaves, ids, dy))


def test_a_strided_or_broadcast_dy():
    layer = make_layer([30])
    one, ids, dy = leaves_of(layer)
    other, _, _ = leaves_of(layer)
    run(one, ids, dy.t().contiguous().t())
    run(other, ids, dy)
    assert all(torch.equal(one[name].grad, other[name].grad) for name in NAMES)
    summed, expanded = leaves_of(layer)[0], leaves_of(layer)[0]
    moe(summed["x"], ids, *[summed[name] for name in NAMES[1:]]).sum().backward()
    run(expanded, ids, torch.ones_like(dy))
    assert all(torch.equal(summed[name].grad, expanded[name].grad) for name in NAMES)


@pytest.mark.parametrize("tokens", [0, 6])
def test_moves_gradcheck(tokens):
    ids = make_layer([tokens], top_k=3, num_experts=3, routing="some_dropped").ids[0]
    plan = build_plan(ids, 3)
    generator = torch.Generator().manual_seed(1)

    def leaf(*shape: int) -> Tensor:
        return torch.randn(shape, dtype=torch.float64, generator=generator).requires_grad_()

    rows = torch.zeros(plan.num_rows, 2, dtype=torch.float64)

    def spread(values: Tensor) -> Tensor:  # gradcheck over the rows that hold a token, not over the padding
        return rows.index_copy(0, plan.rows, values)

    assert torch.autograd.gradcheck(lambda x: autograd.dispatch(x, plan, None)[plan.rows], leaf(tokens, 2))
    assert torch.autograd.gradcheck(lambda p: autograd.dispatch_weights(p, plan, None)[plan.rows], leaf(tokens, 3))
    assert torch.autograd.gradcheck(lambda v: autograd.combine(spread(v), plan, None), leaf(len(plan.rows), 2))


def test_dispatch_experts_combine_is_the_layer():
    """The staged path, its experts in differentiable torch, gives the output and gradients of the one call."""
    layer = make_layer([60], top_k=3, routing="some_dropped")
    fused, ids, dy = leaves_of(layer)
    staged, _, _ = leaves_of(layer)
    y = run(fused, ids, dy)
    plan = build_plan(ids, 8)
    x_MH = autograd.dispatch(staged["x"], plan, None)
    p_M = autograd.dispatch_weights(staged["weights"], plan, None)
    outputs = torch.zeros_like(x_MH)
    for e, (start, end) in enumerate(plan.segments):
        gate, up = (x_MH[start:end] @ staged["fc1"][e].t()).chunk(2, -1)
        a = torch.nn.functional.silu(gate) * up * p_M[start:end, None]
        outputs = outputs.index_copy(0, torch.arange(start, end), a @ staged["fc2"][e].t())
    y_staged = autograd.combine(outputs, plan, None)
    y_staged.backward(dy)
    torch.testing.assert_close(y_staged, y, rtol=1e-12, atol=1e-13)
    for name in NAMES:
        torch.testing.assert_close(staged[name].grad, fused[name].grad, rtol=1e-12, atol=1e-13)

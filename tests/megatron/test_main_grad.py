"""Weight gradients into main_grad: the sink alone, then under Megatron's DDP against alltoall."""

from functools import partial

import pytest
import torch

from megamoe_train.megatron.main_grad import MainGradSink
from tests.megatron import layers, rows


def weight(dtype=torch.bfloat16, main=torch.float32, shape=(4, 6)):
    parameter = torch.nn.Parameter(torch.zeros(shape, dtype=dtype))
    parameter.main_grad, parameter.grad_added_to_main_grad = torch.zeros(shape, dtype=main), False
    return parameter


def test_a_weight_without_main_grad_gets_its_gradient_back_in_its_dtype():
    plain = torch.nn.Parameter(torch.zeros(2, 3, dtype=torch.bfloat16))
    sink, grad = MainGradSink(), torch.full((2, 3), 1.5)
    assert sink.buffer(plain) is None
    returned = sink.finish(plain, grad)
    assert returned.dtype == torch.bfloat16 and torch.equal(returned.float(), grad)


def test_a_narrow_main_grad_is_left_to_ddp():
    narrow = weight(main=torch.bfloat16)
    sink = MainGradSink()
    assert sink.buffer(narrow) is None
    sink.finish(narrow, torch.ones(4, 6))
    assert not narrow.grad_added_to_main_grad


def test_a_wide_main_grad_is_the_buffer_and_ddp_is_told():
    for dtype, main in (
        (torch.bfloat16, torch.float32),
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
    ):
        wide = weight(dtype, main)
        sink = MainGradSink()
        assert sink.buffer(wide) is wide.main_grad
        placeholder = sink.finish(wide, None)
        assert wide.grad_added_to_main_grad and (placeholder.shape, placeholder.dtype) == (wide.shape, wide.dtype)


def test_without_ddp_nothing_is_returned():
    alone = weight()
    del alone.grad_added_to_main_grad
    assert MainGradSink().finish(alone, None) is None


def test_placeholders_share_the_memory_of_one_weight():
    sink, weights = MainGradSink(), [weight(shape=(8, 4)), weight(shape=(8, 4)), weight(shape=(4, 4))]
    placeholders = [sink.finish(w, None) for w in weights]
    assert len({p.data_ptr() for p in placeholders}) == 1
    assert all(p.is_contiguous() and p.shape == w.shape for p, w in zip(placeholders, weights, strict=True))


def test_placeholder_that_ddp_will_add_is_zero():
    added = weight()
    added.zero_out_wgrad = True
    assert not MainGradSink().finish(added, None).any()


def accumulated(layer, inputs, **ddp):
    """main_grad of every parameter after a step of several micro-batches under DDP."""
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig

    wrapped = DistributedDataParallel(layer.config, DistributedDataParallelConfig(**ddp), layer)
    wrapped.zero_grad_buffer()
    for i, x in enumerate(inputs):
        with wrapped.no_sync() if i + 1 < len(inputs) else torch.enable_grad():
            x = x.to(next(layer.parameters()).dtype).detach().requires_grad_()
            y = wrapped(x)[0]
            (y.double() * torch.cos(torch.arange(layers.HIDDEN, dtype=torch.float64))).sum().backward()
    wrapped.finish_grad_sync()
    assert all(p.grad is None for p in layer.parameters())
    return {name: p.main_grad.clone() for name, p in layer.named_parameters()}


def same_main_grads(folder, ep_size, **ddp):
    layers.start(ep_size)
    twins = layers.twins()
    inputs = [layers.hidden(tokens, seed=i) for i, tokens in enumerate((12, 9, 5))]
    theirs, ours = (accumulated(layer, inputs, **ddp) for layer in twins)
    layers.assert_equal(ours, theirs)
    experts = list(twins[1].experts.parameters())
    assert all(p.grad_added_to_main_grad for p in experts)
    if ddp.get("use_distributed_optimizer"):  # its buffers are filled in reverse order: no stack [L, 2I, H] exists
        fc1, _ = twins[1].experts.expert_weights()
        assert fc1[0].main_grad.data_ptr() > fc1[1].main_grad.data_ptr() and fc1[0].data_ptr() > fc1[1].data_ptr()


def low_precision(folder, in_fp32):
    """bf16 weights: an fp32 main_grad is written by us, a bf16 one is DDP's to add. The 2x rule against fp64."""
    layers.start(2)
    twins = [layer.bfloat16() for layer in layers.twins()]
    exact = layers.new_layer(layers.config())
    exact.load_state_dict({name: None if t is None else t.double() for name, t in twins[0].state_dict().items()})
    inputs = [layers.hidden(tokens, seed=i).bfloat16() for i, tokens in enumerate((12, 9, 5))]
    truth = accumulated(exact, inputs)
    theirs, ours = (accumulated(layer, inputs, grad_reduce_in_fp32=in_fp32) for layer in twins)
    for name, p in twins[1].experts.named_parameters(prefix="experts"):
        assert ours[name].dtype == (torch.float32 if in_fp32 else torch.bfloat16)
        assert p.grad_added_to_main_grad == in_fp32
        errors = [(grads[name].double() - truth[name]).norm().item() for grads in (ours, theirs)]
        assert errors[0] <= 2 * errors[1], (name, errors)
        assert truth[name].norm() == 0 or errors[0] > 0


def memory_of_placeholders(folder):
    """Autograd takes the shared placeholders as they are: no gradient of a weight's size is made per weight."""
    layers.start(1)
    layer = layers.new_layer(layers.config())
    seen = set()
    for p in layer.experts.parameters():
        p.main_grad, p.grad_added_to_main_grad = torch.zeros_like(p), False
        p.register_post_accumulate_grad_hook(lambda p: seen.add(p.grad.untyped_storage().data_ptr()))
    layer(layers.hidden(12))[0].sum().backward()
    assert len(seen) == 1, f"{len(seen)} buffers hold the placeholders of {2 * layers.EXPERTS} weights"


ROWS = {
    "EP=2": partial(same_main_grads, ep_size=2),
    "EP=1, data parallel": partial(same_main_grads, ep_size=1),
    "overlapped gradient reduction": partial(same_main_grads, ep_size=1, overlap_grad_reduce=True),
    "distributed optimizer": partial(same_main_grads, ep_size=1, use_distributed_optimizer=True),
    "distributed optimizer, overlapped, EP=2": partial(
        same_main_grads, ep_size=2, use_distributed_optimizer=True, overlap_grad_reduce=True
    ),
    "bf16 weights, fp32 main_grad": partial(low_precision, in_fp32=True),
    "bf16 weights, bf16 main_grad": partial(low_precision, in_fp32=False),
    "placeholders stay shared inside autograd": memory_of_placeholders,
}
ran = rows.fixture(__name__, world_size=2)


@pytest.mark.parametrize("row", ROWS)
def test_ddp(ran, row):
    ran.check(row)

"""Megatron's device words without a GPU: what they mean here, and that a machine with a GPU keeps its own."""

import importlib.util
import os

import pytest
import torch

from megamoe_train.megatron import wheel
from tests.distributed import run_ranks

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU: cpu.py is for those")
NAMES = (
    "current_device",
    "set_device",
    "Stream",
    "Event",
    "current_stream",
    "get_rng_state",
    "manual_seed",
    "synchronize",
)


def untouched_with_a_gpu(rank, world_size):
    from megamoe_train.megatron import cpu

    before = [getattr(torch.cuda, name) for name in NAMES] + [torch.zeros, torch.Tensor.cuda, torch.Tensor.type]
    truth, torch.cuda.is_available = torch.cuda.is_available, lambda: True
    cpu.apply()
    torch.cuda.is_available = truth
    after = [getattr(torch.cuda, name) for name in NAMES] + [torch.zeros, torch.Tensor.cuda, torch.Tensor.type]
    assert all(a is b for a, b in zip(before, after, strict=True))
    cpu.apply()  # the same process without one: now they are
    assert torch.zeros is not before[-3]
    zeros = torch.zeros
    cpu.apply()
    assert torch.zeros is zeros  # not wrapped twice


def words(rank, world_size):
    from megamoe_train.megatron import cpu

    cpu.apply()
    assert not torch.cuda.is_available() and torch.cuda.device_count() == 0  # no library takes a CUDA path
    for made in (torch.zeros(2, device="cuda"), torch.tensor([1.0], device=torch.cuda.current_device())):
        assert made.device.type == "cpu" and made.cuda() is made
    module = torch.nn.Linear(2, 2)
    assert module.cuda() is module
    types = {torch.float32: "Float", torch.bfloat16: "BFloat16", torch.float16: "Half"}
    for dtype, name in types.items():
        assert torch.zeros(1, dtype=dtype).type() == f"torch.cuda.{name}Tensor"
    assert torch.zeros(1).type(torch.float64).dtype == torch.float64  # with a type it converts, as ever
    stream = torch.cuda.Stream()
    assert stream == torch.cuda.current_stream()
    with torch.cuda.stream(stream):
        event = stream.record_event()
    event.synchronize()
    stream.wait_event(event)
    assert event.query() and os.environ["TORCHDYNAMO_DISABLE"] == "1"


def random_states(rank, world_size):
    """Streams of random numbers by name: independent, continued where they stopped, the default one undisturbed."""
    from megamoe_train.megatron import cpu

    cpu.apply()
    from megatron.core.tensor_parallel.random import CudaRNGStatesTracker

    tracker = CudaRNGStatesTracker()
    torch.manual_seed(0)
    expected = torch.rand(2)
    torch.manual_seed(0)
    for name, seed in (("a", 1), ("b", 2)):
        tracker.add(name, seed)
    drawn = {}
    for name in ("a", "b", "a"):
        with tracker.fork(name):
            drawn.setdefault(name, []).append(torch.rand(1).item())
    assert torch.equal(torch.rand(2), expected)
    assert drawn["a"] == torch.rand(2, generator=torch.Generator().manual_seed(1)).tolist()
    assert drawn["b"] == torch.rand(1, generator=torch.Generator().manual_seed(2)).tolist()


@pytest.mark.parametrize("check", [untouched_with_a_gpu, words, random_states])
def test_cpu(check):
    run_ranks(check, 1)


def test_the_shipped_dataset_helper_is_used_where_it_is_there_and_compiled_where_not(monkeypatch):
    from megatron.core.datasets import utils

    calls = []
    monkeypatch.setattr(utils, "compile_helpers", lambda: calls.append("make"))
    find = importlib.util.find_spec
    hidden = "megatron.core.datasets.helpers_cpp"
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == hidden else find(name))
    wheel.use_shipped_dataset_helper()
    utils.compile_helpers()
    assert calls == ["make"]
    monkeypatch.setattr(importlib.util, "find_spec", find)
    wheel.use_shipped_dataset_helper()
    utils.compile_helpers()
    assert calls == ["make"]

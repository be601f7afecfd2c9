"""Which backend serves which tensors, and that CUDA tensors never reach the reference unasked."""

from __future__ import annotations

import pytest
import torch

from megamoe_train import backends, extension, reference
from megamoe_train.functional import moe
from tests.workloads import make_layer


@pytest.fixture
def registry(monkeypatch) -> dict:
    """A registry of its own, with the reference alone in it."""
    fresh = {"reference": backends.ReferenceBackend()}
    monkeypatch.setattr(backends, "_BACKENDS", fresh)
    return fresh


@pytest.mark.parametrize(("backend", "device", "expected"), [
    ("auto", "cpu", "reference"), ("reference", "cpu", "reference"), ("fused", "cpu", None),
    ("auto", "cuda", None), ("fused", "cuda", None), ("reference", "cuda", "reference"),
])  # fmt: skip
def test_choice_without_the_fused_backend(registry, backend, device, expected):
    choice = backends.choose(backend, device)
    assert choice.name == expected and choice.why
    if expected is None:
        assert 'backend="reference"' in choice.why


def test_auto_on_cuda_says_what_is_missing(registry, monkeypatch, tmp_path):
    monkeypatch.setattr(extension, "PACKAGE", tmp_path)
    why = backends.choose("auto", "cuda").why
    assert 'backend="auto" on CUDA tensors: the CUDA extension is not built (no _C*.so in ' in why
    assert "megamoe_train.doctor" in why and 'backend="reference"' in why
    (tmp_path / "_C.abi3.so").write_bytes(b"")
    assert "the CUDA extension _C.abi3.so does not hold the fused layer" in backends.choose("auto", "cuda").why


def test_resolve_raises_what_choose_says(registry):
    class OnCuda:
        device = torch.device("cuda:0")

    with pytest.raises(backends.BackendUnavailable) as raised:
        backends.resolve("auto", OnCuda())
    assert str(raised.value) == backends.choose("auto", "cuda").why
    assert backends.resolve("reference", OnCuda()) == "reference"
    with pytest.raises(ValueError, match="backend: got 'gpu'; allowed: 'auto', 'fused', 'reference'"):
        backends.resolve("gpu")


def test_a_registered_fused_backend_serves_cuda_and_only_cuda(registry):
    class Fused(backends.ReferenceBackend):
        name = "fused"

    backends.register(Fused())
    assert backends.choose("auto", "cuda").name == backends.choose("fused", "cuda").name == "fused"
    assert backends.choose("auto", "cpu").name == "reference" and backends.choose("fused", "cpu").name is None
    assert backends.get("fused").name == "fused"


def test_register_refuses_other_names(registry):
    class Other(backends.ReferenceBackend):
        name = "auto"

    with pytest.raises(ValueError, match="backend name: got 'auto'; allowed: 'fused', 'reference'"):
        backends.register(Other())


def test_moe_calls_the_backend_it_resolved(registry):
    """forward and backward run through the registered object, with the signature of reference.py."""
    calls = []

    class Counting(backends.ReferenceBackend):
        def forward(self, *args, **kwargs):
            calls.append(("forward", sorted(kwargs)))
            return reference.forward(*args, **kwargs)

        def backward(self, *args, **kwargs):
            calls.append(("backward", sorted(kwargs)))
            return reference.backward(*args, **kwargs)

    backends.register(Counting())
    x, ids, weights, dy, fc1, fc2 = make_layer([5]).merged()
    moe(x.requires_grad_(), ids, weights, fc1, fc2).backward(dy)
    assert calls == [
        ("forward", ["clamp", "group"]),
        ("backward", ["clamp", "dfc1", "dfc2", "group", "need", "overwrite"]),
    ]

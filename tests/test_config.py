"""Shapes and knobs of a layer: what is allowed, and that every refusal names field, value and what is allowed."""

from __future__ import annotations

import dataclasses
import re
import subprocess
import sys

import pytest

from megamoe_train import config
from megamoe_train.config import MegaMoEConfig

FLASH = MegaMoEConfig(hidden_size=4096, intermediate_size=2048, num_experts=256, top_k=6, ep_size=8, clamp=10.0)
PRO = MegaMoEConfig(hidden_size=7168, intermediate_size=3072, num_experts=384, top_k=6, ep_size=8, clamp=10.0)


def test_the_deepseek_v4_shapes_are_allowed():
    FLASH.validate()
    PRO.validate()
    assert (FLASH.num_local_experts, PRO.num_local_experts) == (32, 48)
    MegaMoEConfig(256, 128, 1, 1).validate()
    MegaMoEConfig(256, 128, 16, 16, ep_size=16, clamp=3, backend="fused", recompute="fc1").validate()


def test_a_config_is_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        FLASH.top_k = 8


@pytest.mark.parametrize(
    ("field", "value", "allowed"),
    [
        ("hidden_size", 4000, 'a multiple of 256 (any with backend="reference")'),
        ("hidden_size", 0, "an integer >= 1"),
        ("hidden_size", 4096.0, "an integer >= 1"),
        ("intermediate_size", 100, 'a multiple of 128 (any with backend="reference")'),
        ("intermediate_size", True, "an integer >= 1"),
        ("num_experts", 257, "a multiple of ep_size = 8"),
        ("num_experts", -8, "an integer >= 1"),
        ("top_k", 0, "an integer >= 1"),
        ("top_k", 17, '1..16 (any with backend="reference")'),
        ("top_k", 300, "1..num_experts = 256"),
        ("ep_size", 0, "an integer >= 1"),
        ("clamp", 0, "None (off) or a finite number > 0"),
        ("clamp", -1.0, "None (off) or a finite number > 0"),
        ("clamp", float("inf"), "None (off) or a finite number > 0"),
        ("clamp", float("nan"), "None (off) or a finite number > 0"),
        ("clamp", "10", "None (off) or a finite number > 0"),
        ("clamp", True, "None (off) or a finite number > 0"),
        ("backend", "cuda", "'auto', 'fused', 'reference'"),
        ("recompute", "all", "None, 'fc1'"),
    ],
)
def test_refusals(field, value, allowed):
    expected = re.escape(f"{field}: got {value!r}; allowed: {allowed}")
    with pytest.raises(ValueError, match=f"^{expected}$"):
        dataclasses.replace(FLASH, **{field: value}).validate()


def test_the_reference_takes_any_shape():
    MegaMoEConfig(24, 12, 40, 20, backend="reference").validate()
    with pytest.raises(ValueError, match="num_experts: got 40; allowed: a multiple of ep_size = 3"):
        MegaMoEConfig(24, 12, 40, 20, ep_size=3, backend="reference").validate()


def test_environment_variables(monkeypatch):
    name = "MEGAMOE_SKIP_CUDA_BUILD"
    monkeypatch.delenv(name, raising=False)
    assert config.env(name) == "0" and config.env_flag(name) is False
    monkeypatch.setenv(name, "1")
    assert config.env_flag(name) is True
    monkeypatch.setenv(name, "yes")
    with pytest.raises(ValueError, match=r"^MEGAMOE_SKIP_CUDA_BUILD: got 'yes'; allowed: '0', '1'$"):
        config.env_flag(name)
    with pytest.raises(KeyError, match="MEGAMOE_NOT_IN_THE_TABLE"):
        config.env("MEGAMOE_NOT_IN_THE_TABLE")
    assert all(name.startswith("MEGAMOE_") and entry.meaning for name, entry in config.ENVIRONMENT.items())


def test_config_versions_and_doctor_load_without_torch():
    """They have to speak where torch is missing or broken."""
    code = (
        "import sys; sys.modules['torch'] = None\n"
        "import megamoe_train.config, megamoe_train.versions, megamoe_train.extension, megamoe_train.doctor"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)

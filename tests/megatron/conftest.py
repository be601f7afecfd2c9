"""Ranks of the tests in this folder find Megatron imported already."""

from tests import distributed

distributed.PRELOAD += ["megatron.training.training", "megatron.core.models.gpt.gpt_model"]

"""The equivalence checks see what they are for: each wrong version of our code makes them fail.

DESIGN section 8 names four. "p after fc2" is the same function as p before it, so that no loss and no tolerance can
tell the two apart; the bits of the layer's output in fp32 do, and so does the mistake that such a change invites.
"""

import contextlib
import warnings
from dataclasses import replace

import pytest
import torch

from tests.distributed import run_ranks
from tests.megatron.equivalence import Report, compare_bf16, compare_fp32, merged
from tests.megatron.tiny_gpt import Setup

pytestmark = pytest.mark.timeout(600)  # on a machine that is short of cores; 20 s on two free ones
RANKS, FP32, BF16 = 2, torch.float32, torch.bfloat16
PLAIN = Setup(ep_size=2)
ONE_RANK_FURTHER = PLAIN.num_experts // PLAIN.ep_size
# Mutation -> the kinds of problems that must show, with fp32 and with the 2x rule in bf16.
EVERYTHING = {"loss", "gradient"}
SEEN = {
    "clamp off": (EVERYTHING | {"output"}, EVERYTHING),
    "p after fc2": ({"output"}, set()),
    "p missing in dfc2": ({"gradient"}, {"gradient"}),
    "expert offset + 1": (EVERYTHING | {"output"}, EVERYTHING),
    "expert offset + L": (EVERYTHING | {"output"}, EVERYTHING),
    "one dropped slot": (EVERYTHING | {"output"}, {"gradient"}),
}


def mutation(name: str) -> contextlib.AbstractContextManager:
    """In a rank: the patch of that name ("" for none)."""
    from tests.megatron import mutations

    return {
        "": contextlib.nullcontext,
        "clamp off": mutations.clamp_off,
        "p after fc2": mutations.p_after_fc2,
        "p missing in dfc2": mutations.p_missing_in_dfc2,
        "expert offset + 1": lambda: mutations.expert_offset(1),
        "expert offset + L": lambda: mutations.expert_offset(ONE_RANK_FURTHER),
        "one dropped slot": mutations.dropped_slot,
    }[name]()


def run_mutations(rank: int, world_size: int, runs: list[tuple[str, Setup]]) -> list[Report]:
    warnings.simplefilter("ignore")
    reports = []
    for name, setup in runs:
        with mutation(name):
            reports.append((compare_bf16 if setup.dtype == BF16 else compare_fp32)(setup, steps=1))
    return reports


RUNS = [(name, replace(PLAIN, dtype=dtype)) for dtype in (FP32, BF16) for name in ("", *SEEN)]
RUNS.append(("expert offset + L", replace(PLAIN, reseed=False)))


@pytest.fixture(scope="module")
def reports():
    of_ranks = run_ranks(run_mutations, RANKS, RUNS, timeout=550)
    return {run: merged([mine[i] for mine in of_ranks]) for i, run in enumerate(RUNS)}


@pytest.mark.parametrize("dtype", [FP32, BF16], ids=["fp32", "bf16"])
def test_unchanged_code_passes(reports, dtype):
    assert reports["", replace(PLAIN, dtype=dtype)].problems == []


@pytest.mark.parametrize("name", SEEN)
def test_fp32_check_sees(reports, name):
    assert reports[name, PLAIN].kinds >= SEEN[name][0] and reports[name, PLAIN].problems


@pytest.mark.parametrize("name", [name for name, (_, in_bf16) in SEEN.items() if in_bf16])
def test_2x_rule_sees(reports, name):
    assert reports[name, replace(PLAIN, dtype=BF16)].kinds >= SEEN[name][1]


def test_identical_experts_would_hide_a_wrong_rank_from_the_loss(reports):
    """Why experts are reseeded: with Megatron's CPU initialisation, expert i is the same on every rank."""
    assert "loss" not in reports["expert offset + L", replace(PLAIN, reseed=False)].kinds
    assert "loss" in reports["expert offset + L", PLAIN].kinds

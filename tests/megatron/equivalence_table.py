"""`python -m tests.megatron.equivalence_table`: the same training with alltoall and with megamoe, as a table.

The cases, and how they run, are also those of test_equivalence.py.
"""

import warnings

import torch

from tests.distributed import run_ranks
from tests.megatron.equivalence import BASELINE, Report, compare_bf16, compare_fp32, merged
from tests.megatron.tiny_gpt import HIDDEN, INTERMEDIATE, LAYERS, Setup

RANKS, STEPS = 4, 3
FP32, BF16 = torch.float32, torch.bfloat16
CASES = {
    "EP 1, fp32": Setup(1),
    "EP 2, fp32": Setup(2),
    "EP 4, fp32": Setup(4),
    "EP 4, fp32, 16 experts top-6": Setup(4, num_experts=16, top_k=6),
    "EP 2, fp32, no clamp, top-1": Setup(2, clamp=None, top_k=1),
    "EP 2, fp32, staged": Setup(2, experts="staged"),
    "EP 1, bf16": Setup(1, dtype=BF16),
    "EP 2, bf16": Setup(2, dtype=BF16),
    "EP 4, bf16": Setup(4, dtype=BF16),
    "EP 2, bf16, staged": Setup(2, dtype=BF16, experts="staged"),
}


def run_cases(rank: int, world_size: int, names: list[str]) -> list[Report]:
    """On every rank: the cases, one after another."""
    warnings.simplefilter("ignore")
    return [(compare_bf16 if CASES[name].dtype == BF16 else compare_fp32)(CASES[name], STEPS) for name in names]


def reports(names: list[str], timeout: float = 550) -> dict[str, Report]:
    """Each case's report over all ranks."""
    of_ranks = run_ranks(run_cases, RANKS, names, timeout=timeout)
    return {name: merged([mine[i] for mine in of_ranks]) for i, name in enumerate(names)}


def lines(of_cases: dict[str, Report]) -> list[str]:
    """One row a case and step: the losses; then the case's worst gradient."""
    rows = [
        f"{LAYERS} layers, H {HIDDEN}, I {INTERMEDIATE}, 8 experts top-4 unless said, {RANKS} ranks, {STEPS} steps",
        f"{'case':30} {'step':>4} {BASELINE:>13} {'megamoe':>13}   gradients: number, worst difference",
    ]
    for name, report in of_cases.items():
        measure, parameter = report.worst_gradient
        worst = f"relative {measure:.1e}" if CASES[name].dtype == FP32 else f"error {2 * measure:.2f} x {BASELINE}'s"
        verdict = "equal" if not report.problems else f"DIFFERENT: {report.problems[0]}"
        end = f"{report.num_gradients}, {worst} ({parameter}); clamp takes {report.clamped:.0%}; {verdict}"
        for step, (plain, ours) in enumerate(report.losses):
            rows.append(f"{name:30} {step:>4} {plain:13.6E} {ours:13.6E}   {end if not step else ''}".rstrip())
    return rows


if __name__ == "__main__":
    print("\n".join(lines(reports(list(CASES)))))

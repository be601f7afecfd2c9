"""Is training with one dispatcher the same as with another? Losses and every parameter's gradient, step by step.

To be used by every rank of a `run_ranks` group; each rank reports on its own parameters, and `merged` puts the ranks
together. Every step starts from the same weights, so that a rounding error cannot grow into another choice of experts
or the other side of the clamp. fp32: losses equal to the printed digit, gradients and updated weights to a few units
in the last place. bf16: the 2x rule of DESIGN section 8, against an fp32 run with the same weights and routes.
"""

from dataclasses import dataclass, field, replace

import torch

from tests.megatron.tiny_gpt import INTERMEDIATE, LAYERS, Setup, Step, Trainer, start
from tests.numerics import relative_error

BASELINE = "alltoall"
GRADIENT_TOLERANCE = 2e-6  # relative L2 difference of one parameter's gradient in fp32; 5e-7 is seen
WEIGHT_TOLERANCE = 1e-6  # of a parameter after the optimizer step
# Share of the elements of the MoE layers' outputs that must agree to the bit in fp32. Both dispatchers multiply the
# same rows in the same order; a routing weight that goes on after fc2 changes every other element's last bit.
EQUAL_BITS = 0.99


@dataclass
class Report:
    """What was compared, the worst that was seen, and every point where it was too much."""

    losses: list[tuple[float, float]] = field(default_factory=list)  # per step: baseline, ours
    num_gradients: int = 0  # parameters compared, each in every step
    worst_gradient: tuple[float, str] = (0.0, "")  # fp32: relative difference; bf16: error as a multiple of baseline's
    equal_bits: float | None = None  # fp32: share of the MoE outputs that agree to the bit
    clamped: float = 0.0  # share of the experts' gates and linear parts that the clamp changes
    problems: list[str] = field(default_factory=list)  # "kind: text"

    @property
    def kinds(self) -> set[str]:
        """What the problems are about: loss, gradient, output, weight, expert bias."""
        return {problem.split(":")[0] for problem in self.problems}

    def gradient(self, step: int, name: str, measure: float, limit: float) -> None:
        """One gradient's difference, in whatever measure, and what it may be."""
        self.worst_gradient = max(self.worst_gradient, (measure, name))
        if not measure <= limit:
            self.problems.append(f"gradient: step {step}, {name}: {measure:.3e} > {limit:.1e}")


def compare_fp32(setup: Setup, steps: int) -> Report:
    """Two runs in fp32, the baseline's and `setup`'s, each with its own optimizer."""
    start(setup)
    theirs, ours, report = Trainer(replace(setup, dispatcher=BASELINE)), Trainer(setup), Report()
    counter = ClampCounter(theirs)
    for step in range(steps):
        plain, got = theirs.backward(step), ours.backward(step)
        _printed_losses(report, step, plain, got)
        _outputs(report, step, plain, got)
        for name, gradient in plain.grads.items():
            report.gradient(step, name, relative_error(got.grads[name], gradient), GRADIENT_TOLERANCE)
        if not all(map(torch.equal, got.expert_bias, plain.expert_bias)):
            report.problems.append(f"expert bias: step {step}: {got.expert_bias}, {BASELINE} {plain.expert_bias}")
        theirs.update()
        ours.update()
        _weights(report, step, theirs, ours)
        ours.load(theirs)
    report.num_gradients, report.clamped = len(plain.grads), counter.share()
    return report


def compare_bf16(setup: Setup, steps: int) -> Report:
    """The 2x rule: errors against fp32, ours at most twice the baseline's. The baseline's run sets the weights.

    Only the last layer has experts, so that its input is the same in both bf16 runs: else the rounding errors of the
    layers before would decide, differently in each run, which of fc1's outputs near the clamp pass a gradient.
    """
    setup = replace(setup, dtype=torch.bfloat16, replay=True, moe_layers=(0,) * (LAYERS - 1) + (1,))
    start(setup)
    theirs, ours = Trainer(replace(setup, dispatcher=BASELINE)), Trainer(setup)
    oracle, report = Trainer(replace(setup, dispatcher=BASELINE, dtype=torch.float32)), Report()
    counter = ClampCounter(theirs)
    for step in range(steps):
        ours.load(theirs)
        oracle.load(theirs)
        plain = theirs.backward(step)
        got, exact = ours.backward(step, plain.routes), oracle.backward(step, plain.routes)
        report.losses.append((plain.loss, got.loss))
        excess = twice(got.token_losses, plain.token_losses, exact.token_losses)
        if not excess <= 1:
            report.problems.append(f"loss: step {step}: error {2 * excess:.2f} x that of {BASELINE}")
        for name, gradient in exact.grads.items():
            report.gradient(step, name, twice(got.grads[name], plain.grads[name], gradient), 1.0)
        theirs.update()
    report.num_gradients, report.clamped = len(plain.grads), counter.share()
    return report


def twice(got: torch.Tensor, plain: torch.Tensor, exact: torch.Tensor) -> float:
    """The 2x rule as one number, at most 1 where it holds: `got`'s error over twice `plain`'s (L2), or over twice that
    plus one bf16 unit of the largest element (max), whichever is more. inf where `got` holds NaN or inf."""
    if not torch.isfinite(got).all():
        return float("inf")
    l2, largest = [((t - exact).norm().item(), (t - exact).abs().max().item()) for t in (got, plain)], exact.abs().max()
    unit = largest.item() * torch.finfo(torch.bfloat16).eps
    of_l2 = 0.0 if l2[0][0] == 0 else l2[0][0] / (2 * l2[1][0]) if l2[1][0] else float("inf")
    of_max = 0.0 if l2[0][1] == 0 else l2[0][1] / (2 * l2[1][1] + unit)
    return max(of_l2, of_max)


def _printed_losses(report: Report, step: int, plain: Step, got: Step) -> None:
    """Equal as Megatron prints them: seven digits."""
    report.losses.append((plain.loss, got.loss))
    if f"{plain.loss:.6E}" != f"{got.loss:.6E}":
        report.problems.append(f"loss: step {step}: {got.loss:.6E}, {BASELINE} {plain.loss:.6E}")


def _outputs(report: Report, step: int, plain: Step, got: Step) -> None:
    """Equal to the bit, but for a few elements."""
    same = min((mine == their).double().mean().item() for mine, their in zip(got.outputs, plain.outputs, strict=True))
    report.equal_bits = same if report.equal_bits is None else min(same, report.equal_bits)
    if same < EQUAL_BITS:
        report.problems.append(f"output: step {step}: {same:.1%} of a MoE layer's output agree to the bit")


def _weights(report: Report, step: int, theirs: Trainer, ours: Trainer) -> None:
    """What the optimizers made of the gradients."""
    mine = ours.parameters()
    for name, parameter in theirs.parameters().items():
        difference = relative_error(mine[name], parameter)
        if not difference <= WEIGHT_TOLERANCE:
            report.problems.append(f"weight: step {step}, {name}: {difference:.3e} > {WEIGHT_TOLERANCE:.1e}")


class ClampCounter:
    """Counts, in a run with Megatron's own experts, how much of fc1's output the clamp changes."""

    def __init__(self, trainer: Trainer):
        self.clamp, self.changed, self.seen = trainer.setup.clamp, 0, 0
        for layer in trainer.layers:
            for expert in layer.experts.local_experts:
                expert.linear_fc1.register_forward_hook(self._count)

    def _count(self, module, inputs, output) -> None:
        if self.clamp is not None:
            gate, up = output[0].detach().split(INTERMEDIATE, dim=-1)
            self.changed += (gate > self.clamp).sum().item() + (up.abs() > self.clamp).sum().item()
            self.seen += output[0].numel()

    def share(self) -> float:
        return self.changed / max(self.seen, 1)


def merged(reports: list[Report]) -> Report:
    """One report for all ranks. Losses are means over the ranks already."""
    return Report(
        reports[0].losses,
        sum(report.num_gradients for report in reports),
        max(report.worst_gradient for report in reports),
        min(bits) if (bits := [r.equal_bits for r in reports if r.equal_bits is not None]) else None,
        sum(report.clamped for report in reports) / len(reports),
        [f"{problem} (rank {rank})" for rank, report in enumerate(reports) for problem in report.problems],
    )

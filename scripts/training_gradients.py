"""Gradients of every parameter of a bf16 training by megamoe, judged by alltoall's and by fp32: the 2x rule.

One launch of ranks trains several times in a row, each a whole `pretrain()` from the same seed and data: alltoall,
megamoe, alltoall from weights moved by one ulp, megamoe with a known fault. At chosen steps a training by megamoe keeps
its weights, its batches, the experts its routers chose and the gradients that its optimizer gets. Then alltoall repeats
these steps, once in bf16 and once in fp32 (TF32 off), which is the truth: of one and the same computation there are our
rounding, alltoall's rounding, and none. The choices are replayed because a token whose expert changes by rounding is no
error of a gradient, and would hide real ones.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

import trainings

TIMES = 2.0  # our error may be so many times alltoall's
# No weight is updated in a repetition, so nothing has to be sharded or overlapped (such a model would not be freed).
REPEATED = (
    "use-distributed-optimizer=false",
    "overlap-param-gather=false",
    "overlap-grad-reduce=false",
    "lr-warmup-iters=0",  # Megatron refuses a warm-up as long as the training
)
BF16_ULP = 2.0**-7  # of a number between 1 and 2


@dataclass
class Kept:
    """One step of one training, on one rank."""

    batches: list[dict] = field(default_factory=list)
    choices: dict[str, list] = field(default_factory=dict)  # of each router, one [T, K] for each time it was asked
    weights: dict = field(default_factory=dict)
    gradients: dict = field(default_factory=dict)  # of each parameter, fp32, summed over the ranks that share it
    repeated: dict = field(default_factory=dict)  # the same of the last repetition


class _Choices:
    """Stands where Megatron's RouterReplay does: writes down which experts were chosen, or hands them out again."""

    def __init__(self, kept: list, replay: bool) -> None:
        self.kept, self.left = kept, list(kept) if replay else None

    def get_replay_topk(self, scores, topk, num_groups=None, group_topk=None, default_compute_topk=None):
        if self.left is None:
            values, chosen = default_compute_topk(scores, topk, num_groups, group_topk)
            self.kept.append(chosen.cpu())
            return values, chosen
        chosen = self.left.pop(0).to(scores.device)
        return scores.gather(1, chosen), chosen


class Tap:
    """Wraps a training: keeps the steps asked for, or (`replay`) makes each step a repetition of a kept one."""

    def __init__(self, steps: list[int], replay: list[Kept] | None = None) -> None:
        self.steps, self.replay = steps, replay
        self.kept: dict[int, Kept] = {}
        self.now: Kept | None = None
        self._source: Iterator[dict] = iter(())

    @contextlib.contextmanager
    def installed(self) -> Iterator[None]:
        from megatron.training import training

        from training_faults import replaced

        with (
            replaced(training, "train_step", lambda original: lambda *x, **more: self._step(original, *x, **more)),
            replaced(training, "save_grads", lambda _: self._keep_gradients),
        ):
            yield

    def forward_step(self, data_iterator, model):
        from megamoe_train.training import model as ours

        if self.now is None:
            return ours.forward_step(data_iterator, model)
        if self.replay is not None:
            return ours.forward_step(self._source, model)
        batch = next(data_iterator)
        self.now.batches.append(batch)
        return ours.forward_step(iter([batch]), model)

    def _step(self, original: Callable, forward_step, data_iterator, model, optimizer, *rest, iteration, **more):
        from megatron.core.utils import unwrap_model
        from megatron.training import get_args

        step = iteration + 1
        if self.replay is None and step not in self.steps:
            return original(forward_step, data_iterator, model, optimizer, *rest, iteration=iteration, **more)
        (self._model,) = unwrap_model(model)  # one chunk: no interleaved pipeline
        self.now = Kept() if self.replay is None else self.replay[iteration]
        if self.replay is not None:
            self._source, optimizer.step = iter(self.now.batches), lambda: (True, 0.0, 0)
            for name, parameter in self._model.named_parameters():
                parameter.data.copy_(self.now.weights[name])
        routers = self._routers()
        for name, router in routers.items():
            router.router_replay = _Choices(self.now.choices.setdefault(name, []), self.replay is not None)
        # Megatron's own way of keeping gradients: whole ones on every rank, whatever the optimizer shards.
        args = get_args()
        before, args.save_wgrads_interval = args.save_wgrads_interval, 1
        try:
            return original(forward_step, data_iterator, model, optimizer, *rest, iteration=iteration, **more)
        finally:
            args.save_wgrads_interval = before
            for router in routers.values():
                router.router_replay = None
            self.kept[step], self.now, self._model = self.now, None, None

    def _routers(self) -> dict:
        from megatron.core.transformer.moe.router import TopKRouter

        return {name: one for name, one in self._model.named_modules() if isinstance(one, TopKRouter)}

    def _keep_gradients(self, folder, state: dict, iteration: int, label: str) -> None:
        """In the place of Megatron's `save_grads`, which comes after backward and before the optimizer's step."""
        (found,) = state.values()
        gradients = {name: gradient.float().clone() for name, gradient in found.items()}
        if self.replay is not None:
            self.now.repeated = gradients
            return
        self.now.gradients = gradients
        # Not earlier: with overlapped gathers, weights arrive in the course of forward.
        self.now.weights = {name: weight.detach().cpu().clone() for name, weight in self._model.named_parameters()}


def errors_of(gradients: dict, truth: dict, device: str = "cpu") -> dict[str, list[float]]:
    """Per parameter: relative L2 error, largest absolute error, largest absolute value of the truth."""
    if set(gradients) != set(truth):
        raise ValueError(f"parameters differ: {sorted(set(gradients) ^ set(truth))[:4]}")
    found = {}
    for name, true in truth.items():
        true = true.to(device).double()
        apart = gradients[name].to(device).double() - true
        norm, off = true.norm().item(), apart.norm().item()
        relative = 0.0 if off == 0 else off / norm if norm > 0 else float("inf")
        found[name] = [relative, apart.abs().max().item(), true.abs().max().item()]
    return found


def judge(ours: dict[str, list[float]], theirs: dict[str, list[float]]) -> dict:
    """The 2x rule for every parameter: what breaks it, and the worst ratio. Both: what `errors_of` gives.

    Ours may be twice alltoall's: in L2, and in the largest element with one bf16 ulp of the tensor's largest added.
    Where alltoall was lucky with a parameter (an expert of few rows), its kind stands for it: the median of its errors.
    """
    kinds: dict[str, list[list[float]]] = {}
    for name, error in theirs.items():
        kinds.setdefault(_kind(name), []).append(error)
    typical = {kind: [median(error[i] for error in found) for i in (0, 1)] for kind, found in kinds.items()}
    broken, worst = [], 0.0
    for name, (relative, most, largest) in ours.items():
        usual, usual_most = typical[_kind(name)]
        allowed = TIMES * max(theirs[name][0], usual)
        allowed_most = TIMES * max(theirs[name][1], usual_most) + ulp(largest)
        if not (relative <= allowed and most <= allowed_most):  # a NaN breaks it too
            broken.append({"parameter": name, "error": relative, "allowed": allowed, "most": [most, allowed_most]})
        worst = max(worst, relative / allowed * TIMES if allowed else float("inf") if relative else 0.0)
    broken.sort(key=lambda one: one["error"] / one["allowed"] if one["allowed"] else float("inf"), reverse=True)
    return {
        "parameters": len(ours),
        "median_error": [median(error[0] for error in one.values()) for one in (ours, theirs)],
        "worst_ratio": worst,
        "broken": broken,
    }


def ulp(value: float) -> float:
    """One bf16 unit in the last place of `value`."""
    import math

    return 0.0 if value == 0 else 2.0 ** math.floor(math.log2(value)) * BF16_ULP


def _kind(name: str) -> str:
    """Parameters that differ by the rank, the layer or the expert alone are of one kind."""
    return re.sub(r"\d+", "#", name)


def work(case: dict) -> int:
    """One rank: all trainings, then the truth of each. Rank 0 writes losses and errors of all ranks to `answers`."""
    import torch
    import torch.distributed as dist

    from megamoe_train.megatron.install import install

    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    install()
    losses, errors = {}, {}
    for run in case["runs"]:
        losses[run["name"]], kept = _train(case, run)
        errors[run["name"]] = _errors(case, kept)
    everyone = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, (losses, errors))
    if dist.get_rank() == 0:
        # Losses are those of the last rank, as in Megatron.
        merged = {
            name: {step: {whose: {f"rank {r} {parameter}": error for r, (_, found) in enumerate(everyone)
                                  for parameter, error in found[name][step][whose].items()} for whose in by}
                   for step, by in steps.items()}
            for name, steps in errors.items() if steps
        }  # fmt: skip
        Path(case["answers"]).write_text(json.dumps({"losses": everyone[-1][0], "errors": merged}))
    dist.destroy_process_group()
    return 0


def _train(case: dict, run: dict) -> tuple[list[float], dict[int, Kept]]:
    from compare_training import moved_weights
    from training_faults import FAULTS

    tap = Tap(run["gradients"])
    with contextlib.ExitStack() as around:
        around.enter_context(tap.installed())
        if run.get("noise"):
            around.enter_context(moved_weights(run["noise"]))
        if run.get("fault"):
            around.enter_context(FAULTS[run["fault"]]())
        sets = [f"moe-dispatcher={run['dispatcher']}", f"train-iters={run['steps']}"]
        if run["dispatcher"] == "megamoe":
            sets.append(f"megamoe-backend={case['backend']}")
        return [loss for loss, _ in _pretrain(case, sets, tap)], tap.kept


def _errors(case: dict, kept: dict[int, Kept]) -> dict[str, dict]:
    """{step: {"ours": {parameter: error}, "alltoall": the same}} of the kept steps, which alltoall repeats."""
    import torch

    if not kept:
        return {}
    device = "cuda" if torch.cuda.is_available() else "cpu"
    _repeat(case, kept)
    rounded = {step: one.repeated for step, one in kept.items()}
    _repeat(case, kept, "bf16=false")
    return {
        str(step): {
            "ours": errors_of(one.gradients, one.repeated, device),
            "alltoall": errors_of(rounded[step], one.repeated, device),
        }
        for step, one in kept.items()
    }


def _repeat(case: dict, kept: dict[int, Kept], *sets: str) -> None:
    tap = Tap([], replay=list(kept.values()))
    with tap.installed():
        _pretrain(case, ["moe-dispatcher=alltoall", f"train-iters={len(kept)}", *REPEATED, *sets], tap)


def _pretrain(case: dict, sets: list[str], tap: Tap) -> list[tuple[float, float]]:
    from megatron.training.global_vars import set_global_variables

    from megamoe_train.training import data, job
    from megamoe_train.training.request import Request, check

    never = ("save=none", "load=none", "tensorboard-dir=none", "eval-iters=1", "eval-interval=1000000")
    request = Request(
        recipe=case["recipe"],
        out=Path(case["out"]),
        data=tuple(case["data"]),
        data_cache=Path(case["cache"]),
        sets=(*case["sets"], *sets, *never),
    )
    checked = check(request, int(os.environ["WORLD_SIZE"]))
    job.prepare_data(checked, print)
    set_global_variables(checked.args)
    return trainings.pretrain_once(checked.args, data.datasets, tap.forward_step)

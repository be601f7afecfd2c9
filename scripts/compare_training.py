"""The same training twice, by alltoall and by megamoe: losses in one plot, gradients by the 2x rule, times and memory.

    python scripts/compare_training.py                                  # V4-Flash proxy, all GPUs, 200 steps
    python scripts/compare_training.py --only curves --noise-runs 3     # and how far rounding moves alltoall
    python scripts/compare_training.py --only curves --fixed-rows 98304 # and megamoe with pools of a fixed size
    python scripts/compare_training.py --only gradients --faults weight wgrad slot clamp --noise-runs 3 \\
        --set num-layers=2 --set num-experts=8 --set activation-func-clamp-value=0.5 --out runs/check
    python scripts/compare_training.py --recipe debug --steps 20 --backend reference --set bf16=true   # on the CPU

*Curves*: same recipe, seed, data and order, each run in processes of its own; Megatron's experts (TEGroupedMLP where
TransformerEngine is installed, SequentialMLP where it is not) under alltoall, the fused call on the same parameters
under megamoe. A noise run is alltoall with every initial weight moved by one unit in the last place of its type, up or
down; megamoe has to stay within the largest distance of the noise runs. `--again` shows what chance alone does:
alltoall once more from the same weights. Step times are medians over the steps after the first `--skip`; memory is
the largest of any rank. A run that `--out` holds already is not repeated.

*Gradients*: of every parameter at `--gradient-steps`, beside what alltoall makes of the same step in bf16 and in fp32
(training_gradients.py). `--faults` trains megamoe with known faults (training_faults.py): each has to be noticed.

Writes compare.json and compare.png, and prints a table. Exit status 1 where a check fails.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import subprocess
import sys
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import median

import training_checks
import trainings
from megamoe_train.training import launch
from training_faults import FAULTS, replaced

PROXY = "deepseek_v4_flash_proxy_{}gpu_h100_bf16"
PROXY_RANKS = (1, 2, 4, 8)


def one_run(
    name: str, dispatcher: str, options: argparse.Namespace, ranks: int, *, noise: int = 0, sets: Sequence[str] = ()
) -> dict:
    """Trains once in a folder of its own, in processes of its own; what it measured. Raises RuntimeError."""
    out = options.out / name
    request = {
        "recipe": options.recipe,
        "out": str(out),
        "data": options.data,
        "sets": [
            f"moe-dispatcher={dispatcher}",
            f"train-iters={options.steps}",
            f"eval-interval={options.steps}",
            "save=none",  # a checkpoint of a proxy has tens of gigabytes
            "load=none",
            *([f"megamoe-backend={options.backend}"] if dispatcher == "megamoe" else []),
            *options.set,
            *sets,
        ],
        "cache": str(options.out / "data"),
    }
    case = {"request": request, "noise": noise, "ranks": ranks, "commit": _commit()}
    record = out / "record.json"
    if record.exists():
        kept = json.loads(record.read_text())
        if kept["case"] != case:
            raise RuntimeError(f"{out} holds a run of another kind; take another --out")
        print(f"{name}: as it stands in {record}", flush=True)
        return kept["run"]
    print(f"{name}: {dispatcher}, {options.steps} steps on {ranks} ranks", flush=True)
    job = trainings.start_ranks(ranks, "compare_training.py", "--rank", json.dumps(case), stdout=subprocess.PIPE)
    output, _ = job.communicate()
    if job.returncode:
        raise RuntimeError(f"{name} ended with status {job.returncode}:\n{output[-3000:]}")
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "loss" in line]
    if len(steps) != options.steps:
        raise RuntimeError(f"{name}: {len(steps)} steps of {options.steps} were recorded")
    memory = [json.loads(path.read_text()) for path in sorted((out / "logs").glob("memory-rank*.json"))]
    said = next(line for line in output.splitlines() if line.startswith("moe dispatcher "))
    run = {"name": name, "dispatcher": said.removeprefix("moe dispatcher "), "steps": steps, "memory": memory}
    record.write_text(json.dumps({"case": case, "run": run}))
    return run


def rank(case: dict) -> int:
    """One rank of a run: the training job itself, with the initial weights moved where that is asked for."""
    from megamoe_train.training import job
    from megamoe_train.training.request import Request

    asked = case["request"]
    request = Request(
        recipe=asked["recipe"],
        out=Path(asked["out"]),
        data=tuple(asked["data"]),
        data_cache=Path(asked["cache"]),
        sets=tuple(asked["sets"]),
    )
    with moved_weights(case["noise"]) if case["noise"] else contextlib.nullcontext():
        return job.run(request, verbose=False)


@contextlib.contextmanager
def moved_weights(seed: int) -> Iterator[None]:
    """Inside, each weight is moved to its upper or lower neighbour in its own type before an optimizer is made of it,
    which then starts from what was moved."""
    from megamoe_train.megatron.install import install

    install()
    from megatron.training import training

    def wrap(original):
        def get_megatron_optimizer(config, chunks, *rest, **more):
            for number, chunk in enumerate(chunks):
                for name, parameter in chunk.named_parameters():
                    move(parameter.data, seed, f"{number} {name}", shared=getattr(parameter, "allreduce", True))
            return original(config, chunks, *rest, **more)

        return get_megatron_optimizer

    with replaced(training, "get_megatron_optimizer", wrap):
        yield


def move(weight, seed: int, name: str, *, shared: bool) -> None:
    """In place. Ranks that share a parameter draw the same directions; experts, which they do not, draw their own."""
    import torch

    text = f"{seed} {name} {'' if shared else os.environ.get('RANK', '0')}"
    generator = torch.Generator(device=weight.device).manual_seed(zlib.crc32(text.encode()))
    up = torch.rand(weight.shape, generator=generator, device=weight.device) < 0.5
    far = torch.full_like(weight, float("inf"))
    weight.copy_(torch.where(up, torch.nextafter(weight, far), torch.nextafter(weight, -far)))


def summary(run: dict, skip: int, tokens: int) -> dict:
    """Median step of a run. tokens: of one step, all ranks."""
    steps = run["steps"][skip:] or run["steps"]
    seconds = median(tokens / step["tokens_per_s"] for step in steps)

    def middle(key: str) -> float | None:
        values = [step[key] for step in steps if step.get(key) is not None]
        return median(values) if values else None

    return {
        "dispatcher": run["dispatcher"],
        "step_ms": 1e3 * seconds,
        "tokens_per_s": tokens / seconds,
        "tflops_per_gpu": middle("tflops"),
        "mfu": middle("mfu"),
        "peak_allocated_gib": max((m["allocated"] for m in run["memory"]), default=0) / 2**30 or None,
        "peak_reserved_gib": max((m["reserved"] for m in run["memory"]), default=0) / 2**30 or None,
        "first_loss": run["steps"][0]["loss"],
        "last_loss": run["steps"][-1]["loss"],
    }


def draw(losses: dict[str, list[float]], title: str, path: Path) -> None:
    """All curves, and below them their distance from the first."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (upper, lower) = pyplot.subplots(2, 1, figsize=(8, 6.5), dpi=120, sharex=True, height_ratios=(3, 2))
    first, base = next(iter(losses.items()))
    for name, curve in losses.items():
        style = {"lw": 1.2}
        if name.startswith("noise"):
            style = {"lw": 0.8, "alpha": 0.6, "color": "0.6"}
        elif name.startswith("fault"):
            style = {"lw": 0.8, "ls": "--"}
        numbers = range(1, len(curve) + 1)
        upper.plot(numbers, curve, label=name, **style)
        if name != first:
            lower.plot(numbers, [abs(a - b) for a, b in zip(curve, base, strict=True)],
                       label=f"|{name} - {first}|", **style)  # fmt: skip
    upper.set(title=title, ylabel="loss (nats per token)")
    lower.set(xlabel="step", ylabel="|difference|")
    for axes in (upper, lower):
        axes.grid(alpha=0.3)
        axes.legend(fontsize="small")
    figure.tight_layout()
    figure.savefig(path)
    pyplot.close(figure)


def compare_curves(options: argparse.Namespace, ranks: int, tokens: int) -> dict:
    """Whole trainings in processes of their own; `passed` where megamoe is within the noise (or there is no noise)."""
    runs = [one_run(name, name, options, ranks) for name in ("alltoall", "megamoe")]
    if options.fixed_rows:
        fixed = ("megamoe-sizing=fixed", f"megamoe-capacity={options.fixed_rows}")
        runs.append(one_run("megamoe, fixed rows", "megamoe", options, ranks, sets=fixed))
    if options.again:
        runs.append(one_run("alltoall again", "alltoall", options, ranks))
    runs += [one_run(f"noise-{n}", "alltoall", options, ranks, noise=n) for n in range(1, options.noise_runs + 1)]
    losses = {run["name"]: [step["loss"] for step in run["steps"]] for run in runs}
    apart = {name: training_checks.distance(losses[name], losses["alltoall"]) for name in list(losses)[1:]}
    noise = training_checks.noise_of(losses)
    return {
        "summary": {run["name"]: summary(run, options.skip, tokens) for run in runs},
        "distance_from_alltoall": apart,
        "noise": noise,
        "losses": losses,
        "passed": noise is None
        or all(training_checks.within(apart[name], noise) for name in apart if name.startswith("megamoe")),
    }


def curves_table(curves: dict) -> str:
    """The curves for a reader."""
    rows = []
    for name, row in curves["summary"].items():
        tflops = f"{row['tflops_per_gpu']:.3g}" if row["tflops_per_gpu"] is not None else "-"
        mfu = f"{100 * row['mfu']:.1f}%" if row["mfu"] is not None else "-"
        peak = f"{row['peak_allocated_gib']:.1f}" if row["peak_allocated_gib"] else "-"
        speed = f"{row['step_ms']:.1f}", f"{row['tokens_per_s']:,.0f}"
        rows.append((name, *speed, tflops, mfu, peak, f"{row['last_loss']:.4f}"))
    header = ("run", "step ms", "tokens/s", "TFLOP/s/GPU", "MFU", "peak GiB", "last loss")
    lines = [trainings.table(header, rows)]
    for name, apart in curves["distance_from_alltoall"].items():
        lines.append(f"|{name} - alltoall|: max {apart['max']:.2e}, mean {apart['mean']:.2e}")
    if curves["noise"]:
        lines.append(f"megamoe within the noise of alltoall: {'yes' if curves['passed'] else 'NO: FAIL'}")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", help="default: the V4-Flash proxy for as many GPUs as there are (1, 2, 4 or 8)")
    parser.add_argument("--steps", type=int, default=200, help="of the curves")
    parser.add_argument("--skip", type=int, default=10, help="first steps that no time is taken from")
    parser.add_argument("--ranks", type=int, help="processes (default: 1, 2, 4 or 8 by the GPUs there are; 2 without)")
    parser.add_argument("--backend", default="fused", help="of megamoe (default: fused; the CPU has reference)")
    parser.add_argument("--only", choices=["curves", "gradients"], help="one of the two halves")
    parser.add_argument("--noise-runs", type=int, default=0, metavar="N", help="alltoall from weights moved by one ulp")
    parser.add_argument(
        "--fixed-rows", type=int, metavar="ROWS", help="one more curve: megamoe with pools of that size"
    )
    parser.add_argument("--again", action="store_true", help="one more curve: alltoall from the same weights")
    parser.add_argument("--gradient-steps", type=int, nargs="+", default=[1, 50], metavar="STEP")
    parser.add_argument("--faults", nargs="+", default=[], choices=list(FAULTS), help="each has to be noticed")
    parser.add_argument("--data", nargs="+", default=[], metavar="PATH")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="change a Megatron argument")
    parser.add_argument("--out", type=Path, default=Path("runs/compare"), help="runs of the curves stay there")
    parser.add_argument("--rank", help=argparse.SUPPRESS)
    parser.add_argument("--gradients-of", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.only == "gradients" and (options.again or options.fixed_rows):
        parser.error("--again and --fixed-rows are curves: not with --only gradients")
    if options.rank or options.gradients_of:
        trainings.die_with_parent()
    if options.rank:
        launch.leave(rank(json.loads(options.rank)))
    if options.gradients_of:
        import training_gradients

        return training_gradients.work(json.loads(options.gradients_of))
    return compare(options, parser)


def compare(options: argparse.Namespace, parser: argparse.ArgumentParser) -> int:
    import torch

    from megamoe_train import recipes
    from megamoe_train.training import settings

    gpus = torch.cuda.device_count()
    ranks = options.ranks or max((most for most in PROXY_RANKS if most <= gpus), default=2)
    options.recipe = options.recipe or PROXY.format(ranks)
    options.out = options.out.resolve()
    steps = sorted(set(options.gradient_steps))
    recipe = recipes.find(options.recipe, recipes.World(ranks, gpus))
    table = settings.from_recipe(recipe.settings)
    settings.apply_sets(table, options.set)
    tokens = settings.integer(table, "global-batch-size", 1) * settings.integer(table, "seq-length", 1)
    checks = options.out / "gradients"
    if options.only != "curves":
        if "bf16" not in table:
            parser.error("gradients of a training in fp32 have no truth here: --set bf16=true, or --only curves")
        if checks.exists() or steps[0] < 1:
            parser.error(f"--out: {checks} exists already" if checks.exists() else "--gradient-steps: 1 or more")
    report = {
        "recipe": options.recipe,
        "device": torch.cuda.get_device_name() if gpus else "CPU",
        "ranks": ranks,
        "tokens_per_step": tokens,
        "settings": options.set,
        "commit": _commit(),
    }
    tables, losses, passed = [], {}, True
    if options.only != "gradients":
        report["curves"] = curves = compare_curves(options, ranks, tokens)
        tables.append(curves_table(curves))
        losses, passed = curves["losses"], curves["passed"]
    if options.only != "curves":
        runs = training_checks.runs_of(steps, options.noise_runs, options.faults)
        case = {"recipe": options.recipe, "data": options.data, "sets": options.set, "backend": options.backend}
        case |= {"cache": str(options.out / "data"), "runs": runs}
        answers = training_checks.launch(case, ranks, checks, recipe.env)
        report["gradient_checks"] = found = training_checks.report_of(answers, options.faults)
        tables.append(training_checks.table(found))
        losses, passed = losses or found["losses"], passed and found["passed"]
    report["passed"] = passed
    (options.out / "compare.json").write_text(json.dumps(report, indent=1))
    draw(losses, f"{options.recipe}, {ranks} x {report['device']}", options.out / "compare.png")
    print(f"{options.out / 'compare.json'}, {options.out / 'compare.png'}")
    print("\n".join([*tables, "PASS" if passed else "FAIL"]))
    return 0 if passed else 1


def _commit() -> str:
    asked = subprocess.run(["git", "rev-parse", "HEAD"], cwd=trainings.ROOT, capture_output=True, text=True)
    return asked.stdout.strip() or "unknown"


if __name__ == "__main__":
    sys.exit(main())

"""The same training twice, by alltoall and by megamoe: both losses in one plot, times and memory in JSON.

    python scripts/compare_training.py --out runs/compare                  # V4-Flash proxy, 2 GPUs, 200 steps
    python scripts/compare_training.py --out runs/compare --noise-runs 3   # and how far rounding moves alltoall
    python scripts/compare_training.py --recipe debug --steps 20 --backend reference --out runs/compare     # on the CPU

Same recipe, seed, data and order; Megatron's experts (TEGroupedMLP where TransformerEngine is installed, SequentialMLP
where it is not) under alltoall, the fused call on the same parameters under megamoe. A noise run is alltoall with every
initial weight moved by one unit in the last place of its type, up or down. Writes compare.json and compare.png, and
prints a table. Step times are medians over the steps after the first `--skip`; memory is the largest of any rank.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import zlib
from pathlib import Path
from statistics import median

ROOT = Path(__file__).resolve().parent.parent
PROXY = "deepseek_v4_flash_proxy_{}gpu_h100_bf16"


def one_run(name: str, dispatcher: str, options: argparse.Namespace, ranks: int, noise: int = 0) -> dict:
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
        ],
        "cache": str(options.out / "data"),
    }
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks), __file__]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))}
    environment.setdefault("OMP_NUM_THREADS", "1")
    rank = json.dumps({"request": request, "noise": noise})
    print(f"{name}: {dispatcher}, {options.steps} steps on {ranks} ranks", flush=True)
    done = subprocess.run([*command, "--rank", rank], env=environment, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise RuntimeError(f"{name} ended with status {done.returncode}:\n{done.stdout[-3000:]}")
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "loss" in line]
    if len(steps) != options.steps:
        raise RuntimeError(f"{name}: {len(steps)} steps of {options.steps} were recorded")
    memory = [json.loads(path.read_text()) for path in sorted((out / "logs").glob("memory-rank*.json"))]
    said = next(line for line in done.stdout.splitlines() if line.startswith("moe dispatcher "))
    return {"name": name, "dispatcher": said.removeprefix("moe dispatcher "), "steps": steps, "memory": memory}


def rank(case: dict) -> int:
    """One rank of a run: the training job itself, with the initial weights moved where that is asked for."""
    from megamoe_train.training import job
    from megamoe_train.training.request import Request

    if case["noise"]:
        _move_initial_weights(case["noise"])
    asked = case["request"]
    request = Request(
        recipe=asked["recipe"],
        out=Path(asked["out"]),
        data=tuple(asked["data"]),
        data_cache=Path(asked["cache"]),
        sets=tuple(asked["sets"]),
    )
    return job.run(request, verbose=False)


def _move_initial_weights(seed: int) -> None:
    """Wrap Megatron's `get_model`: after it, each weight is its upper or lower neighbour in its own type."""
    from megamoe_train.megatron.install import install

    install()
    from megatron.training import training

    original = training.get_model

    def get_model(*args, **kwargs):
        chunks = original(*args, **kwargs)
        for number, chunk in enumerate(chunks):
            for name, parameter in chunk.named_parameters():
                move(parameter.data, seed, f"{number} {name}", shared=getattr(parameter, "allreduce", True))
        return chunks

    training.get_model = get_model


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


def distance(one: dict, other: dict) -> dict:
    """Largest and mean |difference| of two loss curves."""
    apart = [abs(a["loss"] - b["loss"]) for a, b in zip(one["steps"], other["steps"], strict=True)]
    return {"max": max(apart), "mean": sum(apart) / len(apart)}


def draw(runs: list[dict], title: str, path: Path) -> None:
    """All curves, and below them their distance from the first."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (upper, lower) = pyplot.subplots(2, 1, figsize=(8, 6.5), dpi=120, sharex=True, height_ratios=(3, 2))
    first = runs[0]
    for run in runs:
        noise = run["name"].startswith("noise")
        style = {"lw": 0.8, "alpha": 0.6, "color": "0.6"} if noise else {"lw": 1.2}
        numbers = [step["step"] for step in run["steps"]]
        upper.plot(numbers, [step["loss"] for step in run["steps"]], label=run["name"], **style)
        if run is not first:
            apart = [abs(a["loss"] - b["loss"]) for a, b in zip(run["steps"], first["steps"], strict=True)]
            lower.plot(numbers, apart, label=f"|{run['name']} - {first['name']}|", **style)
    upper.set(title=title, ylabel="loss (nats per token)")
    lower.set(xlabel="step", ylabel="|difference|")
    for axes in (upper, lower):
        axes.grid(alpha=0.3)
        axes.legend()
    figure.tight_layout()
    figure.savefig(path)
    pyplot.close(figure)


def tokens_of_a_step(options: argparse.Namespace, ranks: int, gpus: int) -> int:
    from megamoe_train import recipes
    from megamoe_train.training import settings

    table = settings.from_recipe(recipes.find(options.recipe, recipes.World(ranks, gpus)).settings)
    settings.apply_sets(table, options.set)
    return settings.integer(table, "global-batch-size", 1) * settings.integer(table, "seq-length", 1)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", help="default: the V4-Flash proxy for as many GPUs as there are (1 or 2)")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--skip", type=int, default=10, help="first steps that no time is taken from")
    parser.add_argument("--ranks", type=int, help="processes (default: one for each GPU, at most 2; 2 without)")
    parser.add_argument("--backend", default="fused", help="of megamoe (default: fused; the CPU has reference)")
    parser.add_argument("--noise-runs", type=int, default=0, metavar="N", help="alltoall from weights moved by one ulp")
    parser.add_argument("--data", nargs="+", default=[], metavar="PATH")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="change a Megatron argument")
    parser.add_argument("--out", type=Path, default=Path("runs/compare"), help="must not hold an earlier comparison")
    parser.add_argument("--rank", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.rank:
        return rank(json.loads(options.rank))
    import torch

    gpus = torch.cuda.device_count()
    ranks = options.ranks or min(gpus, 2) or 2
    options.recipe = options.recipe or PROXY.format(ranks)
    options.out = options.out.resolve()
    if (options.out / "alltoall").exists():
        parser.error(f"--out: {options.out} holds a comparison already")
    runs = [one_run("alltoall", "alltoall", options, ranks), one_run("megamoe", "megamoe", options, ranks)]
    runs += [one_run(f"noise-{n}", "alltoall", options, ranks, noise=n) for n in range(1, options.noise_runs + 1)]
    tokens = tokens_of_a_step(options, ranks, gpus)
    report = {
        "recipe": options.recipe,
        "device": torch.cuda.get_device_name() if gpus else "CPU",
        "ranks": ranks,
        "tokens_per_step": tokens,
        "settings": options.set,
        "commit": _commit(),
        "summary": {run["name"]: summary(run, options.skip, tokens) for run in runs},
        "distance_from_alltoall": {run["name"]: distance(run, runs[0]) for run in runs[1:]},
        "losses": {run["name"]: [step["loss"] for step in run["steps"]] for run in runs},
    }
    noise = [apart for name, apart in report["distance_from_alltoall"].items() if name.startswith("noise")]
    if noise:
        ours, most = report["distance_from_alltoall"]["megamoe"], {k: max(n[k] for n in noise) for k in ("max", "mean")}
        report["within_noise"] = all(ours[key] <= most[key] for key in most)
    (options.out / "compare.json").write_text(json.dumps(report, indent=1))
    draw(runs, f"{options.recipe}, {ranks} x {report['device']}", options.out / "compare.png")
    print(_table(report))
    print(f"{options.out / 'compare.json'}, {options.out / 'compare.png'}")
    return 0 if report.get("within_noise", True) else 1


def _commit() -> str:
    asked = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    return asked.stdout.strip() or "unknown"


def _table(report: dict) -> str:
    """The report for a reader."""
    lines = [
        f"{'run':<10} {'step ms':>9} {'tokens/s':>10} {'TFLOP/s/GPU':>12} {'MFU':>6} {'peak GiB':>9} {'last loss':>10}"
    ]
    for name, row in report["summary"].items():
        tflops = f"{row['tflops_per_gpu']:.3g}" if row["tflops_per_gpu"] is not None else "-"
        mfu = f"{100 * row['mfu']:.1f}%" if row["mfu"] is not None else "-"
        peak = f"{row['peak_allocated_gib']:.1f}" if row["peak_allocated_gib"] else "-"
        lines.append(
            f"{name:<10} {row['step_ms']:>9.1f} {row['tokens_per_s']:>10,.0f} {tflops:>12} {mfu:>6} {peak:>9} "
            f"{row['last_loss']:>10.4f}"
        )
    for name, apart in report["distance_from_alltoall"].items():
        lines.append(f"|{name} - alltoall|: max {apart['max']:.2e}, mean {apart['mean']:.2e}")
    if "within_noise" in report:
        lines.append(f"megamoe within the noise of alltoall: {'yes' if report['within_noise'] else 'NO'}")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())

"""The gradient checks of compare_training.py: launched, judged, told. training_gradients.py is what the ranks run."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import trainings
from training_gradients import TIMES, judge

SHOWN = 3  # parameters that break the rule, in the table


def runs_of(steps: list[int], noise_runs: int, faults: list[str]) -> list[dict]:
    """What the ranks train, one after another. A fault has to show in its first gradients, and in the whole curve."""
    last = max(steps)
    runs = [
        {"name": "alltoall", "dispatcher": "alltoall", "steps": last, "gradients": []},
        {"name": "megamoe", "dispatcher": "megamoe", "steps": last, "gradients": steps},
    ]
    runs += [
        {"name": f"noise-{n}", "dispatcher": "alltoall", "steps": last, "gradients": [], "noise": n}
        for n in range(1, noise_runs + 1)
    ]
    return runs + [
        {"name": f"fault {name}", "dispatcher": "megamoe", "steps": last, "gradients": steps[:1], "fault": name}
        for name in faults
    ]


def launch(case: dict, ranks: int, folder: Path, env: dict[str, str]) -> dict:
    """Trains all of `case["runs"]`; losses and errors of each. Raises RuntimeError."""
    folder.mkdir(parents=True)
    case |= {"out": str(folder), "answers": str(folder / "answers.json")}
    print(f"gradients: {', '.join(run['name'] for run in case['runs'])} on {ranks} ranks", flush=True)
    log = folder / "ranks.log"
    # What is fp32 has to be fp32: this switch reaches the products of TransformerEngine too.
    forced = {"NVIDIA_TF32_OVERRIDE": "0"}
    with log.open("w") as file:
        given = "--gradients-of", json.dumps(case)
        job = trainings.start_ranks(
            ranks, "compare_training.py", *given, defaults=env, forced=forced, stdout=file, stderr=subprocess.STDOUT
        )
        job.wait()
    if job.returncode:
        raise RuntimeError(f"gradients ended with status {job.returncode}:\n{log.read_text()[-3000:]}")
    return json.loads(Path(case["answers"]).read_text())


def report_of(answers: dict, faults: list[str]) -> dict:
    """Every check with `passed`: ours passes where it keeps the rule, a fault where it breaks one."""
    errors, losses = answers["errors"], answers["losses"]

    def judged(name: str) -> dict[str, dict]:
        return {step: judge(both["ours"], both["alltoall"]) for step, both in errors[name].items()}

    gradients = judged("megamoe")
    found = {"losses": losses, "gradients": gradients, "faults": {}}
    envelope = noise_of(losses)
    for fault in faults:
        name = f"fault {fault}"
        by_gradients = judged(name)
        apart = distance(losses[name], losses["alltoall"])
        found["faults"][fault] = {
            "gradients": by_gradients,
            "distance": apart,
            "by_gradients": any(one["broken"] for one in by_gradients.values()),
            "by_curve": bool(envelope) and not within(apart, envelope),
        }
    found["passed"] = not any(one["broken"] for one in gradients.values()) and all(
        fault["by_gradients"] or fault["by_curve"] for fault in found["faults"].values()
    )
    return found


def distance(one: list[float], other: list[float]) -> dict[str, float]:
    """Largest and mean |difference| of two loss curves."""
    apart = [abs(a - b) for a, b in zip(one, other, strict=True)]
    # A curve that left the numbers is as far away as can be; max() would pass over a NaN.
    apart = [value if value == value else float("inf") for value in apart]
    return {"max": max(apart), "mean": sum(apart) / len(apart)}


def noise_of(losses: dict[str, list[float]]) -> dict[str, float] | None:
    """The envelope: the largest of both distances of any noise run. None without noise runs.

    Raises RuntimeError for a noise run that is alltoall's to the bit: then no weight was moved.
    """
    apart = [distance(curve, losses["alltoall"]) for name, curve in losses.items() if name.startswith("noise")]
    if any(one["max"] == 0 for one in apart):
        raise RuntimeError("a noise run is equal to alltoall's: its weights were not moved")
    return {key: max(one[key] for one in apart) for key in ("max", "mean")} if apart else None


def within(apart: dict[str, float], envelope: dict[str, float]) -> bool:
    return all(apart[key] <= envelope[key] for key in envelope)


def table(report: dict) -> str:
    """The report for a reader."""
    header = ("gradients", "parameters", "median error", "alltoall's", f"worst ratio (<= {TIMES:g})", "broken", "")
    rows = []
    for step, judged in report["gradients"].items():
        rows.append(_row(f"megamoe, step {step}", judged, "FAIL" if judged["broken"] else "pass"))
    for name, fault in report["faults"].items():
        by = [what for what in ("gradients", "curve") if fault[f"by_{what}"]]
        verdict = f"noticed by {' and '.join(by)}" if by else "NOT NOTICED: FAIL"
        rows += [_row(f"fault {name}, step {step}", judged, verdict) for step, judged in fault["gradients"].items()]
    lines = [trainings.table(header, rows)]
    for step, judged in report["gradients"].items():
        for one in judged["broken"][:SHOWN]:
            most, allowed_most = one["most"]
            lines.append(
                f"  step {step}, {one['parameter']}: error {one['error']:.2e} of {one['allowed']:.2e}, "
                f"largest {most:.2e} of {allowed_most:.2e}"
            )
    return "\n".join(lines)


def _row(name: str, judged: dict, verdict: str) -> tuple[str, ...]:
    ours, theirs = judged["median_error"]
    worst, broken = f"{judged['worst_ratio']:.2f}", str(len(judged["broken"]))
    return name, str(judged["parameters"]), f"{ours:.2e}", f"{theirs:.2e}", worst, broken, verdict

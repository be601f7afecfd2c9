"""What a run has measured so far: one JSON line per step and per validation, and a picture of the losses.

`{"step": 7, "loss": 6.1, "lr": ..., "grad_norm": ..., "tokens_per_s": ..., "tflops": ..., "mfu": ..., "load": [[min,
max, cv], ...]}` has one triple per MoE layer (fewest and most tokens of an expert over the layer's mean, and their
coefficient of variation), on a GPU also `allocated_gib` and `reserved_gib`, the last rank's peaks so far, and at every
step that `--log-layers` asks for `"layers": {number: {least, most, cv, empty, dropped}}`, on a GPU with the last rank's
`forward_ms`, `backward_ms`, `forward_overlap`, `backward_overlap` (passes.py);
`{"step": 50, "validation_loss": 5.2}` is one evaluation.
"""

import json
import os
from pathlib import Path
from typing import TextIO


class Metrics:
    """The lines of one run, in memory and in `path`. A run that resumes at `step` drops what came after it."""

    def __init__(self, path: Path, step: int = 0) -> None:
        self.path = path
        self.steps: list[dict] = []
        self.validations: list[dict] = []
        for line in _complete_lines(path):
            if 0 < step >= line["step"]:  # at step 0 a new run begins, and measures step 0 itself
                self._keep(line)
        self._file = self._rewritten()

    def add(self, line: dict) -> None:
        """Keep `line` and write it at once, so that a killed run loses nothing."""
        self._keep(line)
        self._file.write(json.dumps(line) + "\n")

    def validation_at(self, step: int) -> float | None:
        """The validation loss measured at `step`."""
        return next((line["validation_loss"] for line in self.validations if line["step"] == step), None)

    def _keep(self, line: dict) -> None:
        (self.validations if "validation_loss" in line else self.steps).append(line)

    def _rewritten(self) -> TextIO:
        part = self.path.with_suffix(".part")
        file = part.open("w", buffering=1)
        for line in sorted(self.steps + self.validations, key=lambda line: line["step"]):
            file.write(json.dumps(line) + "\n")
        os.replace(part, self.path)
        return file


def _complete_lines(path: Path) -> list[dict]:
    """The lines of an earlier session; a last line cut short by a kill is left out."""
    if not path.exists():
        return []
    lines = path.read_text().splitlines(keepends=True)
    return [json.loads(line) for line in lines if line.endswith("}\n")]


def draw(metrics: Metrics, title: str, path: Path) -> None:
    """Training and validation loss over steps, as a PNG at `path`, which is replaced whole."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 4.5), dpi=120)
    axes.plot(
        [line["step"] for line in metrics.steps], [line["loss"] for line in metrics.steps], lw=0.9, label="training"
    )
    points = [(line["step"], line["validation_loss"]) for line in metrics.validations]
    axes.plot(*zip(*points, strict=True) if points else ([], []), "o-", color="tab:red", label="validation")
    for step, loss in (points[0], points[-1]) if len(points) > 1 else ():
        axes.annotate(f"{loss:.2f}", (step, loss), textcoords="offset points", xytext=(4, 8), color="tab:red")
    axes.set(title=title, xlabel="step", ylabel="loss (nats per token)")
    axes.grid(alpha=0.3)
    axes.margins(y=0.1)
    axes.legend()
    figure.tight_layout()
    part = path.with_suffix(".part.png")
    figure.savefig(part)
    pyplot.close(figure)
    os.replace(part, path)

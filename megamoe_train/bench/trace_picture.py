"""A picture of a trace: the roles of a few CTAs over time."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

ROLES = ("scheduler", "loader", "math", "storer", "mover")
COLOURS = {"fc1": "#4477aa", "fc2": "#66ccee", "dgrad2": "#4477aa", "dgrad1": "#66ccee", "wgrad2": "#228833",
           "wgrad1": "#ccbb44", "pull": "#ee6677", "sums": "#aa3377"}  # fmt: skip
CTAS = (0, 1, 64)  # of these pictures; 0 and 1 are one cluster


def draw(events: Sequence[dict], path: Path, title: str) -> None:
    """events: of bench/trace.py: chrome(); microseconds."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    lanes = [(cta, role) for cta in CTAS for role in ROLES if any(e["pid"] == cta and e["tid"] == role for e in events)]
    figure, axes = pyplot.subplots(figsize=(16, 0.42 * len(lanes) + 1.4))
    for number, (cta, role) in enumerate(lanes):
        here = [e for e in events if e["pid"] == cta and e["tid"] == role]
        spans = [(e["ts"], e["dur"]) for e in here]
        axes.broken_barh(spans, (number - 0.4, 0.8), facecolors=[_colour(e["name"]) for e in here])
    axes.set_yticks(range(len(lanes)), [f"CTA {cta} {role}" for cta, role in lanes])
    axes.invert_yaxis()
    axes.set_xlabel("microseconds since the first CTA began")
    axes.set_title(title)
    names = [name for name in COLOURS if any(name in e["name"] for e in events)]
    handles = [pyplot.Rectangle((0, 0), 1, 1, color=COLOURS[name]) for name in names]
    handles.append(pyplot.Rectangle((0, 0), 1, 1, color="#bbbbbb"))
    axes.legend(handles, [*names, "epilogue, waits"], ncols=len(handles), loc="upper right", fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def _colour(name: str) -> str:
    if "awaited" in name or name.startswith(("epilogue", "inputs")):
        return "#bbbbbb"
    return next((colour for word, colour in COLOURS.items() if word in name), "#999999")

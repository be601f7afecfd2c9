#!/usr/bin/env python3
"""Tables for docs/performance.md from files of `bench layer --json`: ours beside every other candidate of the same run.

    python -m megamoe_train.bench layer --shape flash --ep 2 --json flash.json
    python scripts/bench_table.py flash.json pro.json

"vs X": how many times as long X took; above 1 ours is faster.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

OURS = "ours"
NEEDED = 0.80  # share of cuBLAS


def _where(file: dict) -> dict:
    return {"shape": file["shape"], "ep": file["ep"]}


def _line(*cells: object) -> str:
    return f"| {' | '.join(str(cell) for cell in cells)} |"


def _head(*cells: str) -> list[str]:
    return [_line(*cells), "|" + "---|" * len(cells)]


def rows_of(file: dict) -> list[dict]:
    """One row per mode and pass: ours, and how many times as long the others took."""
    by = {}
    for row in file["rows"]:
        by.setdefault((row["mode"], row["pass"]), {})[row["candidate"]] = row
    found = []
    for (mode, one), candidates in by.items():
        if OURS not in candidates:
            raise ValueError(f"{file['shape']}, {mode}, {one}: no row of {OURS!r} among {sorted(candidates)}")
        ours = candidates.pop(OURS)
        others = {name: row["ms"] / ours["ms"] for name, row in candidates.items()}
        found.append(
            {"shape": file["shape"], "ep": file["ep"], "mode": mode, "pass": one, "ours": ours, "others": others}
        )
    return found


def totals_of(file: dict) -> list[dict]:
    """Forward and backward together, by mode, for every candidate that ran both: milliseconds."""
    sums: dict[str, dict[str, list[float]]] = {}
    for row in file["rows"]:
        sums.setdefault(row["mode"], {}).setdefault(row["candidate"], []).append(row["ms"])
    return [
        {
            "shape": file["shape"],
            "ep": file["ep"],
            "mode": mode,
            "ms": {n: sum(ms) for n, ms in of.items() if len(ms) == 2},
        }
        for mode, of in sums.items()
    ]


def memory_of(file: dict) -> dict[str, tuple[int, int]]:
    """Bytes kept for backward and peak, the most of any row, by candidate."""
    found: dict[str, tuple[int, int]] = {}
    for row in file["rows"]:
        kept, peak = found.get(row["candidate"], (0, 0))
        found[row["candidate"]] = max(kept, row["kept_bytes"]), max(peak, row["peak_bytes"])
    return found


def passes_table(files: list[dict]) -> list[str]:
    rows = [row for file in files for row in rows_of(file)]
    names = list(dict.fromkeys(name for row in rows for name in row["others"]))
    columns = "shape", "EP", "pass", "mode", "ours, ms", "share of cuBLAS", "NVLink, GB/s"
    lines = _head(*columns, *(f"vs {name}" for name in names))
    for row in rows:
        ours = row["ours"]
        share = f"{ours['share']:.1%}" + ("" if ours["share"] >= NEEDED else " *")
        figures = f"{ours['ms']:.3f}", share, f"{ours['nvlink_gbs']:.0f}"
        lines.append(
            _line(row["shape"], row["ep"], row["pass"], row["mode"], *figures, *_ratios(row["others"], names, 1.0))
        )
    return [*lines, "", f"*: below {NEEDED:.0%}."]


def _ratios(values: dict[str, float], names: list[str], ours: float) -> list[str]:
    return [f"{values[name] / ours:.2f}x" if name in values else "-" for name in names]


def totals_table(files: list[dict]) -> list[str]:
    totals = [total for file in files for total in totals_of(file) if OURS in total["ms"]]
    names = list(dict.fromkeys(name for total in totals for name in total["ms"] if name != OURS))
    lines = _head("shape", "EP", "mode", "both passes, ms", *(f"vs {name}" for name in names))
    for total in totals:
        ours = total["ms"][OURS]
        ratios = _ratios(total["ms"], names, ours)
        lines.append(_line(total["shape"], total["ep"], total["mode"], f"{ours:.3f}", *ratios))
    return lines


def memory_table(files: list[dict]) -> list[str]:
    lines = _head("shape", "EP", "candidate", "kept, GB", "peak, GB", "our workspace, GB")
    for file in files:
        for name, sizes in memory_of(file).items():
            space = f"{file['workspace_bytes'] / 1e9:.2f}" if name.startswith(OURS) else "-"
            lines.append(_line(*_where(file).values(), name, *(f"{size / 1e9:.3f}" for size in sizes), space))
    return lines


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("files", nargs="+", type=Path, help="written by `bench layer --json`")
    args = parser.parse_args(argv)
    try:
        files = [json.loads(path.read_text()) for path in args.files]
        machines = dict.fromkeys(f"{file['device']}, commit {file['commit']}, {file['clocks']}" for file in files)
        tables = [passes_table(files), totals_table(files), memory_table(files)]
    except (OSError, ValueError, KeyError, TypeError) as error:
        print(f"bench_table: {type(error).__name__}: {error}", file=sys.stderr)
        return 2
    print(*(f"Measured on {machine}." for machine in machines), sep="\n")
    for file in files:
        for name, why in file["absent"].items():
            print(f"{file['shape']}, EP = {file['ep']}: {name} was not measured: {why}")
    for table in tables:
        print("", *table, sep="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Command line of the benchmarks."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

import torch

from . import dispatch, energy, fused, gemm, layer, trace


def commit() -> str:
    """The commit measured, with '+' for uncommitted changes; 'unknown' outside a checkout."""
    here = Path(__file__).parent
    try:
        head = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=here, capture_output=True, text=True)
        dirty = subprocess.run(["git", "status", "--porcelain", "-uno"], cwd=here, capture_output=True, text=True)
    except OSError:
        return "unknown"
    return head.stdout.strip() + ("+" if dirty.stdout.strip() else "") if head.returncode == 0 else "unknown"


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m megamoe_train.bench")
    tables = parser.add_subparsers(dest="table", required=True)
    one = tables.add_parser("gemm", help="the six grouped products beside torch._grouped_mm and cuBLAS")
    one.add_argument("--shapes", nargs="+", choices=gemm.SHAPES, default=list(gemm.SHAPES))
    one.add_argument("--groups", nargs="+", choices=["even", "random"], default=["even", "random"])
    one.add_argument("--products", nargs="+", choices=gemm.PRODUCTS, default=list(gemm.PRODUCTS))
    one.add_argument("--modes", nargs="+", choices=["paced", "sustained"], default=["paced", "sustained"])
    one.add_argument("--iterations", type=int, default=30)
    one.add_argument("--json", type=Path, help="also write the rows here")
    dispatch.add_arguments(tables)
    layer.add_arguments(tables)
    fused.add_arguments(tables)
    trace.add_arguments(tables)
    energy.add_arguments(tables)
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    args = parse(sys.argv[1:] if argv is None else argv)
    if not torch.cuda.is_available():
        print("megamoe_train.bench needs a GPU: torch sees none", file=sys.stderr)
        return 2
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, commit {commit()}")
    if args.table == "layer":
        return layer.main(args, commit())
    if args.table == "trace":
        return trace.main(args)
    if args.table == "dispatch":
        rows = dispatch.run(args)
    elif args.table == "fused":
        rows = fused.table(args)
    elif args.table == "energy":
        try:
            rows = energy.run(args)
        except energy.NotRead as error:
            print(error, file=sys.stderr)
            return 2
    else:
        rows = gemm.run(args.shapes, args.groups, args.products, args.modes, args.iterations)
    if args.json:
        header = {"device": torch.cuda.get_device_name(), "commit": commit(), "backend": "fused"}
        args.json.write_text(json.dumps({**header, "rows": rows}, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""scripts/bench_table.py: what `bench layer --json` wrote, as the tables of docs/performance.md."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[1] / "scripts/bench_table.py"
MS = {"ours": (4.0, 9.0), "unfused": (6.0, 9.9), "megatron": (5.0, 12.6)}  # forward, backward


def file_of(candidates=tuple(MS), shape="flash", **more) -> dict:
    rows = [
        {"mode": mode, "pass": one, "candidate": name, "seed": 0, "ms": MS[name][backward] * slower, "tflops": 0,
         "cublas_tflops": 0, "share": (0.85, 0.75)[backward], "nvlink_gbs": 84.2, "host_ms": 1.0,
         "kept_bytes": 437_000_000, "peak_bytes": 2_100_000_000 + backward}
        for mode, slower in (("paced", 1.0), ("sustained", 1.1))
        for name in candidates
        for backward, one in enumerate(("fwd", "bwd"))
    ]  # fmt: skip
    header = {"device": "NVIDIA H100", "commit": "abc1234", "clocks": "1980 MHz", "shape": shape, "ep": 2}
    return header | {"workspace_bytes": 540_000_000, "absent": {}, "rows": rows} | more


def run(tmp_path: Path, *files: object) -> subprocess.CompletedProcess:
    paths = [tmp_path / f"{number}.json" for number in range(len(files))]
    for path, file in zip(paths, files, strict=True):
        path.write_text(json.dumps(file))
    return subprocess.run([sys.executable, SCRIPT, *paths], capture_output=True, text=True, timeout=60)


def test_ours_stands_beside_every_candidate_of_its_run(tmp_path):
    alone = file_of(("ours", "unfused"), shape="pro", absent={"megatron": "megatron-core is not installed"})
    done = run(tmp_path, file_of(), alone)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0] == "Measured on NVIDIA H100, commit abc1234, 1980 MHz."
    assert "pro, EP = 2: megatron was not measured: megatron-core is not installed" in lines
    assert "| flash | 2 | fwd | paced | 4.000 | 85.0% | 84 | 1.50x | 1.25x |" in lines
    assert "| pro | 2 | bwd | sustained | 9.900 | 75.0% * | 84 | 1.10x | - |" in lines
    assert "| flash | 2 | paced | 13.000 | 1.22x | 1.35x |" in lines  # both passes
    assert (
        "| flash | 2 | ours | 0.437 | 2.100 | 0.54 |" in lines and "| pro | 2 | unfused | 0.437 | 2.100 | - |" in lines
    )


@pytest.mark.parametrize(
    ("file", "said"),
    [(file_of(("unfused",)), "no row of 'ours'"), ({"rows": []}, "KeyError"), ([], "bench_table")],
)
def test_other_files_are_refused_in_one_line(tmp_path, file, said):
    done = run(tmp_path, file)
    assert done.returncode == 2 and said in done.stderr and len(done.stderr.splitlines()) == 1, done.stderr

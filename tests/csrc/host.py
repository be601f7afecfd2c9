"""Compiles the host programs of this folder against csrc/ or a changed copy of it."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

HERE = Path(__file__).parent
CSRC = HERE.parents[1] / "csrc"


def compile_host(source: str | Path, folder: Path, csrc: Path = CSRC) -> Path:
    """The binary of `source`, a file of this folder or a path, in `folder`. AssertionError without a C++ compiler."""
    compiler = shutil.which("g++") or shutil.which("c++")
    assert compiler, "the CPU tests of csrc/schedule need a C++ compiler (g++ or c++) on PATH"
    binary = folder / Path(source).stem
    command = [compiler, "-std=c++20", "-O1", "-Wall", "-Werror", f"-I{csrc}", "-o", binary, HERE / source]
    subprocess.run(command, check=True)
    return binary

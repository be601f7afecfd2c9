"""Builds csrc's plan, dispatch and combine for the emulator: the kernels' source, with CUDA's syntax rewritten."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import torch

HERE = Path(__file__).parent
CSRC = HERE.parents[2] / "csrc"
SOURCES = ("kernels/plan.cu", "kernels/dispatch.cu", "kernels/combine.cu", "host/checks.cu", "host/comm.cu", "bindings_comm.cpp")


def rewritten(text: str) -> str:
    """Launches become calls, dynamic shared memory a pointer, operators for CUDA tensors operators for CPU tensors."""
    text = re.sub(r"(\w+)<<<(.*?)>>>\(", r"emulator::launch(&\1, \2, ", text, flags=re.DOTALL)
    text = re.sub(
        r"extern __shared__ (?:__align__\(\d+\) )?(\w+) (\w+)\[\];",
        r"\1* \2 = reinterpret_cast<\1*>(emulator::dynamic_shared());",
        text,
    )
    return text.replace("(megamoe, CUDA, m)", "(megamoe, CPU, m)")


def build(folder: Path, changes: dict[str, tuple[str, str]] | None = None) -> Path:
    """The operators as a library of CPU operators. `changes`: file -> (text, what replaces it), for mutation tests."""
    tree = folder / "csrc"
    for part in ("comm", "host", "kernels", "layout", "roles", "schedule", "."):
        (tree / part).mkdir(parents=True, exist_ok=True)
        for path in (CSRC / part).glob("*.*"):
            (tree / part / path.name).write_text(rewritten(path.read_text()))
    for name, (old, new) in (changes or {}).items():
        text = (tree / name).read_text()
        assert text.count(old) >= 1, f"{name} has no {old!r} any more"
        (tree / name).write_text(text.replace(old, new))
    include = Path(torch.__file__).parent / "include"
    flags = ["-std=c++20", "-O1", "-fPIC", "-w", "-x", "c++", f"-I{HERE}", f"-I{tree}"]
    system = [f"-isystem{include}", f"-isystem{include / 'torch/csrc/api/include'}"]
    objects = []
    for name in SOURCES:
        objects.append(folder / (name.replace("/", "_") + ".o"))
        subprocess.run(["g++", *flags, *system, "-c", tree / name, "-o", objects[-1]], check=True)
    objects.append(folder / "emulator.o")
    subprocess.run(["g++", *flags, "-c", HERE / "emulator.cpp", "-o", objects[-1]], check=True)
    library = folder / "emulated.so"
    lib = Path(torch.__file__).parent / "lib"
    subprocess.run(
        ["g++", "-shared", "-o", library, *objects, f"-L{lib}", "-ltorch_cpu", "-lc10", "-lpthread"], check=True
    )
    return library

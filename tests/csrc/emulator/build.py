"""Builds all of csrc for the emulator, its CUDA syntax rewritten: `python -m tests.csrc.emulator.build FOLDER`."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import torch

HERE = Path(__file__).parent
CSRC = HERE.parents[2] / "csrc"
EMULATOR = ("emulator.cpp", "copies.cpp", "matrix.cpp", "memory.cpp")
POISONED = "-Daoti_torch_empty_strided=emulator_empty_strided"  # memory.cpp
FLAGS = ("-std=c++20", "-O1", "-fPIC", "-fno-strict-aliasing", "-w", "-Wno-psabi", "-x", "c++")
SMALLER = {"schedule/pulls.cuh": ("kPullLeadBytes = 12 << 20", "kPullLeadBytes = 1")}  # so that small loads wait for it


def rewritten(text: str) -> str:
    """Launches become calls, dynamic shared memory a pointer, operators for CUDA tensors operators for CPU tensors."""
    cluster = "kClusterSize" if "__cluster_dims__(kClusterSize, 1, 1)" in text else "1"
    launch = rf"emulator::launch({cluster}, &\1, \2, "
    text = re.sub(r"(\w+(?:<\w+>)?)<<<(.*?)>>>\(", launch, text, flags=re.DOTALL)
    text = re.sub(
        r"extern __shared__ (?:__align__\(\d+\) )?(\w+) (\w+)\[\];",
        r"\1* \2 = reinterpret_cast<\1*>(emulator::dynamic_shared());",
        text,
    )
    return text.replace("(megamoe, CUDA, m)", "(megamoe, CPU, m)")


def changed(path: Path, changes: dict[str, tuple[str, str]]) -> str:
    text, name = path.read_text(), str(path.relative_to(CSRC))
    if name in changes:
        old, new = changes[name]
        assert text.count(old) == 1, f"{name} holds {old!r} {text.count(old)} times"
        text = text.replace(old, new)
    return text


def compile_one(source: Path, tree: Path, target: Path) -> None:
    torch_headers = Path(torch.__file__).parent / "include"
    include = [f"-I{HERE}", f"-I{tree}", f"-isystem{torch_headers}"]
    include.append(f"-isystem{torch_headers / 'torch/csrc/api/include'}")
    poisoned = [] if source.parent == HERE else [POISONED]
    subprocess.run(["g++", *FLAGS, *poisoned, *include, "-MMD", "-c", source, "-o", target], check=True)


def build(folder: Path, changes: dict[str, tuple[str, str]] | None = None, base: Path | None = None) -> Path:
    """The operators as a library of CPU operators.

    changes: file -> (text, what replaces it), for mutation tests. base: folder of an earlier build without changes;
    its objects serve again where no changed file went in.
    """
    changes = changes or {}
    tree = folder / "csrc"
    sources = [HERE / name for name in EMULATOR]
    for path in CSRC.rglob("*.*"):
        copy = tree / path.relative_to(CSRC)
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_text(rewritten(changed(path, {**SMALLER, **changes})))
        if copy.suffix in (".cu", ".cpp"):
            sources.append(copy)
    objects = []
    for source in sources:
        name = f"{source.parent.name}_{source.stem}"
        reused = base is not None and not any(f"/{file}" in (base / f"{name}.d").read_text() for file in changes)
        objects.append((base if reused else folder) / f"{name}.o")
        if not reused:
            compile_one(source, tree, objects[-1])
    library = folder / "emulated.so"
    lib = Path(torch.__file__).parent / "lib"
    subprocess.run(
        ["g++", "-shared", "-o", library, *objects, f"-L{lib}", "-ltorch_cpu", "-lc10", "-lpthread"], check=True
    )
    return library


if __name__ == "__main__":
    build(Path(sys.argv[1]))

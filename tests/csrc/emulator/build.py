"""Builds plan, dispatch, combine and travelling roles of csrc for the emulator: their source, CUDA syntax rewritten."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import torch

HERE = Path(__file__).parent
CSRC = HERE.parents[2] / "csrc"
SOURCES = (
    "kernels/plan.cu",
    "kernels/dispatch.cu",
    "kernels/combine.cu",
    "kernels/copy.cu",
    "kernels/routing.cu",
    "kernels/forward.cu",
    "kernels/backward.cu",
    "kernels/grouped_gemm.cu",
    "host/checks.cu",
    "host/clamp.cu",
    "host/comm.cu",
    "host/fused.cu",
    "host/grouped_gemm.cu",
    "host/tensor_map.cpp",
    "host/trace.cu",
    "bindings.cpp",
    "bindings_comm.cpp",
    "bindings_fused.cpp",
)
OWN = "travel.cu"  # of this folder
WITH_TORCH = ("bindings.cpp", "bindings_comm.cpp", "bindings_fused.cpp", OWN)
EMULATOR = ("emulator.cpp", "copies.cpp", "matrix.cpp")


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


def build(folder: Path, changes: dict[str, tuple[str, str]] | None = None, base: Path | None = None) -> Path:
    """The operators as a library of CPU operators.

    changes: file -> (text, what replaces it), for mutation tests. base: folder of an earlier build without changes;
    its objects serve again where no changed file went in.
    """
    tree = folder / "csrc"
    changes = changes or {}
    for part in ("comm", "host", "kernels", "layout", "ptx", "roles", "schedule", "."):
        (tree / part).mkdir(parents=True, exist_ok=True)
        for path in (CSRC / part).glob("*.*"):
            text, name = path.read_text(), str(path.relative_to(CSRC))
            if name in changes:
                old, new = changes[name]
                assert text.count(old) == 1, f"{name} holds {old!r} {text.count(old)} times"
                text = text.replace(old, new)
            (tree / part / path.name).write_text(rewritten(text))
    (tree / OWN).write_text(rewritten((HERE / OWN).read_text()))
    include = Path(torch.__file__).parent / "include"
    flags = [
        "-std=c++20",
        "-O1",
        "-fPIC",
        "-fno-strict-aliasing",
        "-w",
        "-Wno-psabi",
        "-x",
        "c++",
        f"-I{HERE}",
        f"-I{tree}",
    ]
    system = [f"-isystem{include}", f"-isystem{include / 'torch/csrc/api/include'}"]
    objects = []
    for source in (*(HERE / name for name in EMULATOR), *(tree / name for name in (*SOURCES, OWN))):
        name = f"{source.parent.name}_{source.stem}"
        if base is not None and not any(f"/{changed}" in (base / f"{name}.d").read_text() for changed in changes):
            objects.append(base / f"{name}.o")
            continue
        objects.append(folder / f"{name}.o")
        torch_headers = system if source.name in WITH_TORCH else []
        subprocess.run(["g++", *flags, *torch_headers, "-MMD", "-c", source, "-o", objects[-1]], check=True)
    library = folder / "emulated.so"
    lib = Path(torch.__file__).parent / "lib"
    subprocess.run(
        ["g++", "-shared", "-o", library, *objects, f"-L{lib}", "-ltorch_cpu", "-lc10", "-lpthread"], check=True
    )
    return library

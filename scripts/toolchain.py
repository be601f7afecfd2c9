"""What the kernels are built with: nvcc, a C++ compiler, ninja and torch's headers, each found or missing by name.

Standard library only, torch is never imported: setup.py, the build backend and the bootstrap ask where nothing is
installed yet.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from megamoe_train.config import env_flag  # noqa: E402
from megamoe_train.versions import TESTED  # noqa: E402

# torch 2.11 is built for CUDA 13. The PyPI meta package pins compiler, headers and runtime to one release; installing
# nvidia-cuda-nvcc alone would pull the newest nvvm and crt beside an older nvcc.
CUDA_RELEASE = (13, 0)
NVCC_REQUIREMENT = "cuda-toolkit[nvcc,nvvm,crt,cccl,cudart]=={}.{}.*".format(*CUDA_RELEASE)
ARCH = "9.0a"


class ToolchainError(Exception):
    """A tool is missing or a setting cannot work; the text is one line for the user."""


@dataclass(frozen=True)
class Toolchain:
    nvcc: str
    nvcc_release: str
    ninja: str
    torch: Path  # the package folder: holds include/ and lib/


def gpu_present() -> bool:
    """True where the NVIDIA driver shows a GPU, whether or not this process may use it."""
    if any(Path("/proc/driver/nvidia/gpus").glob("*")) or any(Path("/dev").glob("nvidia[0-9]*")):
        return True
    smi = shutil.which("nvidia-smi")
    if smi is None:
        return False
    listing = subprocess.run([smi, "-L"], capture_output=True, text=True)
    return listing.returncode == 0 and "GPU 0" in listing.stdout


def check_arch() -> None:
    """Raises ToolchainError where TORCH_CUDA_ARCH_LIST asks for an architecture that has no kernels."""
    asked = re.split(r"[;,\s]+", os.environ.get("TORCH_CUDA_ARCH_LIST", "").strip("; ,"))
    others = [arch for arch in asked if arch not in ("", ARCH)]
    if others:
        raise ToolchainError(
            f"TORCH_CUDA_ARCH_LIST asks for {', '.join(others)}: the kernels exist for {ARCH} (Hopper) only; "
            f"set TORCH_CUDA_ARCH_LIST={ARCH} or unset it"
        )


def _site_packages() -> list[Path]:
    """Import path, then the interpreter's own site-packages, which an isolated build hides from sys.path."""
    paths = [*sys.path, sysconfig.get_path("purelib"), sysconfig.get_path("platlib")]
    return [Path(path) for path in dict.fromkeys(paths) if path and Path(path).is_dir()]


def _nvcc_candidates() -> list[tuple[str, Path]]:
    homes = [name for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
    named = [(name, Path(os.environ[name]) / "bin" / "nvcc") for name in homes]
    on_path = shutil.which("nvcc")
    if on_path:
        named.append(("PATH", Path(on_path)))
    wheel = f"nvidia/cu{CUDA_RELEASE[0]}/bin/nvcc"
    named += [("PyPI", site / wheel) for site in _site_packages() if (site / wheel).exists()]
    named.append(("/usr/local/cuda", Path("/usr/local/cuda/bin/nvcc")))
    return named


def find_nvcc() -> tuple[str, str]:
    """(path, release) of the first nvcc of torch's CUDA major release. Raises ToolchainError with what was seen."""
    seen = []
    for origin, nvcc in _nvcc_candidates():
        if not nvcc.exists():
            if origin.startswith("CUDA_"):
                seen.append(f"{origin}={nvcc.parent.parent} has no bin/nvcc")
            continue
        answer = subprocess.run([str(nvcc), "--version"], capture_output=True, text=True)
        release = re.search(r"release (\d+)\.(\d+)", answer.stdout)
        if release and int(release[1]) == CUDA_RELEASE[0]:
            return str(nvcc), f"{release[1]}.{release[2]}"
        found = f"is release {release[1]}.{release[2]}" if release else "does not run"
        seen.append(f"{nvcc} {found}, needed is {CUDA_RELEASE[0]}.x")
    raise ToolchainError("no nvcc" + (f" ({'; '.join(seen)})" if seen else ""))


def find_torch() -> Path:
    spec = importlib.util.find_spec("torch")
    homes = list(spec.submodule_search_locations or []) if spec else []
    homes += [str(site / "torch") for site in _site_packages()]
    for home in map(Path, homes):
        if (home / "include" / "torch" / "csrc" / "stable" / "library.h").exists():
            return home
    raise ToolchainError("no torch with headers in this Python (install it first, and use --no-build-isolation)")


def find_ninja() -> str:
    spec = importlib.util.find_spec("ninja")
    wheel = [] if spec is None or spec.origin is None else [Path(sysconfig.get_path("scripts")) / "ninja"]
    found = next((str(path) for path in wheel if path.exists()), None) or shutil.which("ninja")
    if found is None:
        raise ToolchainError("no ninja (pip install ninja)")
    return found


def find_toolchain() -> Toolchain:
    """Everything the kernels need. Raises ToolchainError naming the first thing missing."""
    nvcc, release = find_nvcc()
    if shutil.which(os.environ.get("NVCC_CCBIN") or "g++") is None:
        raise ToolchainError("no C++ compiler: nvcc needs g++ (or the one NVCC_CCBIN names)")
    return Toolchain(nvcc=nvcc, nvcc_release=release, ninja=find_ninja(), torch=find_torch())


def kernels_required() -> bool:
    """True where an install without kernels must fail: a GPU is here, or MEGAMOE_FORCE_CUDA_BUILD asks for them."""
    try:
        skip, force = env_flag("MEGAMOE_SKIP_CUDA_BUILD"), env_flag("MEGAMOE_FORCE_CUDA_BUILD")
    except ValueError as error:
        raise ToolchainError(str(error)) from None
    if skip and force:
        raise ToolchainError("MEGAMOE_SKIP_CUDA_BUILD and MEGAMOE_FORCE_CUDA_BUILD are both set: unset one")
    return not skip and (force or gpu_present())


def missing_requirements() -> list[str]:
    """What pip must install before the kernels can be built here; empty where they need not be."""
    if not kernels_required():
        return []
    wanted = []
    for find, requirement in (
        (find_torch, f"torch=={TESTED['torch']}.*"),
        (find_nvcc, NVCC_REQUIREMENT),
        (find_ninja, "ninja"),
    ):
        try:
            find()
        except ToolchainError:
            wanted.append(requirement)
    return wanted


if __name__ == "__main__":
    try:
        print(*missing_requirements(), sep="\n", end="")
    except ToolchainError as error:
        sys.exit(f"kernels: {error}")

"""Makes .venv, installs this project and what it needs, builds the kernels. Called by scripts/bootstrap; run it again
at will: what is up to date is skipped.

Standard library only. Which index pip uses is the user's own pip configuration.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import toolchain

ROOT = toolchain.ROOT
VENV = ROOT / ".venv"
PYTHON = VENV / "bin" / "python"
LOG = VENV / "bootstrap.log"
EXTENSION = ROOT / "megamoe_train" / "_C.so"

GB = 10**9
TORCH_BYTES = 8 * GB  # torch and its CUDA libraries unpacked (5 GB), the rest, and room to work
UNPACK_BYTES = 2 * GB  # pip downloads the largest wheel into the temporary folder first
LARGE_MB = 50  # downloads from this size on are announced


class BootstrapError(Exception):
    """One line for the user."""


class Steps:
    """Prints "set-up 2/4: ..." before each step and the seconds it took after it."""

    def __init__(self, total: int) -> None:
        self.done, self.total = 0, total

    def run(self, what: str, action, *args) -> None:
        self.done += 1
        print(f"set-up {self.done}/{self.total}: {what}", flush=True)
        start = time.monotonic()
        action(*args)
        if (took := time.monotonic() - start) >= 1:
            print(f"    {took:.0f} s", flush=True)


def check_disk() -> None:
    """Raises BootstrapError where torch will not fit; asked before anything is downloaded."""
    for folder, needed in ((ROOT, TORCH_BYTES), (Path(tempfile.gettempdir()), UNPACK_BYTES)):
        free = shutil.disk_usage(folder).free
        if free < needed:
            raise BootstrapError(
                f"disk too full: torch needs {needed / GB:.0f} GB under {folder}, {free / GB:.1f} GB are free"
            )


def identity(python: str) -> str:
    """Which interpreter this is: version and base installation. Empty where it does not run."""
    ask = "import sys; print(sys.version_info[:3], sys.base_prefix)"
    answer = subprocess.run([python, "-c", ask], capture_output=True, text=True) if Path(python).exists() else None
    return answer.stdout.strip() if answer and answer.returncode == 0 else ""


def venv_works() -> bool:
    has_pip = subprocess.run([PYTHON, "-c", "import pip"], capture_output=True) if PYTHON.exists() else None
    return bool(has_pip) and has_pip.returncode == 0 and identity(str(PYTHON)) == identity(sys.executable)


def make_venv() -> None:
    made = subprocess.run([sys.executable, "-m", "venv", "--clear", str(VENV)], capture_output=True, text=True)
    if made.returncode:
        said = (made.stderr or made.stdout).strip().splitlines() or ["nothing said why"]
        raise BootstrapError(f"{sys.executable} -m venv failed: {said[-1]}")


def pip_install(*arguments: str, build_kernels: bool = True) -> None:
    """`pip install`, its output in .venv/bootstrap.log, large downloads announced. Raises BootstrapError."""
    environment = dict(os.environ, PIP_DISABLE_PIP_VERSION_CHECK="1")
    if not build_kernels:  # they have a step of their own, whose progress is seen
        environment.pop("MEGAMOE_FORCE_CUDA_BUILD", None)
        environment["MEGAMOE_SKIP_CUDA_BUILD"] = "1"
    command = [str(PYTHON), "-m", "pip", "install", "--no-input", "--no-compile", *arguments]
    last = []
    with (
        LOG.open("a") as log,
        subprocess.Popen(
            command, env=environment, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        ) as pip,
    ):
        for line in pip.stdout:
            log.write(line)
            last = [*last[-14:], line.rstrip()]
            announce(line)
    if pip.returncode:
        print("\n".join(last), file=sys.stderr)
        full = " (the disk is full)" if any("No space left" in line for line in last) else ""
        raise BootstrapError(f"pip install {' '.join(arguments)} failed{full}; all its output: {LOG}")


def announce(line: str) -> None:
    size = re.search(r"(Downloading|Using cached) (?:\S*/)?(\S+?)-(\d\S*?)-\S+ \(([\d.]+) (MB|GB)\)", line)
    if size and float(size[4]) * (1000 if size[5] == "GB" else 1) >= LARGE_MB:
        print(f"    {size[1].lower()} {size[2]} {size[3]} ({size[4]} {size[5]})", flush=True)
    elif line.startswith("Installing collected packages:"):
        print(f"    unpacking {line.count(',') + 1} packages", flush=True)


def install_torch() -> None:
    # First and alone: the package is built without isolation, against this very torch.
    pip_install(f"torch=={toolchain.TESTED['torch']}.*", "setuptools>=77", "ninja")


def install_package(extras: list[str]) -> None:
    spec = f".[{','.join(extras)}]" if extras else "."
    megatron = f"megatron-core=={toolchain.TESTED['megatron-core']}.*"
    pip_install("--no-build-isolation", "-e", spec, megatron, build_kernels=False)


def build_kernels() -> None:
    """Builds csrc/ where it can be or must be, and loads what was built."""
    asked = subprocess.run([str(PYTHON), str(ROOT / "scripts" / "toolchain.py")], capture_output=True, text=True)
    if asked.returncode:
        raise BootstrapError(asked.stderr.strip())
    if requirements := asked.stdout.split():
        print(f"    a GPU or MEGAMOE_FORCE_CUDA_BUILD is here: installing {' '.join(requirements)}", flush=True)
        pip_install(*requirements)
    before = EXTENSION.stat().st_mtime if EXTENSION.exists() else None
    if subprocess.run([str(PYTHON), "setup.py", "-q", "build_ext", "--inplace"], cwd=ROOT).returncode:
        raise BootstrapError("the kernels were not built; why stands above")
    if EXTENSION.exists() and EXTENSION.stat().st_mtime != before:
        load = f"import torch; torch.ops.load_library({str(EXTENSION)!r})"
        if subprocess.run([str(PYTHON), "-c", load], cwd=ROOT).returncode:
            raise BootstrapError(f"{EXTENSION} was built but does not load; why stands above")


def stamp(extras: list[str]) -> tuple[Path, str]:
    """The file that says an installation is complete, and what it must hold: a digest of all that decides it."""
    inputs = [ROOT / "pyproject.toml", ROOT / "megamoe_train" / "versions.py", Path(__file__)]
    text = "\n".join([str(ROOT), identity(str(PYTHON)), *(path.read_text() for path in inputs)])
    name = "-".join(["installed", *extras])
    return VENV / f"{name}.stamp", hashlib.sha256(text.encode()).hexdigest()


def up_to_date(extras: list[str]) -> bool:
    if not venv_works():
        return False
    path, digest = stamp(extras)
    return path.exists() and path.read_text() == digest


def set_up(extras: list[str]) -> None:
    if up_to_date(extras):
        build_kernels()
        return
    fresh = not venv_works()
    has_torch = not fresh and any(VENV.glob("lib/python3*/site-packages/torch/version.py"))
    if not has_torch:
        check_disk()
    steps = Steps(4)
    steps.run(f".venv from {sys.executable} ({sys.version.split()[0]})", make_venv if fresh else lambda: None)
    steps.run(f"torch {toolchain.TESTED['torch']} (about 5 GB; minutes, unless pip has it cached)", install_torch)
    names = "".join(f"[{extra}]" for extra in extras)
    steps.run(f"megamoe_train{names}, megatron-core {toolchain.TESTED['megatron-core']}", install_package, extras)
    steps.run("kernels", build_kernels)
    for complete in ([], extras):
        path, digest = stamp(complete)
        path.write_text(digest)


def main() -> None:
    extras = sorted(set(sys.argv[1:]))
    with open(ROOT / "scripts" / "bootstrap.py") as lock:  # two `make` at once: the second waits, then finds all done
        fcntl.flock(lock, fcntl.LOCK_EX)
        try:
            set_up(extras)
        except BootstrapError as error:
            sys.exit(f"bootstrap: {error}")
        except KeyboardInterrupt:
            sys.exit("bootstrap: interrupted; run it again to go on")


if __name__ == "__main__":
    main()

"""What a job asks of its machine before it starts: a driver that torch can use, GPUs that no other job holds, memory.

Raises ValueError with what was found and what is needed.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import subprocess
import tempfile
from pathlib import Path

from megamoe_train import memory
from megamoe_train.shapes import Layout, ModelShape
from megamoe_train.training.settings import Settings

GIB = 2**30

# The oldest driver for each major CUDA release: NVIDIA, "CUDA Compatibility", minor-version compatibility.
OLDEST_DRIVER = {"11": 450, "12": 525, "13": 580}


def check_driver(num_gpus: int, torch_cuda: str | None) -> None:
    """Refuse where the driver shows GPUs that torch cannot use: training would go on unseen, on the CPU.

    num_gpus: what torch counts. torch_cuda: the release torch was built for; None for a CPU build.
    CUDA_VISIBLE_DEVICES set to hide every GPU means that the CPU is wanted.
    """
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES")
    if num_gpus or (hidden is not None and not hidden.strip(" -1")):
        return
    listed = _asked("--query-gpu=driver_version,name", "--format=csv,noheader")
    if not listed:
        return
    driver, _, name = listed[0].partition(", ")
    shown = f"{len(listed)} x {name}"
    if torch_cuda is None:
        raise ValueError(f"driver: it shows {shown}, but this torch is built without CUDA; install torch for CUDA")
    oldest = OLDEST_DRIVER.get(torch_cuda.split(".")[0], 0)
    if _major(driver) < oldest:
        raise ValueError(
            f"driver: {driver} is too old for torch built for CUDA {torch_cuda}, which needs {oldest} or newer "
            f"({shown}); CUDA_VISIBLE_DEVICES= (empty) trains on the CPU"
        )
    raise ValueError(
        f"driver: {driver} shows {shown}, but torch (CUDA {torch_cuda}) can use none; `python -m megamoe_train.doctor` "
        "says more; CUDA_VISIBLE_DEVICES= (empty) trains on the CPU"
    )


def _major(version: str) -> int:
    found = re.match(r"\d+", version)
    return int(found.group()) if found else 0


def _asked(*options: str) -> list[str]:
    """Lines of nvidia-smi; empty where there is none, or it fails."""
    try:
        answer = subprocess.run(["nvidia-smi", *options], capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return []
    return [line.strip() for line in answer.stdout.splitlines() if line.strip()]


def claim_gpu(gpu: str, folder: Path | None = None) -> int:
    """Lock the GPU with UUID `gpu` for the life of the returned descriptor. Raises ValueError while a job holds it.

    The lock is a file that all users of a machine share; who holds it is written into it where that is allowed.
    """
    path = (folder or Path(tempfile.gettempdir())) / f"megamoe-gpu-{re.sub(r'[^0-9A-Za-z-]', '', gpu)}.lock"
    try:
        descriptor = os.open(path, os.O_RDWR)
    except FileNotFoundError:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        with contextlib.suppress(PermissionError):
            os.chmod(path, 0o666)  # whatever the umask: the next user must be able to lock it
    except PermissionError:
        descriptor = os.open(path, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        holder = os.pread(descriptor, 100, 0).decode(errors="replace").strip() or "unknown"
        os.close(descriptor)
        raise ValueError(f"GPU {gpu}: another job is training on it (process {holder}); wait, or choose others with "
                         "CUDA_VISIBLE_DEVICES") from None  # fmt: skip
    with contextlib.suppress(OSError):  # opened for reading alone
        os.truncate(descriptor, 0)
        os.pwrite(descriptor, str(os.getpid()).encode(), 0)
    return descriptor


def check_workspace(table: Settings, ranks: int, free: int, total: int) -> None:
    """Refuse where the symmetric workspace alone is larger than a GPU's free memory. free, total: bytes."""
    try:
        model = ModelShape.of(table)
        layout = Layout.of(table, ranks, model)
    except ValueError:  # a model that is not counted; what does not fit is found when it is built
        return
    needed = memory.workspace(model, layout)
    if needed > free:
        raise ValueError(
            f"workspace: {needed / GIB:.2f} GiB for {layout.tokens(model)} tokens a rank, top-{model.top_k}, hidden "
            f"{model.hidden}; free on this GPU: {free / GIB:.2f} of {total / GIB:.1f} GiB. Use a smaller "
            "micro-batch-size or seq-length, or free the GPU"
        )

"""Holds SMs of the current GPU as another stream's kernel would (hold.cu)."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import torch

LIMIT_S = 20


@functools.cache
def build() -> ctypes.CDLL:
    """The library of hold.cu. `all_but` does it where nobody has; a rank that others wait for does it before."""
    nvcc = shutil.which("nvcc") or "/usr/local/cuda/bin/nvcc"
    target = Path(tempfile.mkdtemp()) / "hold.so"
    source = Path(__file__).with_suffix(".cu")
    command = [nvcc, "-arch=sm_90a", "-shared", "-Xcompiler=-fPIC", "-o", target, source]
    subprocess.run(command, check=True, capture_output=True, timeout=120)
    return ctypes.CDLL(str(target))


@contextlib.contextmanager
def all_but(free: int, cluster_size: int = 1) -> Iterator[None]:
    """Inside, only `free` SMs of the current GPU take other kernels.

    cluster_size: 2 leaves pairs of SMs that a cluster of two fits on. What runs inside must have run once before: to
    load a kernel or to allocate pinned memory may wait for the whole GPU.
    """
    count = torch.cuda.get_device_properties(torch.cuda.current_device()).multi_processor_count
    words = torch.zeros(2, dtype=torch.int32, pin_memory=True)
    stream = torch.cuda.Stream()
    held, release = ctypes.c_void_p(words.data_ptr()), ctypes.c_void_p(words.data_ptr() + 4)
    sms = count - free
    limit_ns, stream_of = ctypes.c_ulonglong(LIMIT_S * 10**9), ctypes.c_void_p(stream.cuda_stream)
    error = build().hold(sms, cluster_size, held, release, limit_ns, stream_of)
    assert error == 0, f"hold: CUDA error {error}"
    limit = time.monotonic() + 5
    while int(words[0]) < sms:
        assert time.monotonic() < limit, f"only {int(words[0])} of {sms} SMs were held"
    try:
        yield
        assert not stream.query(), "the SMs were given back before the work was done"
    finally:
        words[1] = 1
        stream.synchronize()

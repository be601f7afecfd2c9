"""`bench energy`: what a product draws when it runs on and on: watts, the SM's clock, joules a launch.

The clock follows the power limit, so that two products with equal cycles may differ in time; this table says which of
the two it is. Readings are the driver's (libnvidia-ml), which counts energy since it was loaded.
"""

from __future__ import annotations

import argparse
import ctypes
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from . import gemm
from .timing import CuBLAS

SECONDS = 1.0  # of a measurement; the driver renews its count of energy every 20 to 100 ms
SM_CLOCK = 1  # nvml.h: NVML_CLOCK_SM
POWER_CAP = 0x4  # nvml.h: nvmlClocksEventReasonSwPowerCap


class NotRead(RuntimeError):
    """The driver does not tell what a GPU draws."""


class Meter:
    """Energy, power limit and SM clock of torch's current GPU. Raises NotRead."""

    def __init__(self, library: ctypes.CDLL | None = None):
        try:
            self.nvml = library or ctypes.CDLL("libnvidia-ml.so.1")
        except OSError as error:
            raise NotRead(f"bench energy reads libnvidia-ml.so.1, which is not here: {error}") from error
        self._call("nvmlInit_v2")
        self.device = ctypes.c_void_p()
        uuid = f"GPU-{torch.cuda.get_device_properties(torch.cuda.current_device()).uuid}"
        self._call("nvmlDeviceGetHandleByUUID", uuid.encode(), ctypes.byref(self.device))

    def _call(self, name: str, *arguments) -> None:
        status = getattr(self.nvml, name)(*arguments)
        if status != 0:
            raise NotRead(f"bench energy: {name} failed with NVML status {status}")

    def _read(self, kind: type, name: str, *arguments) -> int:
        value = kind()
        self._call(name, self.device, *arguments, ctypes.byref(value))
        return value.value

    def joules(self) -> float:
        return self._read(ctypes.c_ulonglong, "nvmlDeviceGetTotalEnergyConsumption") / 1e3

    def limit_watts(self) -> float:
        return self._read(ctypes.c_uint, "nvmlDeviceGetEnforcedPowerLimit") / 1e3

    def sm_mhz(self) -> int:
        return self._read(ctypes.c_uint, "nvmlDeviceGetClockInfo", ctypes.c_int(SM_CLOCK))

    def is_capped(self) -> bool:
        """Whether the clock is held down by the power limit just now."""
        reasons = self._read(ctypes.c_ulonglong, "nvmlDeviceGetCurrentClocksThrottleReasons")
        return bool(reasons & POWER_CAP)


@dataclass(frozen=True)
class Drawn:
    """One product, launched again and again. capped: share of the samples in which the power limit held the clock."""

    milliseconds: float
    watts: float
    sm_mhz: float
    capped: float

    @property
    def joules(self) -> float:
        return self.watts * self.milliseconds / 1e3


def draw(run: Callable[[int], None], meter: Meter, seconds: float = SECONDS) -> Drawn:
    """Launches `run` back to back for about `seconds`, after a tenth of that to get there."""
    run(0)
    torch.cuda.synchronize()
    begin = time.perf_counter()
    run(1)
    torch.cuda.synchronize()
    launches = max(2, round(seconds / (time.perf_counter() - begin)))
    for i in range(launches // 10 + 1):
        run(i)
    torch.cuda.synchronize()
    start, end, clocks, capped = meter.joules(), torch.cuda.Event(), [], []
    begin = time.perf_counter()
    for i in range(launches):
        run(i)
    end.record()
    while not (clocks and end.query()):
        clocks.append(meter.sm_mhz())
        capped.append(meter.is_capped())
        time.sleep(0.02)
    taken = time.perf_counter() - begin
    spent = meter.joules() - start
    return Drawn(1e3 * taken / launches, spent / taken, statistics.median(clocks), statistics.mean(capped))


def rows_of(shape: str, products: list[str], meter: Meter) -> list[dict]:
    """One row for cuBLAS and for each product, with its epilogue and, where there is one, bare; prints each."""
    layer = gemm.Layer(gemm.SHAPES[shape], gemm.group_rows(gemm.SHAPES[shape], "even", seed=1))
    runs = [("cuBLAS", CuBLAS.FLOPS, CuBLAS(CuBLAS.FLOPS))]
    for product in products:
        runs.append((product, layer.flops(product), gemm.with_epilogue(layer, product)))
        if (bare := gemm.without_epilogue(layer, product)) is not None:
            runs.append((f"{product}, bare", layer.flops(product), bare))
    rows = []
    for name, flops, run in runs:
        drawn = draw(run, meter)
        row = {"shape": shape, "what": name, "tflops": flops / drawn.milliseconds / 1e9, "watts": drawn.watts,
               "sm_mhz": drawn.sm_mhz, "capped": drawn.capped, "joules": drawn.joules,
               "picojoules_per_flop": 1e12 * drawn.joules / flops}  # fmt: skip
        rows.append(row)
        print(f"{shape:6} {name:12} {row['tflops']:5.0f} TFLOP/s {drawn.watts:4.0f} W {drawn.sm_mhz:5.0f} MHz "
              f"{row['picojoules_per_flop']:6.3f} pJ/FLOP   power limit held the clock {drawn.capped:4.0%}",
              flush=True)  # fmt: skip
    return rows


def add_arguments(tables: argparse._SubParsersAction) -> None:
    parser = tables.add_parser("energy", help="watts, clock and joules of cuBLAS and of each product, sustained")
    parser.add_argument("--shapes", nargs="+", choices=gemm.SHAPES, default=["flash", "pro"])
    parser.add_argument("--products", nargs="+", choices=gemm.PRODUCTS, default=list(gemm.PRODUCTS))
    parser.add_argument("--json", type=Path, help="also write the rows here")


def run(args: argparse.Namespace) -> list[dict]:
    meter = Meter()
    print(f"power limit {meter.limit_watts():.0f} W")
    rows = []
    for shape in args.shapes:
        rows += rows_of(shape, args.products, meter)
        torch.cuda.empty_cache()
    return rows

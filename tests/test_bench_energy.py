"""`bench energy` without a GPU: what it asks the driver, and what it makes of the answers."""

import ctypes
import time
from types import SimpleNamespace

import pytest
import torch

from megamoe_train.bench import __main__ as bench
from megamoe_train.bench import energy

WATTS = 500


class Driver:
    """In place of libnvidia-ml: a GPU that draws 500 W, at 1500 MHz, held down by its limit in every other sample."""

    def __init__(self, status: int = 0):
        self.status, self.samples, self.begin = status, 0, time.perf_counter()

    def __getattr__(self, name: str):
        return lambda *arguments: self.answer(name, *arguments)

    def answer(self, name: str, *arguments) -> int:
        if name == "nvmlDeviceGetHandleByUUID":
            assert arguments[0] == b"GPU-1234"
        elif name == "nvmlDeviceGetTotalEnergyConsumption":
            arguments[-1]._obj.value = round(WATTS * 1e3 * (time.perf_counter() - self.begin))
        elif name == "nvmlDeviceGetClockInfo":
            assert arguments[1].value == energy.SM_CLOCK
            arguments[-1]._obj.value = 1500
        elif name == "nvmlDeviceGetEnforcedPowerLimit":
            arguments[-1]._obj.value = 700_000
        elif name == "nvmlDeviceGetCurrentClocksThrottleReasons":
            self.samples += 1
            arguments[-1]._obj.value = energy.POWER_CAP | 1 if self.samples % 2 else 1
        else:
            assert name == "nvmlInit_v2"
        return self.status


class Event:
    """Over at the fourth question."""

    def __init__(self):
        self.asked = 0

    def record(self) -> None:
        pass

    def query(self) -> bool:
        self.asked += 1
        return self.asked > 3


@pytest.fixture(autouse=True)
def gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(uuid="1234"))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "Event", Event)


def test_what_a_product_draws():
    meter, launches = energy.Meter(Driver()), []
    drawn = energy.draw(lambda i: (launches.append(i), time.sleep(2e-3)), meter, seconds=0.2)
    assert meter.limit_watts() == 700
    assert drawn.watts == pytest.approx(WATTS, rel=0.05)
    assert drawn.sm_mhz == 1500 and drawn.capped == 0.5
    assert drawn.joules == pytest.approx(drawn.watts * drawn.milliseconds / 1e3)
    assert drawn.milliseconds > 2 and 20 < len(launches) < 120


def test_a_driver_that_does_not_tell_is_named(monkeypatch, capsys):
    with pytest.raises(energy.NotRead, match="nvmlInit_v2 failed with NVML status 9"):
        energy.Meter(Driver(status=9))

    def absent(name):
        raise OSError(f"{name}: cannot open shared object file")

    monkeypatch.setattr(ctypes, "CDLL", absent)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "some GPU")
    assert bench.main(["energy"]) == 2
    assert "libnvidia-ml.so.1, which is not here" in capsys.readouterr().err

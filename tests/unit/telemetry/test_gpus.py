"""GPU readings, with a stand-in for NVML."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import pytest

from pagewire.telemetry.gpus import GpuReading, Gpus


class NVMLError(Exception):
    pass


def fake_nvml(**changes: object) -> SimpleNamespace:
    functions = {
        "NVMLError": NVMLError,
        "nvmlInit": lambda: None,
        "nvmlDeviceGetCount": lambda: 2,
        "nvmlDeviceGetHandleByIndex": lambda index: index,
        "nvmlDeviceGetMemoryInfo": lambda handle: SimpleNamespace(used=10 * (handle + 1), total=100),
        "nvmlDeviceGetUUID": lambda handle: f"GPU-{handle}",
        "nvmlDeviceGetUtilizationRates": lambda handle: SimpleNamespace(gpu=25, memory=1),
    }
    return SimpleNamespace(**{**functions, **changes})


def fail(*_: object) -> None:
    raise NVMLError("not found")


def test_every_gpu_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", fake_nvml())
    assert Gpus().read() == [GpuReading(0, "GPU-0", 0.25, 10, 100), GpuReading(1, "GPU-1", 0.25, 20, 100)]


@pytest.mark.parametrize("broken", ["nvmlInit", "nvmlDeviceGetCount", "nvmlDeviceGetUtilizationRates"])
def test_without_an_answer_there_are_no_readings(monkeypatch: pytest.MonkeyPatch, broken: str) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", fake_nvml(**{broken: fail}))
    assert Gpus().read() == []


def test_without_the_package_there_are_no_readings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert Gpus().read() == []

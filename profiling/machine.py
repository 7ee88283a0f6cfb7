"""What a figure was measured on, in words: processor or GPU, torch, and the commit of this project."""

from __future__ import annotations

import os
import platform
import re
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import torch

from opensora_fast.profiling.commit import commit

DRIVER = Path("/proc/driver/nvidia/version")  # there when the kernel module is loaded


@dataclass(frozen=True, kw_only=True)
class Machine:
    cpu: str  # model and number of cores
    gpu: str | None
    torch: str
    commit: str | None  # None outside a checkout
    triton: str | None = None
    driver: str | None = None

    def device(self, name: str) -> str:
        """What `loop.device` = auto, cpu or cuda means here, in words that say CPU or GPU."""
        if name == "cpu" or self.gpu is None:
            return f"CPU ({self.cpu})"
        return f"GPU ({self.gpu})"


def this_machine() -> Machine:
    cores = os.cpu_count()
    return Machine(
        cpu=f"{_cpu_model()}, {cores} {'core' if cores == 1 else 'cores'}",
        gpu=torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        torch=torch.__version__,
        commit=commit(),
        triton=installed("triton"),
        driver=_driver(),
    )


def installed(distribution: str) -> str | None:
    """The version of an installed distribution."""
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def gpu_state() -> dict[str, float]:
    """Clock in MHz, power in W and temperature in C of the first GPU; empty where NVML cannot tell."""
    try:
        import pynvml

        pynvml.nvmlInit()
        handle = pynvml.nvmlDeviceGetHandleByIndex(0)
        return {
            "clock_mhz": pynvml.nvmlDeviceGetClockInfo(handle, pynvml.NVML_CLOCK_SM),
            "power_w": pynvml.nvmlDeviceGetPowerUsage(handle) / 1e3,
            "temperature_c": pynvml.nvmlDeviceGetTemperature(handle, pynvml.NVML_TEMPERATURE_GPU),
        }
    except Exception:  # no package, no driver, or a call that this driver refuses: a row then has no clock
        return {}


def _cpu_model() -> str:
    listing = Path("/proc/cpuinfo")  # Linux; platform.processor() says no more than x86_64 there
    lines = listing.read_text().splitlines() if listing.exists() else []
    models = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.processor() or platform.machine()


def _driver() -> str | None:
    found = re.search(r"\d+\.\d+(\.\d+)?", DRIVER.read_text()) if DRIVER.exists() else None
    return found.group() if found else None

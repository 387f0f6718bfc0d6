"""The processor that runs a model: its name, and its clocks at this moment."""

from __future__ import annotations

import platform
from pathlib import Path

from app.core.environment import nvidia_smi

GPU_CLOCKS = ("clocks.sm", "clocks.mem", "clocks.max.sm", "power.draw", "power.limit", "temperature.gpu", "pstate")
CPUFREQ_DIR = Path("/sys/devices/system/cpu/cpu0/cpufreq")
CPU_CLOCKS = ("scaling_governor", "scaling_min_freq", "scaling_max_freq")


def cpu_name() -> str:
    names = cpuinfo_values("model name")
    if names:
        return names[0]
    return platform.processor() or platform.machine()


def clocks(on_gpu: bool) -> dict[str, str]:
    """Clocks and limits at this moment, with their units, under the names of nvidia-smi or of the Linux kernel.

    The values of several GPUs are joined by '; '. Without a GPU these are the MHz of each core from /proc/cpuinfo, and
    the governor of core 0 with its range in kHz; a virtual machine often has neither.
    """
    if on_gpu:
        rows = [row.split(", ") for row in nvidia_smi(GPU_CLOCKS)]
        columns = zip(*rows, strict=True)
        return {name: "; ".join(values) for name, values in zip(GPU_CLOCKS, columns, strict=False)}
    values = {}
    for name in CPU_CLOCKS:
        path = CPUFREQ_DIR / name
        if path.exists():
            values[name] = path.read_text(encoding="utf-8").strip()
    mhz = cpuinfo_values("cpu MHz")
    if mhz:
        values["MHz"] = ", ".join(mhz)
    return values


def cpuinfo_values(key: str) -> list[str]:
    """The values of a key of /proc/cpuinfo, one a core."""
    return [line.partition(":")[2].strip() for line in cpuinfo() if line.startswith(key)]


def cpuinfo() -> list[str]:
    path = Path("/proc/cpuinfo")
    return path.read_text(encoding="utf-8").splitlines() if path.exists() else []

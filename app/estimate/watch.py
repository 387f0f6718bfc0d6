"""Runs one stage in a process of its own and watches it: seconds, memory of all its processes, use of the GPUs."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path

from app.core.config import UserError
from app.core.memory import memory_of

EVERY_S = 0.5
PROGRAM = ["-m", "app"]
MIB = 2**20
GPU_QUERY = ["nvidia-smi", "--query-gpu=memory.used,memory.total,utilization.gpu", "--format=csv,noheader,nounits"]


@dataclass
class Took:
    """What a stage took: seconds, also those of all cores; peak memory of its processes and of a GPU; its use, 0..1."""

    seconds: float = 0.0
    cpu_s: float = 0.0
    peak_bytes: int = 0
    gpu_peak_bytes: int = 0
    gpu_total_bytes: int = 0
    gpu_use: list[float] = field(default_factory=list)


def run_watched(words: list[str], log_path: Path) -> Took:
    """Runs `python -m app` with these words; what it says goes into a file.

    Raises:
        UserError: the stage failed; the message ends with its last line.
    """
    took, over = Took(), threading.Event()
    start = time.perf_counter()
    with open(log_path, "ab") as log_file:
        command = [sys.executable, *PROGRAM, *words]
        child = subprocess.Popen(command, stdout=log_file, stderr=log_file, start_new_session=True)
        watcher = threading.Thread(target=watch, args=(child.pid, took, over), daemon=True)
        watcher.start()
        try:
            _, status, usage = os.wait4(child.pid, 0)
            child.returncode = code = os.waitstatus_to_exitcode(status)
            took.cpu_s = usage.ru_utime + usage.ru_stime
        finally:
            child.kill()  # nothing where it has ended; after Ctrl-C nobody else would end it
            over.set()
            watcher.join()
    took.seconds = time.perf_counter() - start
    if code:
        lines = log_path.read_text(encoding="utf-8", errors="replace").split("\n")
        last = next((line for line in reversed(lines) if line.strip()), "it said nothing")
        raise UserError(f"the pilot's '{words[0]}' ended with exit code {code}: {last.removeprefix('error: ')}")
    return took


def watch(session: int, took: Took, over: threading.Event) -> None:
    has_gpu = shutil.which(GPU_QUERY[0]) is not None
    while not over.wait(EVERY_S):
        took.peak_bytes = max(took.peak_bytes, memory_of(session))
        if has_gpu:
            look_at_gpu(took)


def look_at_gpu(took: Took) -> None:
    """The GPU with the largest memory in use; nothing where the driver does not answer."""
    result = subprocess.run(GPU_QUERY, capture_output=True, text=True, check=False)
    lines = [] if result.returncode else result.stdout.splitlines()
    if lines:
        used, total, use = max([float(cell) for cell in line.split(",")] for line in lines)
        took.gpu_peak_bytes, took.gpu_total_bytes = max(took.gpu_peak_bytes, int(used * MIB)), int(total * MIB)
        took.gpu_use.append(use / 100)

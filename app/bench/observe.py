"""Runs a stage and looks at it once a second: memory and open files of its processes, and the images that it trains."""

from __future__ import annotations

import re
import shutil
import signal
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

from app.core.config import UserError
from app.core.environment import nvidia_smi
from app.core.memory import processes

PROGRAM = ["-m", "app.bench.every_second"]
EVERY_S, GPU_EVERY_S = 1.0, 4.0
MIB = 2**20
PROGRESS = re.compile(r"epoch (\d+)/\d+: ([\d,]+)/[\d,]+")  # epoch, and images of this process
N_THIRDS, N_POINTS = 3, 60


@dataclass(frozen=True)
class Look:
    """The processes of a stage at a second after its start.

    Loaders are those that have started no others. Of the main process, and of the ranks of several GPUs, the largest
    counts.
    """

    seconds: float
    main_bytes: int
    main_files: int
    loader_bytes: list[int]
    loader_files: list[int]


@dataclass
class Observed:
    """A stage that has ended.

    Attributes:
        answer_s: what it took to end after TERM.
        gpu_use: (seconds, share of the busiest GPU's time), as nvidia-smi has it.
        progress: (seconds, epoch, images).
    """

    seconds: float = 0.0
    code: int = 0
    answer_s: float | None = None
    looks: list[Look] = field(default_factory=list)
    gpu_use: list[tuple[float, float]] = field(default_factory=list)
    progress: list[tuple[float, int, int]] = field(default_factory=list)


def observe(words: list[str], log_path: Path, stop_after_s: float | None = None) -> Observed:
    """Runs `python -m app` with these words; what it says goes into a file.

    It gets a SIGTERM `stop_after_s` after its first trained images: starting and compiling take a minute and more.
    Raises a UserError that ends with its last line if it failed.
    """
    observed, over = Observed(), threading.Event()
    log_path.parent.mkdir(parents=True, exist_ok=True)
    start = time.monotonic()
    with open(log_path, "wb") as log_file:
        command = [sys.executable, "-W", "ignore", *PROGRAM, *words]
        child = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=log_file, stderr=log_file, start_new_session=True
        )
    watchers = [
        threading.Thread(target=watch, args=(child.pid, log_path, start, observed, over), daemon=True),
        threading.Thread(target=watch_gpu, args=(start, observed, over), daemon=True),
    ]
    for watcher in watchers if shutil.which("nvidia-smi") else watchers[:1]:
        watcher.start()
    try:
        if stop_after_s is not None and has_trained_for(child, observed, start, stop_after_s):
            stopped = time.monotonic()
            child.send_signal(signal.SIGTERM)
            child.wait()
            observed.answer_s = time.monotonic() - stopped
        observed.code = child.wait()
    finally:
        child.kill()  # nothing where it has ended; after Ctrl-C nobody else would end it
        over.set()
        watchers[0].join()
    observed.seconds = time.monotonic() - start
    if observed.code and observed.answer_s is None:
        lines = log_path.read_text(encoding="utf-8", errors="replace").split("\n")
        last = next((line for line in reversed(lines) if line.strip()), "it said nothing")
        raise UserError(f"'{words[0]}' of this bench ended with exit code {observed.code}: {last}")
    return observed


def has_trained_for(child: subprocess.Popen[bytes], observed: Observed, start: float, seconds: float) -> bool:
    """Waits until so long after the first trained images; False where the stage has ended before."""
    while child.poll() is None:
        if observed.progress and time.monotonic() >= start + observed.progress[0][0] + seconds:
            return True
        time.sleep(EVERY_S / 10)
    return False


def watch(pid: int, log_path: Path, start: float, observed: Observed, over: threading.Event) -> None:
    with open(log_path, encoding="utf-8", errors="replace") as said:
        while not over.wait(EVERY_S / 4):
            seconds = time.monotonic() - start
            observed.progress += [(seconds, epoch, images) for epoch, images in counts(said.read())]
            if not observed.looks or seconds - observed.looks[-1].seconds >= EVERY_S:
                observed.looks += look(pid, seconds)


def watch_gpu(start: float, observed: Observed, over: threading.Event) -> None:
    """Beside `watch`, which must not wait for the driver."""
    while not over.wait(GPU_EVERY_S):
        if uses := nvidia_smi(("utilization.gpu",)):
            observed.gpu_use.append((time.monotonic() - start, max(float(use.split()[0]) for use in uses) / 100))


def counts(text: str) -> Iterator[tuple[int, int]]:
    """Epoch and images of every progress line of a training."""
    for epoch, images in PROGRESS.findall(text):
        yield int(epoch), int(images.replace(",", ""))


def look(pid: int, seconds: float) -> list[Look]:
    """One, or none where the main process has ended."""
    found = {process.pid: process for process in processes(pid)}
    if pid not in found:
        return []
    with_children = {pid, *(process.parent for process in found.values())}
    mains = [process for process in found.values() if process.pid in with_children]
    loaders = [process for process in found.values() if process.pid not in with_children]
    return [
        Look(
            seconds, max(process.resident_bytes for process in mains), max(process.n_files for process in mains),
            [process.resident_bytes for process in loaders], [process.n_files for process in loaders],
        )
    ]  # fmt: skip


# --- what it shows ---------------------------------------------------------------------------------------------------


def rates(progress: list[tuple[float, int, int]]) -> list[float]:
    """Images a second between the progress lines, within an epoch."""
    found = []
    for (start_s, epoch, before), (end_s, same, images) in pairwise(progress):
        if epoch == same and end_s > start_s:
            found.append((images - before) / (end_s - start_s))
    return found


def thirds(values: list[float]) -> tuple[float, float, float] | None:
    """The median of the first, second and last third; None where there are too few."""
    n = len(values) // N_THIRDS
    if not n:
        return None
    middle, last = values[n:-n], values[-n:]
    return statistics.median(values[:n]), statistics.median(middle), statistics.median(last)


def described(observed: Observed) -> dict[str, Any]:
    """Numbers of a training for the JSON; memory in MiB, by thirds of the time in which it trained."""
    at_work = [look for look in observed.looks if is_trained_at(observed, look.seconds)]
    return {
        "seconds": observed.seconds,
        "exit_code": observed.code,
        "answer_s": observed.answer_s,
        "first_images_s": observed.progress[0][0] if observed.progress else None,
        "images": trained(observed.progress),
        "images_per_s": thirds(rates(observed.progress)),
        "gpu_use": thirds([use for seconds, use in observed.gpu_use if is_trained_at(observed, seconds)]),
        "main_mib": thirds([look.main_bytes / MIB for look in at_work]),
        "n_loaders": max((len(look.loader_bytes) for look in at_work), default=0),
        "largest_loader_mib": thirds([max(look.loader_bytes, default=0) / MIB for look in at_work]),
        "main_files": thirds([look.main_files for look in at_work]),
        "loader_files": thirds([max(look.loader_files, default=0) for look in at_work]),
        "over_time": over_time(observed),
    }


def trained(progress: list[tuple[float, int, int]]) -> int:
    """Images that a training has counted, over its epochs."""
    by_epoch = {epoch: images for _, epoch, images in progress}  # the last line of each
    return sum(by_epoch.values())


def over_time(observed: Observed) -> list[dict[str, float]]:
    """At most N_POINTS looks: second, memory in MiB, open files, and the images that were trained until then."""
    points = []
    for look in observed.looks[:: len(observed.looks) // N_POINTS + 1]:
        images = [n for seconds, _, n in observed.progress if seconds <= look.seconds]
        points.append(
            {
                "second": round(look.seconds, 1), "main_mib": round(look.main_bytes / MIB),
                "loaders_mib": round(sum(look.loader_bytes) / MIB), "main_files": look.main_files,
                "loader_files": sum(look.loader_files), "images": images[-1] if images else 0,
            }
        )  # fmt: skip
    return points


def is_trained_at(observed: Observed, seconds: float) -> bool:
    """Between the first and the last progress line."""
    progress = observed.progress
    return bool(progress) and progress[0][0] <= seconds <= progress[-1][0]

"""A sweep that is stopped twice and goes on with the same command: exits with 0 when its end is that of a whole one.

python3 .ci/sweep.py      with RUNNER, ACCEL and so on as for make; beside it runs a sweep of one seed, never stopped
"""

from __future__ import annotations

import csv
import hashlib
import json
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

SCHEMES = ("w4a16", "w4a16-mixed-dw", "w8a16")
STOPPED, WHOLE = "ci-stopped", "ci-whole"
RUNS = Path("runs")
POLL_S, LIMIT_S = 0.05, 900
begun: list[subprocess.Popen[bytes]] = []


def need(condition: bool, otherwise: str) -> None:
    if not condition:
        sys.exit(f"sweep: {otherwise}")


def make_sweep(run: str, seeds: str) -> subprocess.Popen[bytes]:
    settings = ["CONF=conf/smoke.yaml .ci/tiny.yaml", "ARGS=", f"RUN={run}", f"SEEDS={seeds}"]
    process = subprocess.Popen(["make", "sweep", f"SCHEMES={' '.join(SCHEMES)}", *settings])
    begun.append(process)
    return process


def stop_when(reached: Callable[[], bool]) -> None:
    """Begins the sweep, or goes on with it, and ends it with SIGTERM when a point is reached."""
    process = make_sweep(STOPPED, "0 1")
    end = time.monotonic() + LIMIT_S
    while not reached():
        need(process.poll() is None and time.monotonic() < end, "it ended before it was to be stopped, or hangs")
        time.sleep(POLL_S)
    process.send_signal(signal.SIGTERM)
    need(process.wait(LIMIT_S) != 0, "it was stopped and ended with 0")


def results_of(run: str) -> dict[str, Any]:
    """By file of the run of seed 0: losses and APs of every epoch, hashes of checkpoints, ONNX files and detections."""
    root = RUNS / f"{run}-seed0"
    found: dict[str, Any] = {}
    for pattern in ("*/weights/best.pt", "onnx/*.onnx", "*-coco/detections.json"):
        for path in root.glob(pattern):
            found[str(path.relative_to(root))] = hashlib.sha256(path.read_bytes()).hexdigest()
    for path in root.glob("*/results.csv"):
        rows = list(csv.DictReader(path.read_text().splitlines()))
        found[str(path.relative_to(root))] = [
            {name: cell for name, cell in row.items() if not name.startswith("time/")} for row in rows
        ]
    return found


def check_equal() -> int:
    """The number of files that were compared."""
    stopped, whole = results_of(STOPPED), results_of(WHOLE)
    need(stopped.keys() == whole.keys(), f"in one of them only: {sorted(stopped.keys() ^ whole.keys())}")
    differing = [name for name in whole if stopped[name] != whole[name]]
    need(not differing, f"stopped twice, these files are others: {differing}")
    need(sum(name.endswith(".csv") for name in whole) == 1 + len(SCHEMES), f"not all trainings are in {sorted(whole)}")
    return len(whole)


def check_report() -> None:
    """The report of both seeds: a point for each model, with both seeds."""
    (path,) = (RUNS / f"{STOPPED}-seed0").glob("report-with-*.json")
    points = {point["label"]: point["n"] for point in json.loads(path.read_text())["curve"]}
    labels = [f"{how}{scheme}{bn}" for scheme in SCHEMES for how, bn in (("qat-", ""), ("ptq-", ""), ("ptq-", "-bn"))]
    wanted = dict.fromkeys([*labels, "baseline", "baseline-fp16"], 2)
    need(points == wanted, f"the curve has {points}, not {wanted}")


def main() -> None:
    for path in RUNS.glob("ci-*"):
        shutil.rmtree(path)
    root = RUNS / f"{STOPPED}-seed0"
    whole = make_sweep(WHOLE, "0")
    training = root / f"qat-{SCHEMES[0]}"
    stop_when((training / "results.csv").exists)
    need(not (training / "done.json").exists(), "the first stop was to be inside a training")
    stop_when(lambda: any(root.glob("onnx/*.json")))
    need(not list(root.glob("*-coco/metrics.json")), "the second stop was to be inside the export")
    need(make_sweep(STOPPED, "0 1").wait(LIMIT_S) == 0, "stopped twice, it does not come to its end")
    need(whole.wait(LIMIT_S) == 0, "the whole one does not come to its end")
    n_files = check_equal()
    check_report()
    sys.stdout.write(f"stopped twice, the sweep ends as the whole one: {n_files} files are equal\n")


if __name__ == "__main__":
    try:
        main()
    finally:  # what has failed leaves nobody behind
        for process in begun:
            process.terminate()

"""A sweep that is stopped twice and goes on with the same command: exits with 0 when its end is that of a whole one.

python3 .ci/sweep.py [SCHEMES [SEEDS]]      with RUNNER, ACCEL and so on as for make

Beside it runs a sweep of the first seed that nobody stops. Three schemes and two seeds, the default, take five to six
minutes on two cores, half of it for 26 ONNX files.
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

SCHEMES, SEEDS = "w4a16 w4a16-mixed-dw w8a16", "0 1"
STOPPED, WHOLE = "ci-stopped", "ci-whole"
RUNS = Path("runs")
POLL_S, LIMIT_S = 0.05, 900
begun: list[subprocess.Popen[bytes]] = []


def need(condition: bool, otherwise: str) -> None:
    if not condition:
        sys.exit(f"sweep: {otherwise}")


def make_sweep(run: str, schemes: str, seeds: str) -> subprocess.Popen[bytes]:
    settings = ["CONF=conf/smoke.yaml .ci/tiny.yaml", "ARGS=", f"RUN={run}", f"SCHEMES={schemes}", f"SEEDS={seeds}"]
    process = subprocess.Popen(["make", "sweep", *settings])
    begun.append(process)
    return process


def stop_when(process: subprocess.Popen[bytes], reached: Callable[[], bool]) -> None:
    """Ends a sweep with SIGTERM when a point is reached."""
    end = time.monotonic() + LIMIT_S
    while not reached():
        need(process.poll() is None and time.monotonic() < end, "it ended before it was to be stopped, or hangs")
        time.sleep(POLL_S)
    process.send_signal(signal.SIGTERM)
    need(process.wait(LIMIT_S) != 0, "it was stopped and ended with 0")


def results_of(run: str) -> dict[str, Any]:
    """By file of the run of seed 0: losses and APs of every epoch, hashes of checkpoints, ONNX files and detections."""
    root = root_of(run)
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


def root_of(run: str) -> Path:
    """The run of the first seed."""
    runs = json.loads((RUNS / run / "sweep.json").read_text())["runs"]
    return RUNS / next(iter(runs))


def check_equal(n_schemes: int) -> int:
    """The number of files that were compared."""
    stopped, whole = results_of(STOPPED), results_of(WHOLE)
    need(stopped.keys() == whole.keys(), f"in one of them only: {sorted(stopped.keys() ^ whole.keys())}")
    differing = [name for name in whole if stopped[name] != whole[name]]
    need(not differing, f"stopped twice, these files are others: {differing}")
    need(sum(name.endswith(".csv") for name in whole) == 1 + n_schemes, f"not all trainings are in {sorted(whole)}")
    return len(whole)


def check_report(schemes: list[str], n_seeds: int) -> None:
    """The report of all seeds: a point for each model, with all seeds."""
    name = "report-with-*.json" if n_seeds > 1 else "report.json"
    (path,) = root_of(STOPPED).glob(name)
    points = {point["label"]: point["n"] for point in json.loads(path.read_text())["curve"]}
    labels = [f"{how}{scheme}{bn}" for scheme in schemes for how, bn in (("qat-", ""), ("ptq-", ""), ("ptq-", "-bn"))]
    wanted = dict.fromkeys([*labels, "baseline", "baseline-fp16"], n_seeds)
    need(points == wanted, f"the curve has {points}, not {wanted}")


def main(schemes: str = SCHEMES, seeds: str = SEEDS) -> None:
    for path in RUNS.glob("ci-*"):
        shutil.rmtree(path)
    first_scheme, first_seed = schemes.split()[0], seeds.split()[0]
    root = RUNS / f"{STOPPED}-seed{first_seed}"
    whole = make_sweep(WHOLE, schemes, first_seed)
    training = root / f"qat-{first_scheme}"
    stop_when(make_sweep(STOPPED, schemes, seeds), (training / "results.csv").exists)
    need(not (training / "done.json").exists(), "the first stop was to be inside a training")
    stop_when(make_sweep(STOPPED, schemes, seeds), lambda: any(root.glob("onnx/*.json")))
    need(not list(root.glob("*-coco/metrics.json")), "the second stop was to be inside the export")
    need(make_sweep(STOPPED, schemes, seeds).wait(LIMIT_S) == 0, "stopped twice, it does not come to its end")
    need(whole.wait(LIMIT_S) == 0, "the whole one does not come to its end")
    n_files = check_equal(len(schemes.split()))
    check_report(schemes.split(), len(seeds.split()))
    sys.stdout.write(f"stopped twice, the sweep ends as the whole one: {n_files} files are equal\n")


if __name__ == "__main__":
    try:
        main(*sys.argv[1:])
    finally:  # what has failed leaves nobody behind
        for process in begun:
            process.terminate()

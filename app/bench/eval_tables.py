"""The tables of the eval bench: time and memory, AP step by step, and what more images cost."""

from __future__ import annotations

import logging
import statistics
from typing import Any

from app.report.tables import MISSING, markdown_table

log = logging.getLogger(__name__)
OURS, STOCK, SESSION = "our eval", "yolo val", "session"  # the sides of a turn; the last one runs the model alone
Cells = list[list[str]]


def show(result: dict[str, Any]) -> None:
    """Logs what `bench_eval` has written."""
    facts = [result[key] for key in ("file", "imgsz", "n_images", "batch", "device")]
    log.info("%s, %d px, %d images in batches of %d, %s", *facts)
    ap = result["AP"]
    session_s = statistics.median(turn[SESSION]["total_s"] for turn in result["turns"])
    lines = [*markdown_table(side_cells(result, session_s)), "", *markdown_table(step_cells(ap)), ""]
    for line in [*lines, *markdown_table(image_cells(result, session_s))]:
        log.info("%s", line)
    log.info("detections: %d ours, %d of yolo val, %d in both", ap["n_ours"], ap["n_stock"], ap["n_same"])
    log.info(
        "our eval takes %.3f of the pure session time, %.3f of yolo val's",
        result["to_pure_session"], result["to_yolo_val"],
    )  # fmt: skip


def side_cells(result: dict[str, Any], session_s: float) -> Cells:
    """Medians over the turns, a row a side; `session_s` is the time of the session alone."""
    n_images = result["n_images"]
    cells = [["", "images/s", "seconds", "in ONNX Runtime", "process s", "peak MiB", "AP"]]
    for name in (OURS, STOCK):
        sides = [turn[name] for turn in result["turns"]]
        total_s, in_session_s, process_s, peak_mib = (
            statistics.median(side[key] for side in sides) for key in ("total_s", "session_s", "process_s", "peak_mib")
        )
        own = [f"{n_images / total_s:.1f}", f"{total_s:.2f}", f"{in_session_s / total_s:.3f}", f"{process_s:.2f}"]
        cells.append([name, *own, f"{peak_mib:.0f}", f"{sides[0]['AP']:.4f}"])
    rate = f"{n_images / session_s:.1f}"
    cells.append(["session alone", rate, f"{session_s:.2f}", "1.000", MISSING, MISSING, MISSING])
    return cells


def step_cells(ap: dict[str, Any]) -> Cells:
    """What `explain` gave: each change and what it adds to AP."""
    steps = [[change, f"{added:+.4f}"] for change, added in ap["steps"].items()]
    ends = [OURS, f"{ap['ours']:.4f}"], [STOCK, f"{ap['stock']:.4f}"]
    return [["from our AP to that of yolo val", "AP"], ends[0], *steps, ends[1]]


def image_cells(result: dict[str, Any], session_s: float) -> Cells:
    """Our evaluator by number of images; `session_s` is the session's time for those given."""
    cells = [["images of our eval", "peak MiB", "seconds", "in ONNX Runtime", "to the session alone"]]
    for n_images, side in result["ours_by_images"].items():
        total_s = side["total_s"]
        to_session = total_s / (session_s / result["n_images"] * int(n_images))
        share = f"{side['session_s'] / total_s:.3f}"
        cells.append([n_images, f"{side['peak_mib']:.0f}", f"{total_s:.1f}", share, f"{to_session:.3f}"])
    return cells

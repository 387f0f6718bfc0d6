"""Report: the JSON and CSV files of a run -> summary.md, figures, and the table on the screen."""

from __future__ import annotations

import logging
import sys
from typing import Any

from app.config import Config, UserError, read_yaml, validate
from app.curves import overlay_figure, read_rows, save_png
from app.run import RunRoot, read_json, record_stage, write_text
from app.summary import number, summary, table

log = logging.getLogger(__name__)


def report(config: Config, run: RunRoot, force: bool) -> None:
    """Writes summary.md and figures/; logs the table. It is made anew each time, so `force` changes nothing here.

    Raises:
        UserError: nothing was scored yet.
        SystemExit: (1) a variant stays below report.min_ap50.
    """
    scored = read_metrics(run)
    if not scored:
        raise UserError(f"no metrics.json under {run.root}: run 'make eval' first")
    trained = {label: validate(read_yaml(run.variant_dir(label) / "config.yaml")) for label in run.trained_labels()}
    figures = draw_figures(run, list(trained))
    text = summary(run, scored, trained, figures)
    write_text(run.summary, text)
    record_stage(run, "report", {"file": run.summary.name})
    for line in [*table(scored), "", f"report: {run.summary}"]:
        log.info("%s", line)
    check_min_ap50(scored, config.report.min_ap50)


def read_metrics(run: RunRoot) -> list[dict[str, Any]]:
    """All metrics.json of the run; fp16 first, then by label and file."""
    found = [read_json(path, "eval") | {"dir": path.parent.name} for path in run.root.glob("*-coco/metrics.json")]
    return sorted(found, key=lambda m: (m["model"]["label"] != "fp16", m["model"]["label"], m["model"]["file"]))


def check_min_ap50(scored: list[dict[str, Any]], minimum: float | None) -> None:
    if minimum is None:
        return
    low = [m for m in scored if not (m["coco"]["AP50"] or 0.0) >= minimum]
    for metrics in low:
        ap50 = number(metrics["coco"]["AP50"])
        log.error("failed: %s reaches AP50 %s, report.min_ap50 asks for %.2f", metrics["model"]["label"], ap50, minimum)
    if low:
        sys.exit(1)


def draw_figures(run: RunRoot, labels: list[str]) -> list[str]:
    """figures/curves.png over all trained variants; returns the names of the files."""
    if not labels:
        return []
    variants = {label: read_rows(run.variant_dir(label) / "results.csv") for label in labels}
    save_png(overlay_figure(variants), run.figures_dir / "curves.png")
    return ["curves.png"]

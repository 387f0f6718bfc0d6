"""Report: the JSON and CSV files of a run -> summary.md, summary.html, figures, and the table on the screen."""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence

from app.config import Config, Report, UserError
from app.reporting.analysis import analyse, annotations_of
from app.reporting.evidence import BASELINE_DIR, Evidence, gather
from app.reporting.figures import by_class, by_size, curves, precision_recall
from app.reporting.findings import distinct, findings, measured_alike, shown_apart
from app.reporting.gallery import gallery
from app.reporting.layer_figures import layers, quantizer_health
from app.reporting.page import page
from app.reporting.seeds import enter_seeds
from app.reporting.summary import summary, tables
from app.run import RunRoot, record_stage, write_json, write_text
from app.tables import number, plain

log = logging.getLogger(__name__)


def report(config: Config, run: RunRoot, force: bool, others: Sequence[RunRoot] = ()) -> None:
    """Writes report.json, summary.md, summary.html and figures/; logs the table. It is made anew each time, so `force`
    changes nothing here. What a partial run lacks is named on the page and logged.

    `others` are the same run with other seeds: AP and differences become means with their spread.

    Raises:
        UserError: there is no such run, or `others` differ from it in more than seeds.
        SystemExit: (1) report.min_ap50 is set and a variant stays below it, or none was scored.
    """
    evidence = gather(run)
    found = findings(evidence, config.report)
    if others:
        enter_seeds(found, [evidence, *map(gather, others)])
    write_json(run.root / "report.json", found)
    figures = make_figures(evidence, config.report)
    text = summary(evidence, found, figures)
    write_text(run.summary, text)
    write_text(run.summary.with_suffix(".html"), page(text, run.root, found["run"]))
    record_stage(run, "report", {"file": run.summary.name})
    for line in [*tables(evidence.scored, found), "", *(f"missing: {line}" for line in found["missing"])]:
        log.info("%s", line)
    log.info("report: %s", run.summary)
    check_min_ap50(evidence, config.report.min_ap50)


def make_figures(evidence: Evidence, settings: Report) -> list[str]:
    """Draws figures/*.png and writes figures/analysis.json; returns the Markdown blocks, in the order of the page."""
    run = evidence.run
    blocks = curves(evidence, run.figures_dir)
    about_layers = [*layers(evidence, run.figures_dir), *quantizer_health(evidence, run.figures_dir)]
    if not evidence.scored:
        return [*blocks, *about_layers]
    group = distinct(measured_alike(evidence.scored)[0])
    blocks.append(by_size(group, run.figures_dir))
    try:
        facts, truth = analyse(annotations_of(evidence, group[0]), group)
    except UserError as error:
        left_out = "Left out: precision over recall, AP by class and the gallery of images"
        return [*blocks, f"{left_out}, because {plain(str(error).replace(f'{run.root}/', ''))}.", *about_layers]
    blocks.append(precision_recall(group, facts, run.figures_dir))
    blocks += about_layers
    if group[0]["dir"] == BASELINE_DIR:
        blocks += [by_class(m, group[0], facts, run.figures_dir) for m in shown_apart(group)]
        if settings.gallery_images:
            blocks += [gallery(run, (group[0], m), facts, truth, settings) for m in shown_apart(group)]
    write_json(run.figures_dir / "analysis.json", facts)
    return blocks


def check_min_ap50(evidence: Evidence, minimum: float | None) -> None:
    """Only trainings are asked for it: what quantization without training loses is a finding, not a failure."""
    if minimum is None:
        return
    trained = [m for m in evidence.scored if not m["model"]["label"].startswith("ptq-")]
    low = [m for m in trained if not (m["coco"]["AP50"] or 0.0) >= minimum]
    for m in low:
        ap50 = number(m["coco"]["AP50"])
        log.error("failed: %s reaches AP50 %s, report.min_ap50 asks for %.2f", m["model"]["label"], ap50, minimum)
    if not trained:
        log.error("failed: no training was scored, report.min_ap50 asks for %.2f", minimum)
    if low or not trained:
        sys.exit(1)

"""Report: the JSON and CSV files of a run -> summary.md, summary.html, figures, and the table on the screen."""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pycocotools.coco import COCO

from app.coco.dataset import Dataset, check_unchanged, source_at
from app.coco.detail import Metrics, analyse
from app.core.config import Config, Report, UserError
from app.core.files import write_json, write_text
from app.core.run import RunRoot, record_stage
from app.report.current import is_current, state
from app.report.curve import curve_block
from app.report.ending import show
from app.report.evidence import Evidence, gather, label_of
from app.report.figures import by_class, by_size, curves, precision_recall
from app.report.findings import derive, enter_seeds
from app.report.gallery import gallery
from app.report.groups import distinct, is_baseline, measured_alike, shown_apart
from app.report.html import page
from app.report.layer_figures import layers, quantizer_health
from app.report.page_files import page_of
from app.report.summary import summary
from app.report.tables import number, plain

log = logging.getLogger(__name__)


def report(config: Config, run: RunRoot, others: Sequence[RunRoot] = ()) -> None:
    """Writes report.json, summary.md, summary.html and figures/, and logs what `show` does.

    What a partial run lacks is named on the page and logged. `others` are the same run with other seeds: AP and
    differences become means with their spread, on a page beside that of the run alone, summary-with-<others>.md.

    Raises:
        UserError: there is no such run, or `others` differ from it in more than seeds.
        SystemExit: (1) report.min_ap50 is set and a variant stays below it, or none was scored.
    """
    evidences = list(map(gather, [run, *others]))
    evidence = evidences[0]
    findings = derive(evidence, config.report)
    if others:
        enter_seeds(findings, evidences)
    files = page_of(run, others)
    write_json(files.numbers, findings)
    log.info("report: drawing the figures")
    block = curve_block(findings["curve"], f"curve{files.ending}.png", run.figures_dir)
    figures = make_figures(evidence, config.report)
    text = summary(evidence, findings, figures, block)
    write_text(files.markdown, text)
    write_text(files.html, page(text, run.root, findings["run"]))
    made_of = {} if others else {"state": state(run, config.report)}
    record_stage(run, f"report{files.ending}", {"file": files.markdown.name, **made_of})
    show(files, evidence, findings)
    check_min_ap50(evidence, config.report.min_ap50)


def is_reported(config: Config, run: RunRoot) -> bool:
    """Whether the page is there and current; logs that it is, and what the report stage ends with.

    Raises:
        SystemExit: as `report`.
    """
    if not is_current(run, config.report):
        return False
    evidence = gather(run)
    log.info("report: done already, nothing has changed since")
    show(page_of(run), evidence, derive(evidence, config.report))
    check_min_ap50(evidence, config.report.min_ap50)
    return True


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
        facts, truth = analyse(scored_dataset(evidence, group[0]), group)
    except UserError as error:
        reason = plain(str(error).replace(f"{run.root}/", ""))
        left_out = f"Left out: precision over recall, AP by class and the gallery of images, because {reason}."
        return [*blocks, left_out, *about_layers]
    blocks.append(precision_recall(group, facts, run.figures_dir))
    blocks += about_layers
    if is_baseline(group[0]):
        quantized = shown_apart(group)
        blocks += [by_class(metrics, group[0], facts, run.figures_dir) for metrics in quantized]
        if settings.gallery_images:
            blocks += galleries(run, [(group[0], metrics) for metrics in quantized], facts, truth, settings)
    write_json(run.figures_dir / "analysis.json", facts)
    return blocks


def galleries(
    run: RunRoot, pairs: list[tuple[Metrics, Metrics]], facts: dict[str, Any], truth: COCO, settings: Report
) -> list[str]:
    """The gallery of each (baseline, quantized), or the reason why there is none."""
    try:
        return [gallery(run, pair, facts, truth, settings) for pair in pairs]
    except (UserError, OSError) as error:
        return [f"Left out: the gallery of images, because {plain(str(error))}."]


def scored_dataset(evidence: Evidence, metrics: Metrics) -> Dataset:
    """The val split of the run, if it is the one that was scored.

    Raises:
        UserError: it is not, or the annotations are gone; the message is the reason.
    """
    if evidence.provenance is None:
        raise UserError("dataset/provenance.json is not there")
    split, coco_dir = evidence.provenance["splits"]["val"], Path(evidence.provenance["coco_dir"])
    name, title = split["name"], evidence.provenance["title"]
    dataset = Dataset(coco_dir, name, split["image_ids"], title, source_at(coco_dir, name, split))
    try:
        return check_unchanged(dataset, metrics["dataset"]["annotation_sha256"])
    except UserError as error:
        file_name = dataset.annotation_file.name
        raise UserError(f"the scored annotations ({file_name}) are not on this machine, or have changed") from error


def check_min_ap50(evidence: Evidence, minimum: float | None) -> None:
    """Ends the command with exit status 1 if a trained model stays below report.min_ap50, or none was scored.

    PTQ is exempt: what quantization without training loses is a finding, not a failure.
    """
    if minimum is None:
        return
    trained = [metrics for metrics in evidence.scored if label_of(metrics).method != "ptq"]
    low = [metrics for metrics in trained if not (metrics["coco"]["AP50"] or 0.0) >= minimum]
    for metrics in low:
        label, ap50 = metrics["model"]["label"], number(metrics["coco"]["AP50"])
        log.error("failed: %s reaches AP50 %s, report.min_ap50 asks for %.2f", label, ap50, minimum)
    if not trained:
        log.error("failed: no training was scored, report.min_ap50 asks for %.2f", minimum)
    if low or not trained:
        sys.exit(1)

"""Report: the JSON and CSV files of a run -> summary.md, summary.html, figures, and the table on the screen."""

from __future__ import annotations

import hashlib
import json
import logging
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pycocotools.coco import COCO

from app.coco.dataset import BUILTIN_TITLE, Dataset, check_unchanged, source_at
from app.coco.detail import Metrics, analyse
from app.core.config import Config, Report, UserError
from app.core.environment import REPO_DIR
from app.core.files import read_json, write_json, write_text
from app.core.run import PROVENANCE_SHAPE, RECORD_SHAPE, RunRoot, record_stage, runs_of, sweep_of
from app.report.curve import curve_block, curve_lines
from app.report.evidence import Evidence, gather, label_of
from app.report.figures import by_class, by_size, curves, precision_recall
from app.report.findings import Findings, derive, enter_seeds, merged
from app.report.gallery import gallery
from app.report.groups import distinct, is_baseline, measured_alike, shown_apart
from app.report.html import page
from app.report.layer_figures import layers, quantizer_health
from app.report.page_files import PageFiles, page_of
from app.report.spread import ROWS
from app.report.summary import summary, tables
from app.report.tables import number, plain
from app.report.verdict import verdict

FIRST_SENTENCE = re.compile(r".*?\.(?= [A-Z]|$)", re.DOTALL)  # a number has no blank behind its point
RECORD = "run.json"  # has what `state` gives, so it is no part of that
log = logging.getLogger(__name__)


def report(config: Config, run: RunRoot, others: Sequence[RunRoot] = (), left_out: Sequence[str] = ()) -> None:
    """Writes report.json, summary.md, summary.html and figures/, and logs what `show` does.

    What a partial run lacks is named on the page and logged. `others` are the same run with other seeds: AP and
    differences become means with their spread, on a page beside that of the run alone, summary-with-<others>.md.
    `left_out` are lines about runs that the page lacks, which it names as missing.

    Raises:
        UserError: there is no such run, or `others` differ from it in more than seeds.
        SystemExit: (1) report.min_ap50 is set and a variant stays below it, or none was scored.
    """
    evidences = list(map(gather, [run, *others]))
    evidence = merged(evidences) if others else evidences[0]
    findings = derive(evidence, config.report)
    if others:
        enter_seeds(findings, evidences)
    findings["missing"] = [*findings["missing"], *left_out]
    files = page_of(run, others)
    write_json(files.numbers, findings)
    log.info("report: drawing the figures")
    block = curve_block(findings["curve"], f"curve{files.ending}.png", run.figures_dir)
    figures = make_figures(evidences[0], config.report)
    text = summary(evidence, findings, figures, block)
    write_text(files.markdown, text)
    write_text(files.html, page(text, run.root, findings["run"]))
    made_of = {} if others or left_out else {"state": state(run, config.report)}
    record_stage(run, f"report{files.ending}", {"file": files.markdown.name, **made_of})
    show(files, evidence, findings)
    check_min_ap50(evidence, config.report.min_ap50)


def is_reported(config: Config, run: RunRoot) -> bool:
    """Whether the page is there and current; logs that it is, and ends as `report` does, with exit status 1 too."""
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
    """The val split of the run; raises a UserError with the reason if it is not the one that was scored, or is gone."""
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


# --- whether a page is current ---------------------------------------------------------------------------------------


def is_current(run: RunRoot, settings: Report) -> bool:
    """Whether nothing has changed since the report stage wrote the page: no file of the run, the page included, no
    setting, not the annotations of the val split, and not this program."""
    if not run.run_json.exists():
        return False
    recorded = read_json(run.run_json, "data", RECORD_SHAPE)["stages"].get("report", {})
    return recorded.get("state") == state(run, settings)


def state(run: RunRoot, settings: Report) -> str:
    """SHA-256 (16 hex digits) over all that a page depends on; files of the run count by name, size and time."""
    files = sorted(path for path in run.root.rglob("*") if path.is_file() and path.name != RECORD)
    stamps = []
    for path in [*files, *val_annotations(run)]:
        status = path.stat()
        stamps.append([str(path), status.st_size, status.st_mtime_ns])
    parts = [settings.model_dump(mode="json"), program(), stamps]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]


def program() -> str:
    """SHA-256 over the source of this program, the versions of its packages and the spread of seeds that it knows."""
    digest = hashlib.sha256()
    for path in [*sorted((REPO_DIR / "app").rglob("*.py")), REPO_DIR / "requirements.lock", ROWS]:
        if path.exists():
            digest.update(path.read_bytes())
    return digest.hexdigest()


def val_annotations(run: RunRoot) -> list[Path]:
    """The annotations of the val split, where they are on this machine: without them a page has fewer figures."""
    try:
        provenance = read_json(run.provenance, "data", PROVENANCE_SHAPE)
    except UserError:
        return []
    split = provenance["splits"]["val"]
    path = source_at(Path(provenance["coco_dir"]), split["name"], split).annotation_file
    return [path] if path.is_file() else []


# --- what the stage, and with it a whole job, says at its end --------------------------------------------------------


def show(files: PageFiles, evidence: Evidence, findings: Findings) -> None:
    """Logs the end of a job, whose page `files` are."""
    curve = curve_lines(findings["curve"])[:-2]  # without the note
    for line in [*tables(evidence.scored, findings), "", *curve]:
        log.info("%s", line)
    for line in findings["missing"]:
        log.info("missing: %s", line)
    for paragraph in verdict(findings):
        log.info("verdict: %s", first_sentence(paragraph))
    log.info("report: %s, the same as Markdown: %s", files.html, files.markdown)
    log.info("next: %s", next_step(files.run, evidence, findings))


def first_sentence(paragraph: str) -> str:
    """The first sentence of a paragraph of the page, without its Markdown."""
    text = paragraph.replace("**", "").replace("\\|", "|").replace("`", "")
    match = FIRST_SENTENCE.match(text)
    return match.group() if match else text


def next_step(run: RunRoot, evidence: Evidence, findings: Findings) -> str:
    """What a user does after this report."""
    if sweep := sweep_of(run):
        return next_of_sweep(sweep, evidence, findings)
    if findings["missing"]:
        return "each line 'missing' names its command; 'make report' then writes the page anew"
    if evidence.imported and not evidence.trainings:
        return (
            "open the page in a browser; what a few epochs of QAT win back: 'make train-qat export eval report "
            f"RUN={run.name} COCO_DIR=PATH CONF=conf/finetune.yaml "
            f'ARGS="--set model={evidence.imported.model} --set train.weights=PATH/{evidence.imported.start["file"]}"\''
        )
    if is_drawn(evidence):
        return (
            "open the page in a browser, 'make tensorboard' for the curves; COCO itself: 'make all COCO_DIR=path' "
            "(README, 'The full run')"
        )
    if findings["seeds"] is None:
        seed = max((training.config["train"]["seed"] for training in evidence.trainings.values()), default=0) + 1
        other = f"{run.name}-seed{seed}"
        return (
            "open the page in a browser, 'make tensorboard' for the curves; how much another seed differs: the "
            f"commands of this run with RUN={other} and '--set train.seed={seed}' added to ARGS, then 'make report "
            f'RUN={run.name} ARGS="--runs {other}"\''
        )
    others = " ".join(merged["name"] for merged in findings["seeds"]["runs"][1:])
    publish = f'make publish RUN={run.name} ARGS="--runs {others}"'
    return f"open the page in a browser; '{publish}' keeps it in runs/reports"


def next_of_sweep(sweep: RunRoot, evidence: Evidence, findings: Findings) -> str:
    """The same where the runs are those of a sweep, or one of them."""
    n_seeds = len(findings["seeds"]["runs"]) if findings["seeds"] else 1
    if findings["missing"]:
        return f"the command of sweep {sweep.name} makes what is missing, and the page anew"
    if n_seeds < len(runs_of([sweep.name], sweep.runs_dir)):
        return f"open the page in a browser; 'make report RUN={sweep.name}' has all seeds of the sweep"
    if is_drawn(evidence):
        return (
            "open the page in a browser, 'make tensorboard' for the curves; COCO itself: the same 'make sweep' with "
            "COCO_DIR=path, another RUN and without the settings of the smoke (docs/curve.md)"
        )
    if n_seeds == 1:
        return "open the page in a browser; how much another seed differs: the same 'make sweep' with more SEEDS"
    return f"open the page in a browser; 'make publish RUN={sweep.name}' keeps it in runs/reports"


def is_drawn(evidence: Evidence) -> bool:
    return evidence.provenance is not None and evidence.provenance["title"] == BUILTIN_TITLE

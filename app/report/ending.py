"""What the report stage, and with it a whole job, says at its end: table, verdict, page, what to do next."""

from __future__ import annotations

import logging
import re

from app.coco.dataset import BUILTIN_TITLE
from app.core.run import RunRoot, runs_of, sweep_of
from app.report.curve import curve_lines
from app.report.evidence import Evidence
from app.report.findings import Findings
from app.report.page_files import PageFiles
from app.report.summary import tables
from app.report.verdict import verdict

FIRST_SENTENCE = re.compile(r".*?\.(?= [A-Z]|$)", re.DOTALL)  # a number has no blank behind its point
log = logging.getLogger(__name__)


def show(files: PageFiles, evidence: Evidence, findings: Findings) -> None:
    """Logs the end of a job, whose page `files` are."""
    for line in [*tables(evidence.scored, findings), ""]:
        log.info("%s", line)
    for line in curve_lines(findings["curve"])[:-2]:  # without the note
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
            'open the page in a browser; what a few epochs of QAT win back: "make train-qat export eval report '
            f"RUN={run.name} CONF=conf/finetune.yaml ARGS='--set train.weights={evidence.imported.start['file']}'\""
        )
    if is_drawn(evidence):
        return (
            "open the page in a browser, 'make tensorboard' for the curves; COCO itself: 'make all COCO_DIR=path' "
            "(README, 'The full run')"
        )
    if findings["seeds"] is None:
        return (
            "open the page in a browser, 'make tensorboard' for the curves; how much another seed differs: the "
            f"commands of this run with RUN={run.name}-seed1 and '--set train.seed=1' added to ARGS, then 'make report "
            f'RUN={run.name} ARGS="--runs {run.name}-seed1"\''
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

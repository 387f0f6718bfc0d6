"""Publish: what is worth keeping of a run -> runs/reports/<name>, which git tracks, and an entry in runs/LOG.md."""

from __future__ import annotations

import logging
import re
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from app.coco.dataset import BUILTIN_TITLE
from app.core.config import UserError
from app.core.environment import REPO_DIR, utc_now
from app.core.files import new_folder, read_json, write_text
from app.core.labels import SCORES_ENDING
from app.core.mounts import as_known
from app.core.results import AP, AP_FREQUENT
from app.core.run import RunRoot
from app.core.start import told
from app.report.evidence import Evidence, gather
from app.report.findings import Findings, start_of
from app.report.groups import sample
from app.report.html import PICTURE, is_inside, page
from app.report.page_files import page_of
from app.report.tables import number, plain, signed
from app.report.verdict import health_lines, merged_text, telling_lines, verdict

log = logging.getLogger(__name__)
KEPT = (
    "run.json", "dataset/provenance.json", "figures/*.json", "onnx/*.json",
    f"*{SCORES_ENDING}/metrics.json",
    "*/config.yaml", "*/args.yaml", "*/results.csv", "*/loss_curve.csv", "*/loss_curve.png",
    "*/env.json", "*/done.json", "*/quant_config.json", "*/health.json", "*/scheme/*.yaml",
)  # fmt: skip
TEXT_FILES = (".json", ".yaml", ".csv")
LINK = re.compile(r"\[([^\]\n]+)\]\(([^)#\s][^)\s]*)\)")  # to a file, not to a heading
# A whole value of JSON or YAML, a word quoted for a shell, then one inside a text, also one that leads up: what stands
# before it, and its last name.
ABSOLUTE_PATHS = (
    re.compile(r'(")/(?:[^"\n]*/)?([^"/\n]*)(?=")'),
    re.compile(r"((?:^|: |- )'?)/(?:[^\n]*/)?([^/\n]*)$", re.MULTILINE),
    re.compile(r"((?<!\w)'(?:[\w.-]+=)?)/(?:[^'\n]*/)?([^'/\n]*)(?=')"),
    re.compile(r"((?<![\w.~)/<])|(?<=file://))/(?:[\w.+@%-]+/)+([\w.+@%-]*)"),
    re.compile(r"((?<![\w.~/]))(?:\.\./)+(?:[\w.+@%-]+/)+([\w.+@%-]*)"),
)
NO_PHOTOS = "*Left out here: photos of the dataset are not published.*"
LOG_HEAD = '# Runs\n\nOne entry a run, the newest last; failures too. "Better" states seeds and spread, or says n=1.\n'


def publish(run: RunRoot, aim: str | None, force: bool, others: Sequence[RunRoot] = ()) -> None:
    """Copies the report and the JSON, CSV and YAML files it was made from, and adds an entry to runs/LOG.md.

    Weights, ONNX files, logs, events and detections stay behind, and with them every image of the dataset: the gallery
    is published for drawn shapes only.

    Args:
        aim: what the run was to find out, for the entry; None: what it compares.
        others: the page merged with these runs, which is published under a name of its own.

    Raises:
        UserError: the run has no report, or was published before and `force` is not set.
    """
    files = page_of(run, others)
    target = files.published_dir
    findings = read_json(files.numbers, "report", {"run": str, "missing": list[str]})
    if not files.markdown.exists():
        raise UserError(f"{files.markdown} is missing: run 'make report' first")
    if target.exists() and not force:
        raise UserError(f"{target} is there already: ARGS=--force replaces it and adds another entry to the log")
    evidence = gather(run)
    text = files.markdown.read_text(encoding="utf-8")
    is_builtin = evidence.provenance is not None and evidence.provenance["title"] == BUILTIN_TITLE
    pictures = [name for names in PICTURE.findall(text) for name in names[:2]]
    try:
        log_entry = entry(evidence, findings, aim, target.name)
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:  # anybody may have written it
        raise UserError(f"{files.numbers} is not what 'make report' writes: run 'make report' again") from error
    without = private_paths(run, evidence)
    shown = pictures if is_builtin else [name for name in pictures if name.endswith(".png")]  # photos are JPEG
    copy(run, target, [files.numbers.name, *shown], without)
    text = anonymous(without_dead_ends(text, target), without)
    write_text(target / "summary.md", text)
    write_text(target / "summary.html", page(text, target, target.name))
    log_file = run.runs_dir / "LOG.md"
    before = log_file.read_text(encoding="utf-8") if log_file.exists() else LOG_HEAD
    write_text(log_file, f"{before.rstrip()}\n\n{anonymous(log_entry, without)}\n")
    log.info("publish: %s, and an entry in %s", target, log_file)


def copy(run: RunRoot, target: Path, names: list[str], without: dict[str, str]) -> None:
    """Replaces `target` by the files of KEPT and those of the page; it appears when it is complete.

    Only files of the run itself are published, none that a link in it leads to, and none of `without` in their text.
    """
    files = {run.root / name for name in names}
    for pattern in KEPT:
        files.update(run.root.glob(pattern))
    with new_folder(target, replace=True) as part:
        for path in sorted(files):
            if not is_inside(path, run.root):
                continue
            copied = part / path.relative_to(run.root)
            copied.parent.mkdir(parents=True, exist_ok=True)
            if path.suffix in TEXT_FILES:
                text = path.read_text(encoding="utf-8", errors="replace")
                copied.write_text(anonymous(text, without), encoding="utf-8")
            else:
                shutil.copyfile(path, copied)


def private_paths(run: RunRoot, evidence: Evidence) -> dict[str, str]:
    """Folders of this machine -> what stands for each in a published text, the longest first."""
    folders = {str(run.root.resolve()): run.name, str(run.runs_dir.resolve()): "runs", str(REPO_DIR): "."}
    if evidence.provenance is not None:
        coco_dir = evidence.provenance["coco_dir"]
        for place in (coco_dir, as_known(coco_dir)):
            folders |= {place: Path(place).name or "coco"} if place.startswith("/") else {}
    folders |= {str(Path.home()): "~"}
    return dict(sorted(folders.items(), key=lambda item: -len(item[0])))


def anonymous(text: str, without: dict[str, str]) -> str:
    """The text without absolute paths: of those that are not in `without` the last name remains."""
    for folder, name in without.items():
        text = re.sub(rf"{re.escape(folder)}(?=$|[^\w.-])", name, text, flags=re.MULTILINE)
    for pattern in ABSOLUTE_PATHS:
        text = pattern.sub(lambda match: f"{match[1]}.../{match[2]}", text)
    return text


def without_dead_ends(text: str, target: Path) -> str:
    """The page with a sentence in place of every picture, and code in place of every link, that has no file there."""
    text = PICTURE.sub(lambda match: match[0] if is_inside(target / match[2], target) else NO_PHOTOS, text)
    text = LINK.sub(lambda match: match[0] if is_inside(target / match[2], target) else f"`{match[2]}`", text)
    title, _, rest = text.partition("\n")
    note = "Published without weights, ONNX files, logs and detections: names without a link are of the whole run root."
    return f"{title}\n{rest.rstrip()}\n\n{note}\n"


def entry(evidence: Evidence, findings: Findings, aim: str | None, folder: str) -> str:
    """Markdown of one entry: aim, command, commit, machine, result, verdict; `folder` below reports/ has the page."""
    environments = evidence.environments
    facts = {
        "aim": aim or plain(compared(evidence)),
        "command": plain(listed(f"`{environment['command']}`" for environment in environments)),
        "commit": plain(listed(str(environment.get("code_version")) for environment in environments)),
        "machine": plain(listed(map(machine, environments))),
        "result": "; ".join(results(findings)) or "nothing was scored",
        "verdict": " ".join([*verdict(findings), *telling_lines(findings), *health_lines(findings)]),
        "missing": plain("; ".join(findings["missing"])) or "nothing",
        "report": f"[reports/{folder}/summary.md](reports/{folder}/summary.md)",
    }
    lines = [f"- **{name}:** {value}" for name, value in facts.items()]
    return "\n".join([f"## {utc_now()[:10]} {plain(findings['run'])}", "", *lines])


def listed(values: Iterable[str]) -> str:
    """The values in their order, each once."""
    return ", ".join(dict.fromkeys(values)) or "unknown"


def compared(evidence: Evidence) -> str:
    """'compare fp16, qat-w4a16: yolov10m.yaml, 300 epochs, seed 0'."""
    settings = []
    for training in evidence.trainings.values():
        train = training.config["train"]
        start = start_of(training)
        began = f", {told(start)}" if start else ""
        settings.append(f"{training.config['model']}, {train['epochs']} epochs, seed {train['seed']}{began}")
    if evidence.imported is None:
        return f"compare {listed(evidence.trainings)}: {listed(settings)}"
    others = f", {listed(evidence.trainings)}: {listed(settings)}" if settings else ""
    return f"compare PTQ with the imported weights {told(evidence.imported.start)}{others}"


def machine(environment: dict[str, Any]) -> str:
    gpus = environment.get("gpus")
    return listed(gpus) if gpus else f"{environment.get('cpu_count')} CPU cores, no GPU"


def results(findings: Findings) -> list[str]:
    """For every table how it was measured, AP of each row and its difference to the baseline; AP_FREQUENT likewise."""
    parts = []
    for group in findings["groups"]:
        where = sample(group["measured"])
        parts.append(f"AP on {where}, {', '.join(aps_of(group, AP))}")
        if any(row[AP_FREQUENT] is not None for row in group["rows"]):
            n_classes = group["measured"]["n_frequent_classes"]
            parts.append(f"AP of {n_classes} frequent classes on {where}, {', '.join(aps_of(group, AP_FREQUENT))}")
    return parts


def aps_of(group: dict[str, Any], ap: str) -> list[str]:
    """Of each row its label, AP or AP_FREQUENT, and the difference to the baseline's; the number of runs comes first.

    A row with another number of runs than the first has its own behind it.
    """
    n = n_runs(group["rows"][0], ap)
    rows = []
    for row in group["rows"]:
        notes = []
        if row[f"{ap}_difference"] is not None:
            notes.append(merged_text(row, f"{ap}_difference", signed))
        if n_runs(row, ap) != n:
            notes.append(f"n={n_runs(row, ap)}")
        note = f" ({', '.join(notes)})" if notes else ""
        rows.append(f"{plain(row['label'])} {merged_text(row, ap, number)}{note}")
    return [f"n={n}: {rows[0]}", *rows[1:]]


def n_runs(row: dict[str, Any], ap: str) -> int:
    """How many runs AP or AP_FREQUENT of a row is the mean of: not all have every row, and only one table is merged."""
    return row["over_runs"][ap]["n"] if row["over_runs"] else 1

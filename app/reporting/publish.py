"""Publish: what is worth keeping of a run -> runs/reports/<name>, which git tracks, and an entry in runs/LOG.md."""

from __future__ import annotations

import logging
import re
import shutil
from pathlib import Path
from typing import Any

from app.config import BUILTIN_DATASET, UserError
from app.reporting.evidence import Evidence, gather
from app.reporting.page import page
from app.reporting.summary import ap_text, difference_text, health_lines, sample, verdict
from app.run import RunRoot, read_json, utc_now, write_text
from app.tables import plain

log = logging.getLogger(__name__)
KEPT = (
    "run.json", "report.json", "dataset/provenance.json", "figures/*.json", "onnx/*.json", "*-coco/metrics.json",
    *(f"*/{name}.yaml" for name in ("config", "args")), *(f"*/{name}.csv" for name in ("results", "loss_curve")),
    *(f"*/{name}.json" for name in ("env", "done", "quant_config", "health")), "*/loss_curve.png",
)  # fmt: skip
PICTURE = re.compile(r'<picture>.*?src="(figures/[^"]+)".*?</picture>')
LINK = re.compile(r"\[([^\]\n]+)\]\(([^)\s]+)\)")
NO_PHOTOS = "*Left out here: photos of the dataset are not published.*"
LOG_HEAD = '# Runs\n\nOne entry a run, the newest last; failures too. "Better" states seeds and spread, or says n=1.\n'


def publish(run: RunRoot, aim: str | None, force: bool) -> None:
    """Copies the report and the JSON, CSV and YAML files it was made from, and adds an entry to runs/LOG.md.

    Weights, ONNX files, logs, events and detections stay behind, and with them every image of the dataset: the gallery
    is published for the built-in dataset only.

    Args:
        aim: what the run was to find out, for the entry; None: what it compares.

    Raises:
        UserError: the run has no report, or was published before and `force` is not set.
    """
    found = read_json(run.root / "report.json", "report")
    if not run.summary.exists():
        raise UserError(f"{run.summary} is missing: run 'make report' first")
    target = run.runs_dir / "reports" / run.name
    if target.exists() and not force:
        raise UserError(f"{target} is there already: ARGS=--force replaces it and adds another entry to the log")
    evidence = gather(run)
    text = run.summary.read_text(encoding="utf-8")
    drawn = evidence.provenance is not None and evidence.provenance["title"] == f"built-in {BUILTIN_DATASET}"
    copy(run, target, [name for name in PICTURE.findall(text) if drawn or is_figure(name)])
    text = without_dead_ends(text, target)
    write_text(target / "summary.md", text)
    write_text(target / "summary.html", page(text, target, run.name))
    append_log(run.runs_dir / "LOG.md", entry(evidence, found, aim))
    log.info("publish: %s, and an entry in %s", target, run.runs_dir / "LOG.md")


def is_figure(name: str) -> bool:
    """Whether a picture was drawn from numbers: photos are JPEG."""
    return name.endswith(".png")


def copy(run: RunRoot, target: Path, pictures: list[str]) -> None:
    """Fills `target` anew with the files of KEPT and the pictures in both themes; it appears when it is complete."""
    part = target.with_name(f".{target.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    files = {path for pattern in KEPT for path in run.root.glob(pattern)}
    for name in pictures:
        light = run.root / name
        files |= {light, light.with_stem(f"{light.stem}-dark")}
    for path in sorted(files):
        copied = part / path.relative_to(run.root)
        copied.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, copied)
    shutil.rmtree(target, ignore_errors=True)
    part.replace(target)


def without_dead_ends(text: str, target: Path) -> str:
    """The page with a sentence in place of every picture, and code in place of every link, that has no file there."""
    text = PICTURE.sub(lambda found: found[0] if (target / found[1]).exists() else NO_PHOTOS, text)
    text = LINK.sub(lambda found: found[0] if (target / found[2]).exists() else f"`{found[2]}`", text)
    title, _, rest = text.partition("\n")
    note = "Published without weights, ONNX files, logs and detections: names without a link are of the whole run root."
    return f"{title}\n{rest.rstrip()}\n\n{note}\n"


def entry(evidence: Evidence, found: dict[str, Any], aim: str | None) -> str:
    """Markdown of one entry: aim, command, commit, machine, result, verdict."""
    environments = [training.environment for training in evidence.trainings.values()]
    environments += [m["environment"] for m in evidence.scored]
    facts = {
        "aim": aim or compared(evidence),
        "command": listed(f"`{environment['command']}`" for environment in environments),
        "commit": listed(str(environment.get("code_version")) for environment in environments),
        "machine": listed(machine(environment) for environment in environments),
        "result": "; ".join(results(found)) or "nothing was scored",
        "verdict": " ".join([*verdict(found), *health_lines(found)]),
        "missing": plain("; ".join(found["missing"])) or "nothing",
        "report": f"[reports/{evidence.run.name}/summary.md](reports/{evidence.run.name}/summary.md)",
    }
    lines = [f"- **{name}:** {value}" for name, value in facts.items()]
    return "\n".join([f"## {utc_now()[:10]} {plain(found['run'])}", "", *lines])


def listed(values: Any) -> str:
    return ", ".join(dict.fromkeys(values)) or "unknown"


def compared(evidence: Evidence) -> str:
    """'compare fp16, qat-w4a16: yolov10m.yaml, 300 epochs, seed 0'."""
    settings = [training.config for training in evidence.trainings.values()]
    shown = [f"{c['model']}, {c['train']['epochs']} epochs, seed {c['train']['seed']}" for c in settings]
    return f"compare {listed(evidence.trainings)}: {listed(shown)}"


def machine(environment: dict[str, Any]) -> str:
    gpus = environment.get("gpus")
    return listed(gpus) if gpus else f"{environment.get('cpu_count')} CPU cores, no GPU"


def results(found: dict[str, Any]) -> list[str]:
    """One part for every table: how it was measured, AP of each row and its difference to the baseline."""
    parts = []
    for group in found["groups"]:
        n = len(found["seeds"]["runs"]) if found["seeds"] else 1
        rows = [
            f"{plain(row['label'])} {ap_text(row)}"
            + (f" ({difference_text(row)})" if row["AP_difference"] is not None else "")
            for row in group["rows"]
        ]
        parts.append(f"AP on {sample(group['measured'])}, n={n}: {', '.join(rows)}")
    return parts


def append_log(path: Path, text: str) -> None:
    before = path.read_text(encoding="utf-8") if path.exists() else LOG_HEAD
    write_text(path, f"{before.rstrip()}\n\n{text}\n")

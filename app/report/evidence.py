"""What a run root holds for the report: every stage's files, and by name what is missing, broken or stale."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from app.coco.detail import Metrics
from app.coco.score import STATS
from app.core.config import UserError, read_yaml
from app.core.files import read_json
from app.core.labels import BASELINE, SCORES_ENDING, Label, by_label
from app.core.results import Rows, read_rows
from app.core.run import RunRoot

# Dotted keys that the page reads from each kind of file; a file that lacks one is named and left out.
METRICS_KEYS = (
    "model.file", "model.sha256", "model.size_bytes", "model.label", "model.imgsz",
    "dataset.title", "dataset.split", "dataset.annotation_sha256", "dataset.n_images", "dataset.n_images_listed",
    "dataset.subset", "dataset.image_ids_sha256", "dataset.complete_coco_val",
    *(f"coco.{name}" for name in STATS),
    "settings.conf", "settings.max_det", "settings.evaluator",
    "latency_ms.p50", "latency_ms.p90", "latency_ms.p99", "latency_ms.runs", "latency_ms.warmup", "latency_ms.batch",
    "runtime.provider", "runtime.device", "environment.command", "environment.packages", "time_s.session",
)  # fmt: skip
PROVENANCE_KEYS = ("title", "coco_dir", "seed", "splits.train.annotation_sha256", "splits.val.annotation_sha256")
CONFIG_KEYS = ("model", "data", "train.epochs", "hyp.warmup_epochs", "quant")
ENVIRONMENT_KEYS = ("command", "packages", "code_version")
QUANT_CONFIG_KEYS = ("scheme", "layers", "share_of_learned_weights")
RECORD_KEYS = ("label", "file", "sha256", "size_bytes", "checkpoint_sha256", "gates")


@dataclass(frozen=True)
class Training:
    """One trained variant; `done` is None while its training has not finished.

    `config` is the resolved configuration as it was written, not checked against the keys of today's code: a report
    of an old run must not depend on them.
    """

    label: str
    config: dict[str, Any]
    history: Rows
    environment: dict[str, Any]
    done: dict[str, Any] | None


@dataclass(frozen=True)
class Evidence:
    """Everything the report may speak of.

    `trainings` and `quantized` go by label; `quantized` holds the quant_config.json of QAT and PTQ, with `snr_db`
    (layer -> dB) of health.json. `records` are the .json of ONNX files, `scored` the metrics.json with `dir` and
    `path` of their folders. `missing` are lines 'stage: what is not there and how to get it'.
    """

    run: RunRoot
    provenance: dict[str, Any] | None
    trainings: dict[str, Training]
    quantized: dict[str, dict[str, Any]]
    records: list[dict[str, Any]]
    scored: list[Metrics]
    missing: list[str]

    @property
    def finished(self) -> dict[str, Training]:
        return {label: training for label, training in self.trainings.items() if training.done}


def gather(run: RunRoot) -> Evidence:
    """Reads the run root and changes nothing.

    Raises:
        UserError: there is no such run.
    """
    if not run.root.is_dir():
        raise UserError(f"{run.root} does not exist: give --run the name of a run, or run 'make all' first")
    missing: list[str] = []
    provenance = _read(run, run.provenance, "data", PROVENANCE_KEYS, missing)
    trainings = _trainings(run, missing)
    quantized = _quantized(run, missing)
    records = _records(run, _finished(run, missing), missing)
    scored = _scored(run, records, missing)
    return Evidence(run, provenance, trainings, quantized, records, scored, missing)


def name_of(metrics: Metrics) -> str:
    """The label as the page writes it."""
    return metrics["model"]["label"]


def label_of(metrics: Metrics) -> Label:
    return Label.parse(name_of(metrics))


def _read(run: RunRoot, path: Path, stage: str, keys: Iterable[str], missing: list[str]) -> dict[str, Any] | None:
    """A JSON object with all the dotted keys, or None and a line in `missing`."""
    try:
        tree = read_json(path, stage)
    except UserError as error:
        missing.append(f"{stage}: {str(error).replace(f'{run.root}/', '')}")
        return None
    if without := lacking(tree, keys):
        missing.append(f"{stage}: {path.relative_to(run.root)} lacks {', '.join(without)}: make it anew with --force")
        return None
    return tree


def lacking(tree: Any, keys: Iterable[str]) -> list[str]:
    """The dotted keys that a tree of JSON or YAML does not have."""
    return [key for key in keys if not _has(tree, key)]


def _has(tree: Any, dotted: str) -> bool:
    for key in dotted.split("."):
        if not isinstance(tree, dict) or key not in tree:
            return False
        tree = tree[key]
    return True


def _trainings(run: RunRoot, missing: list[str]) -> dict[str, Training]:
    labels = _labels_with(run, "config.yaml")
    methods = {Label.parse(label).method for label in labels}
    if "fp16" not in methods:
        missing.append("train: fp16 was not trained: run 'make train-fp16'")
    if "qat" not in methods:
        missing.append("train: no QAT variant was trained: run 'make train-qat'")
    trainings = {}
    for label in labels:
        training = _training(run, label, missing)
        if training:
            trainings[label] = training
    return trainings


def _labels_with(run: RunRoot, file_name: str) -> list[str]:
    """Names of the variants' folders that hold such a file, in the order of the page."""
    labels = [path.parent.name for path in run.root.glob(f"*/{file_name}")]
    return sorted(labels, key=by_label)


def _training(run: RunRoot, label: str, missing: list[str]) -> Training | None:
    folder = run.variant_dir(label)
    try:
        config = read_yaml(folder / "config.yaml")
        history = read_rows(folder / "results.csv")
    except (UserError, OSError, ValueError, TypeError) as error:
        reason = str(error).replace(f"{run.root}/", "")
        missing.append(f"train: {label} cannot be read ({reason}): train it anew with --force")
        return None
    environment = _read(run, folder / "env.json", "train", ENVIRONMENT_KEYS, missing)
    without = lacking(config, CONFIG_KEYS)
    if environment is None or not history or without:
        what = f"config.yaml lacks {', '.join(without)}" if without else "no finished epoch or no env.json"
        missing.append(f"train: {label} is left out: {what}")
        return None
    done_json = folder / "done.json"
    done = _read(run, done_json, "train", ("best_sha256",), missing) if done_json.exists() else None
    if done is None:
        n_epochs = config["train"]["epochs"]
        missing.append(f"train: {label} has not finished, {len(history)} of {n_epochs} epochs: run it again to go on")
    return Training(label, config, history, environment, done)


def _quantized(run: RunRoot, missing: list[str]) -> dict[str, dict[str, Any]]:
    labels = set(_labels_with(run, "quant_config.json"))
    for label in _labels_with(run, "config.yaml"):
        if Label.parse(label).method == "qat":
            labels.add(label)
    quantized = {}
    for label in sorted(labels, key=by_label):
        folder = run.variant_dir(label)
        stage = "ptq" if Label.parse(label).method == "ptq" else "train"
        quant_config = _read(run, folder / "quant_config.json", stage, QUANT_CONFIG_KEYS, missing)
        health = _read(run, folder / "health.json", stage, ("epoch", "snr_db"), missing)
        if quant_config:
            quantized[label] = {**quant_config, "snr_db": health["snr_db"] if health else {}}
    return quantized


def _finished(run: RunRoot, missing: list[str]) -> dict[str, str | None]:
    """SHA-256 of best.pt by the label of every checkpoint, of trainings and of PTQ; None where it is not finished."""
    finished: dict[str, str | None] = dict.fromkeys(_labels_with(run, "config.yaml"))
    for label in _labels_with(run, "done.json"):
        stage = "ptq" if Label.parse(label).method == "ptq" else "train"
        done = _read(run, run.variant_dir(label) / "done.json", stage, ("best_sha256",), missing)
        finished[label] = done["best_sha256"] if done else None
    return finished


def _records(run: RunRoot, finished: dict[str, str | None], missing: list[str]) -> list[dict[str, Any]]:
    records = []
    for path in sorted(run.onnx_dir.glob("*.json")):
        if record := _read(run, path, "export", RECORD_KEYS, missing):
            records.append(record)
    for record in records:
        best_sha256 = finished.get(record["label"])
        if best_sha256 and best_sha256 != record["checkpoint_sha256"]:
            missing.append(f"export: {record['file']} is not of the best checkpoint of now: run 'make export'")
    exported = {record["label"] for record in records}
    for label in finished:
        if label not in exported:
            missing.append(f"export: no ONNX file of {label}: run 'make export'")
    return records


def _scored(run: RunRoot, records: list[dict[str, Any]], missing: list[str]) -> list[Metrics]:
    scored: list[Metrics] = []
    for path in sorted(run.root.glob(f"*{SCORES_ENDING}/metrics.json")):
        if tree := _read(run, path, "eval", METRICS_KEYS, missing):
            scored.append({**tree, "dir": path.parent.name, "path": str(path.parent)})
    digests = {record["file"]: record["sha256"] for record in records}
    for metrics in scored:
        file, digest = metrics["model"]["file"], metrics["model"]["sha256"]
        if digests.get(file, digest) != digest:
            missing.append(f"eval: {metrics['dir']}/metrics.json is of an older {file}: run 'make eval'")
    exported = dict.fromkeys(record["label"] for record in records)
    names = set(map(name_of, scored))
    for label in exported:
        if label not in names:
            missing.append(f"eval: {label} was exported but not scored: run 'make eval'")
    if not scored:
        missing.append("eval: nothing was scored: run 'make eval'")
    return sorted(scored, key=_page_order)


def _page_order(metrics: Metrics) -> tuple[Any, ...]:
    return metrics["dir"] != BASELINE.scores_dir, label_of(metrics).order, metrics["dir"]

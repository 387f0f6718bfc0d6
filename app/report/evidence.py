"""What a run root holds for the report: every stage's files, and by name what is missing, broken or stale."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from app.core.config import UserError, read_yaml
from app.core.files import read_json
from app.core.results import Rows, read_rows
from app.core.run import RunRoot

COCO_NAMES = (
    "AP", "AP50", "AP75", "AP_small", "AP_medium", "AP_large",
    "AR_1", "AR_10", "AR_100", "AR_small", "AR_medium", "AR_large",
)  # fmt: skip
BASELINE_DIR = "baseline-coco"
# Dotted keys that the page reads from each kind of file; a file that lacks one is named and left out.
METRICS_KEYS = (
    *(f"model.{key}" for key in ("file", "sha256", "size_bytes", "label", "imgsz")),
    *(f"dataset.{key}" for key in ("title", "split", "annotation_sha256", "n_images", "n_images_listed")),
    *(f"dataset.{key}" for key in ("subset", "image_ids_sha256", "complete_coco_val")),
    *(f"coco.{name}" for name in COCO_NAMES),
    *(f"settings.{key}" for key in ("conf", "max_det", "evaluator")),
    *(f"latency_ms.{key}" for key in ("p50", "p90", "p99", "runs", "warmup", "batch")),
    *("runtime.provider", "runtime.device", "environment.command", "environment.packages", "time_s.session"),
)  # fmt: skip
PROVENANCE_KEYS = ("title", "coco_dir", "seed", "splits.train.annotation_sha256", "splits.val.annotation_sha256")
CONFIG_KEYS = ("model", "data", "train.epochs", "hyp.warmup_epochs", "quant")
ENVIRONMENT_KEYS = ("command", "packages", "code_version")
RECORD_KEYS = ("label", "file", "sha256", "size_bytes", "checkpoint_sha256", "gates")
REPACKED = ("-end2end", "-half", "-int4")  # endings of labels whose file holds the weights of another one


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
    """Everything the report may speak of. `quantized` are quant_config.json by label, PTQ too, with `snr_db` (layer ->
    dB) of health.json; `scored` are metrics.json plus `dir` and `path`, `records` the .json of ONNX files; `missing`
    are lines 'stage: what is not there and how to get it'."""

    run: RunRoot
    provenance: dict[str, Any] | None
    trainings: dict[str, Training]
    quantized: dict[str, dict[str, Any]]
    records: list[dict[str, Any]]
    scored: list[dict[str, Any]]
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
    records = _records(run, trainings, missing)
    scored = _scored(run, records, missing)
    return Evidence(run, provenance, trainings, quantized, records, scored, missing)


def by_label(label: str) -> tuple[bool, bool, str, str]:
    """Sort key: fp16 first, then scheme by scheme, of each PTQ before QAT."""
    return label != "fp16", not label.startswith("fp16"), scheme_of(label), label


def scheme_of(label: str) -> str:
    """'ptq-w4a16-bn' and 'qat-w4a16-int4' -> 'w4a16'."""
    for ending in (*REPACKED, "-bn"):
        label = label.removesuffix(ending)
    return label.partition("-")[2]


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
    labels = sorted((path.parent.name for path in run.root.glob("*/config.yaml")), key=by_label)
    if "fp16" not in labels:
        missing.append("train: fp16 was not trained: run 'make train-fp16'")
    if not [label for label in labels if label.startswith("qat-")]:
        missing.append("train: no QAT variant was trained: run 'make train-qat'")
    found = {label: _training(run, label, missing) for label in labels}
    return {label: training for label, training in found.items() if training}


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
    done = _read(run, folder / "done.json", "train", ("best_sha256",), missing) if _finished(folder) else None
    if done is None:
        n_epochs = config["train"]["epochs"]
        missing.append(f"train: {label} has not finished, {len(history)} of {n_epochs} epochs: run it again to go on")
    return Training(label, config, history, environment, done)


def _quantized(run: RunRoot, missing: list[str]) -> dict[str, dict[str, Any]]:
    found = {}
    labels = {path.parent.name for path in run.root.glob("*/config.yaml") if path.parent.name.startswith("qat-")}
    for label in sorted(labels | {path.parent.name for path in run.root.glob("*/quant_config.json")}, key=by_label):
        folder, stage = run.variant_dir(label), "ptq" if label.startswith("ptq-") else "train"
        keys = ("scheme", "layers", "share_of_learned_weights")
        quant_config = _read(run, folder / "quant_config.json", stage, keys, missing)
        health = _read(run, folder / "health.json", stage, ("epoch", "snr_db"), missing)
        if quant_config:
            found[label] = {**quant_config, "snr_db": health["snr_db"] if health else {}}
    return found


def _finished(folder: Path) -> bool:
    return (folder / "done.json").exists()


def _records(run: RunRoot, trainings: dict[str, Training], missing: list[str]) -> list[dict[str, Any]]:
    paths = sorted(path for path in run.onnx_dir.glob("*.json") if path.name != "export.json")
    records = list(filter(None, (_read(run, path, "export", RECORD_KEYS, missing) for path in paths)))
    for record in records:
        training = trainings.get(record["label"])
        if training and training.done and training.done["best_sha256"] != record["checkpoint_sha256"]:
            missing.append(f"export: {record['file']} is not of the best checkpoint of now: run 'make export'")
    exported = {record["label"] for record in records}
    missing += [f"export: no ONNX file of {label}: run 'make export'" for label in trainings if label not in exported]
    return records


def _scored(run: RunRoot, records: list[dict[str, Any]], missing: list[str]) -> list[dict[str, Any]]:
    paths = run.root.glob("*-coco/metrics.json")
    found = [(path, _read(run, path, "eval", METRICS_KEYS, missing)) for path in sorted(paths)]
    scored: list[dict[str, Any]] = [
        {**tree, "dir": path.parent.name, "path": str(path.parent)} for path, tree in found if tree
    ]
    digests = {record["file"]: record["sha256"] for record in records}
    for m in scored:
        name, digest = m["model"]["file"], m["model"]["sha256"]
        if digests.get(name, digest) != digest:
            missing.append(f"eval: {m['dir']}/metrics.json is of an older {name}: run 'make eval'")
    labels = {m["model"]["label"] for m in scored}
    unscored = dict.fromkeys(record["label"] for record in records if record["label"] not in labels)
    missing += [f"eval: {label} was exported but not scored: run 'make eval'" for label in unscored]
    if not scored:
        missing.append("eval: nothing was scored: run 'make eval'")
    return sorted(scored, key=lambda m: (m["dir"] != BASELINE_DIR, by_label(m["model"]["label"]), m["dir"]))

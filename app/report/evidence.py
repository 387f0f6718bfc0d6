"""What a run root holds for the report: every stage's files, and by name what is missing, broken or stale."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from typing_extensions import TypedDict

from app.coco.dataset import BUILTIN_TITLE, PLACE_SHAPE
from app.coco.detail import Metrics
from app.coco.score import STATS
from app.core.config import UserError, read_yaml
from app.core.files import read_json
from app.core.labels import BASELINE, FP16, SCORES_ENDING, Label, by_label, scored_name, today
from app.core.results import AP, AP_FREQUENT, STATES, VAL_LOSS, Rows, column, is_validated, read_rows
from app.core.run import PROVENANCE_SHAPE, RunRoot
from app.core.shapes import Count, FileName, FolderName, Number, NumberOrNone, Positive, Sha256, Shape, misfits


class Start(TypedDict):
    """A checkpoint that a training started from. TypedDict is that of typing_extensions: pydantic asks for it."""

    file: FileName
    sha256: Sha256


class Layer(TypedDict):
    """An entry of quant_config.json."""

    name: str
    bits: Count | None
    exempt: bool
    why: str | None
    quantizer: str | None
    granularity: str | None


# What the page reads from each kind of file; a file of another shape is named and left out.
METRICS_SHAPE: Shape = {
    "model.file": str, "model.sha256": str, "model.size_bytes": Positive, "model.label": str,
    "model.imgsz": Count | str, "model.start?": Start | None,
    "dataset.title": str, "dataset.split": FolderName, "dataset.annotation_sha256": str,
    "dataset.n_images": Count, "dataset.n_images_listed": Count, "dataset.subset": bool,
    "dataset.image_ids_sha256": str, "dataset.complete_coco_val": bool,
    **{f"dataset.{key}": kind for key, kind in PLACE_SHAPE.items()},
    **{f"coco.{name}": NumberOrNone for name in STATS},
    f"coco.{AP_FREQUENT}?": Number, "dataset.n_frequent_classes?": Count,
    "settings.conf": Number, "settings.max_det": Count, "settings.evaluator": str,
    **{f"latency_ms.{name}": Number for name in ("p50", "p90", "p99")},
    **{f"latency_ms.{name}": Count for name in ("runs", "warmup", "batch")},
    "runtime.provider": str, "runtime.device": str, "time_s.session": Number,
    "environment.command": str, "environment.packages": dict[str, str | None], "environment.gpus?": list[str],
}  # fmt: skip
CONFIG_SHAPE: Shape = {
    "model": str, "data": dict[str, Any], "train.epochs": Count, "train.seed": Count, "hyp.warmup_epochs": Number,
    "quant": dict[str, Any] | None,
}  # fmt: skip
ENVIRONMENT_SHAPE: Shape = {
    "command": str, "packages": dict[str, str | None], "code_version": str, "gpus?": list[str]
}  # fmt: skip
QUANT_CONFIG_SHAPE: Shape = {
    "scheme": str, "scheme_sha256?": str, "layers": list[Layer], "share_of_learned_weights": dict[str, Number],
}  # fmt: skip
HEALTH_SHAPE: Shape = {"epoch": Count, "snr_db": dict[str, Number]}
DONE_SHAPE: Shape = {"best_sha256": str, "imported?": Start, "model?": str, "distilled?": str}
RECORD_SHAPE: Shape = {
    "label": str, "file": str, "sha256": str, "size_bytes": Count, "checkpoint_sha256": str, "gates": dict[str, Any],
    "gates.codes?": dict[str, Any], "gates.codes.layers?": dict[str, Count], "gates.parity?": dict[str, Any],
    "gates.parity.max_box_px?": Number, "gates.parity.max_score?": Number,
}  # fmt: skip
OLD_TITLES = {"built-in coco-subset": BUILTIN_TITLE}  # of older runs
COLUMNS = ("epoch", "time/images_per_s", "time/epoch_s")  # of every row of results.csv


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
class Imported:
    """The baseline of a run that import-weights made: the file, its network, the hash of best.pt, how it was made."""

    start: dict[str, str]
    model: str
    best_sha256: str
    environment: dict[str, Any]


@dataclass(frozen=True)
class Evidence:
    """Everything the report may speak of.

    `trainings` and `quantized` go by label; `quantized` holds the quant_config.json of QAT and PTQ, with `snr_db`
    (layer -> dB) of health.json. `records` are the .json of ONNX files, `scored` the metrics.json with `dir` and
    `path` of their folders. `missing` are lines 'stage: what is not there and how to get it'. `imported` is set where
    the baseline was not trained here.
    """

    run: RunRoot
    provenance: dict[str, Any] | None
    trainings: dict[str, Training]
    quantized: dict[str, dict[str, Any]]
    records: list[dict[str, Any]]
    scored: list[Metrics]
    missing: list[str]
    imported: Imported | None = None

    @property
    def finished(self) -> dict[str, Training]:
        return {label: training for label, training in self.trainings.items() if training.done}

    @property
    def environments(self) -> list[dict[str, Any]]:
        """The env.json of everything that was made: an imported baseline, trainings, scores."""
        made = [*([self.imported] if self.imported else []), *self.trainings.values()]
        return [*(each.environment for each in made), *(metrics["environment"] for metrics in self.scored)]


def gather(run: RunRoot) -> Evidence:
    """Reads the run root and changes nothing; raises a UserError if there is no such run."""
    if not run.root.is_dir():
        what = "is a file and no run" if run.root.exists() else "does not exist"
        raise UserError(f"{run.root} {what}: give --run the name of a run, or run 'make all' first")
    missing: list[str] = []
    provenance = _read(run, run.provenance, "data", PROVENANCE_SHAPE, missing)
    if provenance:
        provenance["title"] = title_of(provenance)
    imported = _imported(run, missing)
    trainings = _trainings(run, imported, missing)
    quantized = _quantized(run, missing)
    finished = _finished(run, trainings, missing)
    if imported:
        finished[str(FP16)] = imported.best_sha256
    records = _records(run, finished, missing)
    scored = _scored(run, records, missing)
    return Evidence(run, provenance, trainings, quantized, records, scored, missing, imported)


def name_of(metrics: Metrics) -> str:
    """The label as the page writes it."""
    return metrics["model"]["label"]


def label_of(metrics: Metrics) -> Label:
    return Label.parse(name_of(metrics))


def scored_folders(root: Path) -> dict[str, Path]:
    """The folders of a run that hold a metrics.json, by their names of today.

    Where a file was scored under an older name and under that of today, the newer folder counts.
    """
    folders: dict[str, Path] = {}
    for path in sorted(root.glob(f"*{SCORES_ENDING}/metrics.json")):
        folder = path.parent
        name = f"{scored_name(folder.name)}{SCORES_ENDING}"
        if name == folder.name or name not in folders:
            folders[name] = folder
    return folders


def as_row(tree: dict[str, Any], folder: Path) -> Metrics:
    """The content of a metrics.json in `folder`, with the names of today where an older run had others."""
    model, dataset = tree["model"], tree["dataset"]
    return {
        **tree,
        "model": {**model, "label": today(model["label"])},
        "dataset": {**dataset, "title": title_of(dataset)},
        "dir": folder.name,
        "path": str(folder),
    }


def title_of(facts: dict[str, Any]) -> str:
    """Title of the dataset that a metrics.json or provenance.json is about."""
    title: str = facts["title"]
    return OLD_TITLES.get(title, title)


def _read(run: RunRoot, path: Path, stage: str, shape: Shape, missing: list[str]) -> dict[str, Any] | None:
    """A JSON object of this shape, or None and a line in `missing`."""
    try:
        tree = read_json(path, stage)
    except UserError as error:
        missing.append(f"{stage}: {str(error).replace(f'{run.root}/', '')}")
        return None
    if faults := misfits(tree, shape):
        missing.append(f"{stage}: {path.relative_to(run.root)} {'; '.join(faults)}: make it anew with --force")
        return None
    return tree


def _imported(run: RunRoot, missing: list[str]) -> Imported | None:
    """The imported baseline, if that is what the run has."""
    folder = run.variant_dir(FP16)
    if not run.done(FP16).exists() or (folder / "config.yaml").exists():
        return None
    done = _read(run, run.done(FP16), "import-weights", DONE_SHAPE, missing)
    environment = _read(run, folder / "env.json", "import-weights", ENVIRONMENT_SHAPE, missing)
    if done is None or environment is None or not {"imported", "model"} <= done.keys():
        return None
    return Imported(done["imported"], f"{done['model']}.yaml", done["best_sha256"], environment)


def _trainings(run: RunRoot, imported: Imported | None, missing: list[str]) -> dict[str, Training]:
    labels = _labels_with(run, "config.yaml")
    methods = {Label.parse(label).method for label in labels}
    if "fp16" not in methods and imported is None:
        missing.append("train: fp16 was not trained: run 'make train-fp16'")
    if "qat" not in methods and imported is None:
        missing.append("train: no QAT variant was trained: run 'make train-qat'")
    trainings = {label: _training(run, label, missing) for label in labels}
    return {label: training for label, training in trainings.items() if training}


def _labels_with(run: RunRoot, file_name: str) -> list[str]:
    """Names of the variants' folders that hold such a file, in the order of the page."""
    labels = [path.parent.name for path in run.root.glob(f"*/{file_name}")]
    return sorted(labels, key=by_label)


def _training(run: RunRoot, label: str, missing: list[str]) -> Training | None:
    folder = run.variant_dir(label)
    try:
        config = read_yaml(folder / "config.yaml")
        history = read_rows(folder / "results.csv")
        check_columns(history)
    except (UserError, OSError, ValueError, TypeError) as error:
        reason = str(error).replace(f"{run.root}/", "")
        missing.append(f"train: {label} cannot be read ({reason}): train it anew with --force")
        return None
    environment = _read(run, folder / "env.json", "train", ENVIRONMENT_SHAPE, missing)
    faults = misfits(config, CONFIG_SHAPE)
    if environment is None or not history or faults:
        what = f"config.yaml {'; '.join(faults)}" if faults else "no finished epoch or no env.json"
        missing.append(f"train: {label} is left out: {what}")
        return None
    done = _read(run, run.done(label), "train", DONE_SHAPE, missing) if run.done(label).exists() else None
    if done is None:
        n_epochs = config["train"]["epochs"]
        missing.append(f"train: {label} has not finished, {len(history)} of {n_epochs} epochs: run it again to go on")
    return Training(label, config, history, environment, done)


def check_columns(history: Rows) -> None:
    """Raises a ValueError if a row of results.csv lacks a number that the page reads."""
    of_validated = [column(number, state) for number in (AP, VAL_LOSS) for state in STATES]
    for row in history:
        names = [*COLUMNS, *of_validated] if is_validated(row) else COLUMNS
        if missing := [name for name in names if name not in row]:
            raise ValueError(f"results.csv lacks {', '.join(missing)}")
        if not (math.isfinite(row["epoch"]) and row["epoch"] > 0):
            raise ValueError(f"results.csv has an epoch {row['epoch']}")


def _quantized(run: RunRoot, missing: list[str]) -> dict[str, dict[str, Any]]:
    trained = [label for label in _labels_with(run, "config.yaml") if Label.parse(label).method == "qat"]
    quantized = {}
    for label in sorted({*trained, *_labels_with(run, "quant_config.json")}, key=by_label):
        folder = run.variant_dir(label)
        stage = "ptq" if Label.parse(label).method == "ptq" else "train"
        quant_config = _read(run, folder / "quant_config.json", stage, QUANT_CONFIG_SHAPE, missing)
        health = _read(run, folder / "health.json", stage, HEALTH_SHAPE, missing)
        if quant_config:
            quantized[label] = {**quant_config, "snr_db": health["snr_db"] if health else {}}
    return quantized


def _finished(run: RunRoot, trainings: dict[str, Training], missing: list[str]) -> dict[str, str | None]:
    """SHA-256 of best.pt by the label of every checkpoint, of trainings and of PTQ; None where it is not finished."""
    done = {label: training.done for label, training in trainings.items()}
    for label in _labels_with(run, "done.json"):
        if Label.parse(label).method == "ptq":
            done[label] = _read(run, run.done(label), "ptq", DONE_SHAPE, missing)
    return {label: facts["best_sha256"] if facts else None for label, facts in done.items()}


def _records(run: RunRoot, finished: dict[str, str | None], missing: list[str]) -> list[dict[str, Any]]:
    records = []
    for path in sorted(run.onnx_dir.glob("*.json")):
        if record := _read(run, path, "export", RECORD_SHAPE, missing):
            records.append({**record, "label": today(record["label"])})
    exported = [str(Label.parse(record["label"]).checkpoint) for record in records]
    for record, checkpoint in zip(records, exported, strict=True):
        best_sha256 = finished.get(checkpoint)
        if best_sha256 and best_sha256 != record["checkpoint_sha256"]:
            missing.append(f"export: {record['file']} is not of the best checkpoint of now: run 'make export'")
    for label in finished:
        if label not in exported:
            missing.append(f"export: no ONNX file of {label}: run 'make export'")
    return records


def _scored(run: RunRoot, records: list[dict[str, Any]], missing: list[str]) -> list[Metrics]:
    scored: list[Metrics] = []
    for folder in scored_folders(run.root).values():
        if tree := _read(run, folder / "metrics.json", "eval", METRICS_SHAPE, missing):
            scored.append(as_row(tree, folder))
    digests = {record["file"]: record["sha256"] for record in records}
    for metrics in scored:
        file, digest = metrics["model"]["file"], metrics["model"]["sha256"]
        if digests.get(file, digest) != digest:
            missing.append(f"eval: {metrics['dir']}/metrics.json is of an older {file}: run 'make eval'")
    names = set(map(name_of, scored))
    for label in dict.fromkeys(record["label"] for record in records):
        if label not in names:
            missing.append(f"eval: {label} was exported but not scored: run 'make eval'")
    if not scored:
        missing.append("eval: nothing was scored: run 'make eval'")
    return sorted(scored, key=page_order)


def page_order(metrics: Metrics) -> tuple[Any, ...]:
    """Sort key of scored files: the baseline first."""
    return metrics["dir"] != BASELINE.scores_dir, label_of(metrics).order, metrics["dir"]

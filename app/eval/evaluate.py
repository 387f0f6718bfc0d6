"""The eval stage: COCO score and latency of ONNX files. It knows ONNX and COCO only; one code path for all models."""

from __future__ import annotations

import hashlib
import json
import logging
import re
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from app.coco.categories import ids_by_name
from app.coco.dataset import Dataset, check_unchanged, hash_ids, source_at
from app.coco.score import ImageFile, check_images, describe_dataset, first_of, image_files, score, truth_of, usable_ids
from app.core.config import Config, Eval, UserError, load
from app.core.environment import environment
from app.core.files import printable, read_json, sha256, write_atomic, write_json
from app.core.labels import FOREIGN, Label, by_label, today
from app.core.mounts import as_known
from app.core.progress import track
from app.core.results import AP_FREQUENT
from app.core.run import PROVENANCE_SHAPE, RunRoot, record_stage
from app.core.shapes import Shape
from app.eval.contract import Said
from app.eval.metadata import start_of
from app.eval.pipeline import detect, load_input, measure_latency
from app.eval.runtime import Model, describe_runtime, open_model

FORMAT_VERSION = 1  # raise it when the meaning of a number changes, so that older metrics.json are recomputed
EVALUATOR = "onnxruntime + pycocotools"
METRICS, DETECTIONS = "metrics.json", "detections.json"
NOT_IN_NAMES = re.compile(r"[^\w.-]")  # of folders that are named after a file of the user
SMALLEST = 32  # px: an image is only checked
RECORD: Shape = {"label": str, "sha256": str}
SCORED: Shape = {"model.sha256": str, "settings_hash": str, "dataset": dict[str, Any]}
PROVENANCE: Shape = {**PROVENANCE_SHAPE, "settings.coco_dir": str}
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Exported:
    """An ONNX file of the run and the content of the .json beside it."""

    path: Path
    record: dict[str, Any]


def evaluate(config: Config, run: RunRoot, force: bool) -> None:
    """Scores every exported ONNX file of the run, each into the folder that its label names.

    Raises:
        UserError: nothing is exported, a file is not the one that its .json describes, or an image cannot be read.
    """
    files = exported_files(run)
    dataset, wanted_hash = dataset_of_run(config, run)
    for label, file in files.items():
        out_dir = run.root / Label.parse(label).scores_dir
        if not force and is_done(out_dir, file.record["sha256"], wanted_hash, dataset):
            log.info("eval: %s done already", out_dir)
            continue
        if not force:
            tell_outdated(out_dir, file.record["sha256"])
        metrics = evaluate_file(file.path, dataset, out_dir, config.eval)
        facts = {"file": file.path.name, "sha256": file.record["sha256"], "coco": metrics["coco"]}
        record_stage(run, f"eval {label}", facts)


def is_scored(config: Config, run: RunRoot) -> bool:
    """Whether every exported file of the run has its score; logs that it has.

    What is wrong with a file is no error here: the stage says it.
    """
    try:
        files = exported_files(run)
        dataset, wanted_hash = dataset_of_run(config, run)
        for label, file in files.items():
            if not is_done(run.root / Label.parse(label).scores_dir, file.record["sha256"], wanted_hash, dataset):
                return False
    except UserError:
        return False
    log.info("eval: done already (%d files)", len(files))
    return True


def evaluate_standalone(
    config: Config, onnx_path: Path, dataset: Dataset, out_dir: Path, said: Said | None = None
) -> dict[str, Any]:
    """Scores any ONNX file with a known contract on a `standalone_dataset`; an older result is replaced.

    Raises:
        UserError: as `evaluate_file`; with data.skip_broken images that cannot be used are left out instead.
    """
    if config.data.skip_broken:
        dataset = without_broken(dataset)
    return evaluate_file(onnx_path, dataset, out_dir, config.eval, said)


def scores_folder(onnx_path: Path, runs_dir: Path, force: bool) -> Path:
    """Folder for the score of a file without a run: eval/<name of the file> beside the runs.

    Raises:
        UserError: it holds the score of another file of this name, and `force` is not set.
    """
    name = NOT_IN_NAMES.sub("_", Path(as_known(str(onnx_path))).stem).lstrip(".") or "model"
    out_dir = runs_dir / "eval" / name
    metrics_path = out_dir / METRICS
    if force or not metrics_path.exists() or not onnx_path.is_file():
        return out_dir
    if read_json(metrics_path, "eval", SCORED)["model"]["sha256"] != sha256(onnx_path):
        raise UserError(
            f"{out_dir} holds the score of another {onnx_path.name}: name another folder, --out {runs_dir}/eval/NAME, "
            "or replace it with --force"
        )
    return out_dir


def without_broken(dataset: Dataset) -> Dataset:
    """The dataset without the images that cannot be used, which are counted; raises a UserError if no image is left."""
    truth = truth_of(dataset)
    images = image_files(truth, dataset, usable_ids(truth, dataset))
    usable, faults = [], []
    for image in track(images, "eval: checking images", len(images)):
        try:
            load_input(image, SMALLEST)
            usable.append(image.id)
        except UserError as error:
            faults.append(str(error))
    if not usable:
        raise UserError(f"no image of {dataset.split} can be used: repair the dataset")
    if not faults:
        return dataset
    log.warning("eval: %d of %d images left out, the first: %s", len(faults), len(images), faults[0])
    return replace(dataset, image_ids=usable)


def evaluate_file(
    onnx_path: Path, dataset: Dataset, out_dir: Path, settings: Eval, said: Said | None = None
) -> dict[str, Any]:
    """Scores one ONNX file: writes out_dir/detections.json, then out_dir/metrics.json, and returns the metrics.

    The score is computed from detections.json, so that anyone who scores that file gets the same numbers.

    Raises:
        UserError: the model, the annotations or an image cannot be used; no half-written file is left.
    """
    truth = truth_of(dataset)
    model = open_model(onnx_path, settings.provider, said, ids_by_name(truth.dataset["categories"]))
    all_ids = usable_ids(truth, dataset)
    check_images(truth, dataset, all_ids)
    ids = first_of(all_ids, settings.max_images)
    images = image_files(truth, dataset, ids)
    facts = describe_dataset(truth, dataset, ids)
    title = f"eval {model.label} (subset)" if facts["subset"] else f"eval {model.label}"
    log.info("%s: timing one image, %d times", title, settings.latency_warmup + settings.latency_runs)
    latency_ms = measure_latency(model, images[0], settings)
    time_s = write_detections(model, images, out_dir, settings, title)
    log.info("%s: computing AP", title)
    start = time.perf_counter()
    coco = score(truth, out_dir / DETECTIONS, ids)
    time_s["score"] = time.perf_counter() - start
    metrics = {
        "model": {
            "file": printable(model.path.name),
            "sha256": sha256(model.path),
            "size_bytes": model.path.stat().st_size,
            "label": model.label,
            "scheme": model.scheme,
            "precision": model.precision,
            "contract": model.contract,
            "imgsz": model.imgsz,
            "start": start_of(model.metadata),
        },
        "dataset": facts,
        "coco": coco,
        "settings": {
            "conf": settings.conf,
            "max_det": settings.max_det,
            "batch": model.batch or settings.batch,
            "evaluator": EVALUATOR,
        },
        "runtime": describe_runtime(model),
        "latency_ms": latency_ms,
        "time_s": time_s,
        "environment": environment(),
        "settings_hash": settings_hash(settings, hash_ids(all_ids), facts["annotation_sha256"]),
    }
    metrics_path = out_dir / METRICS
    write_json(metrics_path, metrics)
    log.info("%s: %s, %s", title, result(metrics), metrics_path)
    return metrics


def write_detections(
    model: Model, images: list[ImageFile], out_dir: Path, settings: Eval, title: str
) -> dict[str, float]:
    """Writes out_dir/detections.json and deletes an older metrics.json, which describes other detections.

    Returns:
        the seconds of `detect`.
    """
    time_s: dict[str, float] = {}

    def write(part: Path) -> None:
        (out_dir / METRICS).unlink(missing_ok=True)
        with open(part, "w", encoding="utf-8") as file:
            time_s.update(detect(model, images, file, settings, title))

    write_atomic(out_dir / DETECTIONS, write)
    return time_s


def exported_files(run: RunRoot) -> dict[str, Exported]:
    """The ONNX files of the run by their labels, baseline first.

    Raises:
        UserError: a file is not the one that its .json describes, two files have the same label, or there is no file.
    """
    files: dict[str, Exported] = {}
    for path in sorted(run.onnx_dir.glob("*.onnx")):
        record = read_json(path.with_suffix(".json"), "export", RECORD)
        label = today(record["label"])
        if Label.parse(label).method == FOREIGN:  # it names the folder of the scores
            raise UserError(f"{path}: {printable(label)} is no label of ours: run 'make export ARGS=--force'")
        if record["sha256"] != sha256(path):
            raise UserError(f"{path} is not the file that its .json describes: run 'make export ARGS=--force'")
        if label in files:
            raise UserError(f"{path} and {files[label].path.name} are both {label}: delete one")
        files[label] = Exported(path, record)
    if not files:
        raise UserError(f"no ONNX file in {run.onnx_dir}: run 'make export' first")
    return {label: files[label] for label in sorted(files, key=by_label)}


def dataset_of_run(config: Config, run: RunRoot) -> tuple[Dataset, str]:
    """The val split of the run, as its data stage chose it, and the settings_hash that its metrics.json must have.

    Warns if data.coco_dir names another folder, because this stage scores the images of the run all the same.

    Raises:
        UserError: the annotations are missing or have changed.
    """
    provenance = read_json(run.provenance, "data", PROVENANCE)
    asked = config.data.coco_dir
    scored = (provenance["settings"]["coco_dir"], provenance["coco_dir"])
    if asked not in scored and asked != load(config.variant).data.coco_dir:
        log.warning(
            "eval: scores the images of the run (%s), not those of data.coco_dir=%s: take another RUN=name for them, "
            "or make eval ONNX=FILE COCO_DIR=%s", provenance["coco_dir"], asked, asked
        )  # fmt: skip
    split = provenance["splits"]["val"]
    coco_dir, name = Path(provenance["coco_dir"]), split["name"]
    dataset = Dataset(
        coco_dir, name, split["image_ids"], provenance["title"], source_at(coco_dir, name, split),
        split.get("images_sha256"),
    )  # fmt: skip
    check_unchanged(dataset, split["annotation_sha256"])
    return dataset, settings_hash(config.eval, split["image_ids_sha256"], split["annotation_sha256"])


def settings_hash(settings: Eval, ids_sha256: str, annotation_sha256: str) -> str:
    """SHA-256 (16 hex digits) over everything but the model that a metrics.json depends on."""
    parts = [FORMAT_VERSION, settings.model_dump(mode="json"), ids_sha256, annotation_sha256]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


def is_done(out_dir: Path, model_sha256: str, wanted_hash: str, dataset: Dataset) -> bool:
    """Whether a result of this model file, these settings and these images exists.

    One of an earlier version does not say what its images held.
    """
    if not (out_dir / METRICS).exists() or not (out_dir / DETECTIONS).exists():
        return False
    metrics = read_json(out_dir / METRICS, "eval", SCORED)
    is_same = metrics["model"]["sha256"] == model_sha256 and metrics["settings_hash"] == wanted_hash
    return is_same and metrics["dataset"].get("images_sha256") in (None, dataset.images_sha256)


def tell_outdated(out_dir: Path, model_sha256: str) -> None:
    """Logs how a result that is not `is_done` differs from the one that is wanted, where there is one."""
    metrics_path = out_dir / METRICS
    if metrics_path.exists() and (out_dir / DETECTIONS).exists():
        is_same_model = read_json(metrics_path, "eval", SCORED)["model"]["sha256"] == model_sha256
        other = "settings or images" if is_same_model else "model file"
        log.info("eval: %s is of another %s, scoring again", metrics_path, other)


def result(metrics: dict[str, Any]) -> str:
    """AP, AP50, AP_FREQUENT where there is one, images, speed and latency in one line."""
    dataset, coco, latency = metrics["dataset"], metrics["coco"], metrics["latency_ms"]
    frequent = f"AP of frequent classes {shown(coco[AP_FREQUENT])}, " if AP_FREQUENT in coco else ""
    subset = f" (subset of {dataset['n_images_listed']:,})" if dataset["subset"] else ""
    rate = dataset["n_images"] / metrics["time_s"]["total"]
    return (
        f"AP {shown(coco['AP'])}, AP50 {shown(coco['AP50'])}, {frequent}{dataset['n_images']:,} images{subset}, "
        f"{rate:.1f} images/s, latency p50 {latency['p50']:.2f} ms at batch {latency['batch']}"
    )


def shown(ap: float | None) -> str:
    return "-" if ap is None else f"{ap:.4f}"

"""A run root as a full run leaves it, without the training: drawn val images, generated detections, 300 epochs.

    python -m tests.support.rehearsal RUNS_DIR COCO_DIR        COCO_DIR as `app draw` makes it

writes RUNS_DIR/rehearsal, on which report, compare and publish are measured (docs/results.md).
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from app.coco.annotations import read_instances
from app.coco.categories import CATEGORY_IDS
from app.coco.dataset import DRAWN_TITLE, Dataset, annotation_path
from app.coco.detail import matched, precision_of
from app.coco.score import describe_dataset, load_truth, read_results
from app.core.config import load
from app.core.curves import write_loss_curve
from app.core.files import sha256
from app.core.labels import BASELINE, Label
from app.core.results import write_rows
from app.core.run import RunRoot
from tests.support.report_fixtures import SHA, environment, layer, metrics, write

SCHEMES = ("w4a16", "w4a16-mixed", "w8a16", "w4a16-dfl")
LABELS = (str(BASELINE), *(str(Label("qat", scheme)) for scheme in SCHEMES))
N_LAYERS = 113  # convolutions of YOLOv10m
N_EPOCHS = 300


@dataclass(frozen=True)
class Quality:
    """How well a generated model detects: the share of objects that it finds, and the error of its boxes in px."""

    share: float
    error_px: float


def build(runs_dir: Path, coco_dir: Path, n_detections: int = 300, n_epochs: int = N_EPOCHS) -> RunRoot:
    """Baseline and four schemes, trained, exported and scored on val2017 of `coco_dir`."""
    run = RunRoot(runs_dir, "rehearsal")
    dataset = Dataset(coco_dir, "val2017", None, DRAWN_TITLE)
    write(run.run_json, {"name": run.name, "stages": {}})
    write(run.provenance, provenance(dataset))
    for number, label in enumerate(LABELS):
        train(run, label, n_epochs, 0.01 * number)
        file = f"net-{label}.onnx"
        record = {"label": label, "file": file, "sha256": SHA["qat"], "size_bytes": 7, "gates": {}}
        write(run.onnx_dir / f"net-{label}.json", record | {"checkpoint_sha256": SHA["ids"]})
        folder = run.root / Label.parse(label).scores_dir
        write(folder / "metrics.json", metrics(label, file, SHA["qat"], 0.0, 60_000_000))
        detect(folder / "detections.json", dataset, n_detections, Quality(0.9 - 0.05 * number, 1.0 + number))
        enter_ap(folder, dataset)
    return run


def provenance(dataset: Dataset) -> dict[str, Any]:
    split = read_instances(dataset.annotation_file)
    facts = {
        "annotation_sha256": sha256(dataset.annotation_file), "image_ids_sha256": SHA["ids"], "image_ids": None,
        "subset": False, "n_broken": 0, "n_listed": len(split.images), "n_images": len(split.images),
        "n_annotations": sum(split.n_annotations.values()), "n_crowd": sum(split.n_crowd.values()),
        "n_without_objects": 0,
    }  # fmt: skip
    splits = {
        role: {"name": name, "annotation_file": str(annotation_path(dataset.coco_dir, name)), **facts}
        for role, name in (("train", "train2017"), ("val", "val2017"))
    }
    return {"title": dataset.title, "coco_dir": str(dataset.coco_dir), "seed": 0, "splits": splits}


def train(run: RunRoot, label: str, n_epochs: int, loss: float) -> None:
    """The text files of a training; its loss is higher and its AP lower by `loss`."""
    scheme = Label.parse(label).scheme
    sets = [f"quant.scheme={scheme}"] if scheme else []
    config = load("qat" if scheme else "fp16", sets=[f"train.epochs={n_epochs}", *sets])
    folder = run.variant_dir(label)
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(yaml.safe_dump(config.model_dump(mode="json")), encoding="utf-8")
    write_rows(folder / "results.csv", list(history(n_epochs, loss)))
    write_loss_curve(folder)
    write(folder / "env.json", environment("train", device="cpu"))
    write(folder / "done.json", {"best_sha256": SHA["ids"]})
    if scheme:
        layers = [layer(f"model.{number}.conv", 4, "") for number in range(N_LAYERS)]
        tree = {"scheme": scheme, "layers": layers, "share_of_learned_weights": {"4": 1.0}}
        write(folder / "quant_config.json", tree)
        write(folder / "health.json", {"epoch": n_epochs, "snr_db": {entry["name"]: 17.5 for entry in layers}})


def history(n_epochs: int, loss: float) -> Iterator[dict[str, float]]:
    """Rows of results.csv with the columns of a training."""
    for epoch in range(1, n_epochs + 1):
        progress = epoch / (epoch + 20)
        row: dict[str, float] = {"epoch": epoch}
        for name in ("box", "cls", "dfl"):
            row[f"train/{name}_loss"] = 4 - 3 * progress + loss
        for state in ("raw", "ema", "ema_bn"):
            row |= {f"AP/{state}": 0.5 * progress - loss, f"AP50/{state}": 0.7 * progress - loss}
            row[f"val_loss/{state}"] = 6 - 3 * progress + loss
        for name in ("oscillating", "flipped", "ema_differs", "snr_mean_db", "snr_min_db"):
            row[f"health/{name}"] = progress
        yield row | {"time/epoch_s": 700.0, "time/images_per_s": 170.0}


def detect(path: Path, dataset: Dataset, n_detections: int, quality: Quality) -> None:
    """Writes detections.json as the evaluator does, an image a line: what is found, and false boxes of low scores."""
    rng = np.random.default_rng(0)
    split = read_instances(dataset.annotation_file)
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", encoding="utf-8") as file:
        for number, image in enumerate(split.images):
            size = (image["width"], image["height"])
            rows = image_rows(rng, split.boxes[image["id"]], size, n_detections, quality)
            text = json.dumps([{"image_id": image["id"], **row} for row in rows])
            file.write(("[\n" if number == 0 else ",\n") + text[1:-1])
        file.write("\n]\n")


def image_rows(
    rng: np.random.Generator, objects: list[list[float]], size: tuple[int, int], n: int, quality: Quality
) -> list[dict[str, Any]]:
    truth = np.array(objects, float).reshape(-1, 5)
    found = truth[rng.random(len(truth)) < quality.share][:n]
    n_false = n - len(found)
    sides = np.exp(rng.uniform(np.log(8), np.log(300), (n_false, 2)))
    corners = rng.random((n_false, 2)) * np.maximum(1, np.array(size) - sides)
    boxes = np.concatenate(
        [found[:, 1:] + rng.normal(0, quality.error_px, (len(found), 4)), np.hstack([corners, sides])]
    )
    boxes[:, 2:] = np.maximum(boxes[:, 2:], 1)
    false_classes = rng.choice(CATEGORY_IDS, n_false)
    classes = np.concatenate([found[:, 0], false_classes]).astype(int)
    scores = np.concatenate([rng.uniform(0.2, 0.95, len(found)), 0.001 + 0.3 * rng.random(n_false) ** 4])
    rows = []
    for category, box, value in zip(classes.tolist(), boxes.round(3).tolist(), scores.tolist(), strict=True):
        rows.append({"category_id": category, "bbox": box, "score": value})
    return sorted(rows, key=lambda row: -row["score"])


def enter_ap(folder: Path, dataset: Dataset) -> None:
    """Enters dataset and AP into metrics.json. The other numbers stay: no stage behind eval computes them again."""
    truth = load_truth(dataset.annotation_file)
    ids = sorted(truth.imgs)
    detections = read_results(folder / "detections.json")
    precisions = []
    for category_id in sorted(truth.getCatIds()):
        found = matched(truth, detections, category_id, ids)
        if found.n_objects.total():
            precisions.append(precision_of(found))
    path = folder / "metrics.json"
    tree = json.loads(path.read_text())
    tree["dataset"] |= describe_dataset(truth, dataset, ids)
    tree["coco"]["AP"] = float(np.mean(precisions))
    write(path, tree)


if __name__ == "__main__":
    build(Path(sys.argv[1]), Path(sys.argv[2]).resolve())

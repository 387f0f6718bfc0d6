"""A small finished run root with fixed numbers, built in code, for the tests of the report."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from PIL import Image

from app.coco.dataset import Dataset
from app.coco.score import STATS, describe_dataset, load_truth, score
from app.core.config import load
from app.core.files import sha256
from app.core.results import write_rows
from app.core.run import RunRoot
from tests.support.eval_fixtures import truth_box, write_annotations

NAMES = ("lock", "train", "val", "ids", "fp16", "qat", "fp16 checkpoint", "qat checkpoint")
SHA = {name: hashlib.sha256(name.encode()).hexdigest() for name in NAMES}
PACKAGES = {"torch": "2.10.0", "onnxruntime-gpu": "1.26.0"}
EPOCH_APS = (0.10, 0.30, 0.41, 0.40)


def environment(command: str, **more: Any) -> dict[str, Any]:
    return {
        "code_version": "0123456789ab", "lock_sha256": SHA["lock"], "image": None, "python": "3.12.3",
        "platform": "Linux-test", "cpu_count": 2, "gpus": [], "packages": PACKAGES,
        "command": f"python -m app {command} --run small", "time_utc": "2026-01-02T03:04:05Z", **more,
    }  # fmt: skip


def write(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value), encoding="utf-8")


def set_in(path: Path, dotted: str, value: Any) -> None:
    """Changes a setting of a config.yaml to another value."""
    tree = yaml.safe_load(path.read_text())
    section, key = dotted.split(".")
    assert tree[section][key] != value
    tree[section][key] = value
    path.write_text(yaml.safe_dump(tree))


def edit(path: Path, dotted: str, value: Any) -> None:
    """Changes one key of a JSON file."""
    tree = json.loads(path.read_text())
    *parents, last = dotted.split(".")
    inner = tree
    for key in parents:
        inner = inner[key]
    inner[last] = value
    write(path, tree)


PRIVATE = ("fp16/weights/best.pt", "onnx/net-baseline-fp32.onnx", "fp16/log.txt", "fp16/tensorboard/events.out.1")


def add_private(run: RunRoot) -> None:
    """Files of a training and an export that nobody publishes."""
    for name in PRIVATE:
        path = run.root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("private")


def copy_run(original: Path, folder: Path) -> RunRoot:
    """runs/small and coco/ of `original`, as if they had been made in `folder`."""
    shutil.copytree(original, folder, dirs_exist_ok=True)
    for path in folder.rglob("*.json"):
        path.write_text(path.read_text().replace(str(original), str(folder)))
    return RunRoot(folder / "runs", "small")


def history(shift: float) -> list[dict[str, float]]:
    """Four epochs; `shift` moves the AP up and the losses down."""
    rows = []
    for epoch, ap in enumerate(EPOCH_APS, 1):
        row = {"epoch": epoch, "train/box_loss": 4.0 / epoch, "train/cls_loss": 3.0 / epoch - shift}
        for i, state in enumerate(("raw", "ema", "ema_bn")):
            row |= {f"AP/{state}": ap + shift + 0.01 * i, f"val_loss/{state}": 6.0 / epoch + 0.1 - 2 * shift}
        rows.append(row | {"time/epoch_s": 90.0, "time/images_per_s": 20.0 + epoch})
    return rows


def train_variant(run: RunRoot, label: str, shift: float, checkpoint: str, seed: int) -> None:
    """`checkpoint` is the hash of best.pt."""
    sets = ["train.epochs=4", "hyp.warmup_epochs=1", f"train.seed={seed}"]
    config = load("fp16" if label == "fp16" else "qat", sets=sets)
    folder = run.variant_dir(label)
    folder.mkdir(parents=True)
    tree = config.model_dump(mode="json")
    tree["quant"] = tree["quant"] and {"scheme": "w4a16", "fast_path": True}  # fixed, whatever keys quant gets
    (folder / "config.yaml").write_text(yaml.safe_dump(tree), encoding="utf-8")
    write_rows(folder / "results.csv", history(shift))
    facts = {"device": "cpu", "amp": False, "deterministic": True, "seed": 0, "workers": 0}
    write(folder / "env.json", environment(f"train --variant {config.variant}", **facts))
    write(folder / "done.json", {"epochs": 4, "best_ap": 0.41, "best_sha256": checkpoint})
    if config.quant:
        layers = [layer("model.0.conv", 4, ""), layer("model.23.dfl.conv", 32, "a fixed integral")]
        write(
            folder / "quant_config.json", {"scheme": "w4a16", "layers": layers, "share_of_learned_weights": {"4": 1.0}}
        )
        write(folder / "health.json", {"epoch": 3, "snr_db": {"model.0.conv": 19.25}})


def layer(name: str, bits: int, why_exempt: str) -> dict[str, Any]:
    granularity, quantizer = "per output channel", "Int4WeightPerChannel"
    facts = {"bits": bits, "granularity": granularity, "quantizer": quantizer}
    return {"name": name, "exempt": bool(why_exempt), "why": why_exempt or "learned", **facts}


def export_file(run: RunRoot, label: str, file: str, checkpoint: str) -> None:
    gates = {} if label == "baseline" else {"codes": {"layers": {"4": 1}}}
    digest = SHA["fp16" if label == "baseline" else "qat"]
    record = {"label": label, "file": file, "sha256": digest, "size_bytes": 3, "checkpoint_sha256": checkpoint}
    write(run.onnx_dir / f"{Path(file).stem}.json", record | {"gates": gates})


def metrics(label: str, file: str, digest: str, ap: float, size_bytes: int) -> dict[str, Any]:
    """A metrics.json as the evaluator writes it; tests change single keys."""
    values = [ap, ap + 0.2, ap + 0.02, ap - 0.2, ap, None, *(ap + 0.05 * i for i in range(5)), None]
    return {
        "model": {"file": file, "sha256": digest, "size_bytes": size_bytes, "label": label, "imgsz": 64},
        "dataset": {
            "title": "small set", "split": "val2017", "annotation_sha256": SHA["val"], "n_images": 1200,
            "n_images_listed": 1200, "subset": False, "image_ids_sha256": SHA["ids"], "complete_coco_val": False,
        },
        "coco": dict(zip(STATS, values, strict=True)),
        "settings": {"conf": 0.001, "max_det": 300, "batch": 1, "evaluator": "onnxruntime + pycocotools"},
        "runtime": {"onnxruntime": "1.26.0", "provider": "CPUExecutionProvider", "device": "test CPU"},
        "latency_ms": {"batch": 1, "warmup": 3, "runs": 20, "mean": 3.5, "p50": 3.25, "p90": 3.75, "p99": 4.5},
        "time_s": {"total": 1.0, "session": 0.5},
        "environment": environment("eval"),
    }  # fmt: skip


def provenance() -> dict[str, Any]:
    counts = {"n_broken": 0, "n_crowd": 2, "n_without_objects": 1, "subset": False, "image_ids": None}
    splits = {
        name: {
            "name": f"{name}2017", "annotation_file": f"/nowhere/instances_{name}2017.json",
            "n_listed": n, "n_images": n, "n_annotations": 3 * n, "annotation_sha256": SHA[name],
            "image_ids_sha256": SHA["ids"], **counts,
        }
        for name, n in (("train", 5678), ("val", 1200))
    }  # fmt: skip
    return {"title": "small set", "coco_dir": "/nowhere", "seed": 0, "splits": splits}


def build_run(runs_dir: Path, name: str = "small", seed: int = 0) -> RunRoot:
    """A run of fp16 and qat-w4a16, trained, exported and scored; its dataset is not there."""
    run = RunRoot(runs_dir, name)
    write(run.run_json, {"name": name, "stages": {}})
    write(run.provenance, provenance())
    train_variant(run, "fp16", 0.02, SHA["fp16 checkpoint"], seed)
    train_variant(run, "qat-w4a16", 0.0, SHA["qat checkpoint"], seed)
    export_file(run, "baseline", "net-baseline-fp32.onnx", SHA["fp16 checkpoint"])
    export_file(run, "qat-w4a16", "net-w4a16-qcdq-qat.onnx", SHA["qat checkpoint"])
    baseline = metrics("baseline", "net-baseline-fp32.onnx", SHA["fp16"], 0.4321, 9284375)
    write(run.root / "baseline-coco/metrics.json", baseline)
    quantized = metrics("qat-w4a16", "net-w4a16-qcdq-qat.onnx", SHA["qat"], 0.4198, 2663676)
    write(run.root / "qat-w4a16-coco/metrics.json", quantized)
    return run


def write_bench_rows(path: Path, aps: Sequence[float]) -> Path:
    """Rows of the stability bench: an FP16 training for each AP, which it reaches at epoch 4."""
    rows: list[dict[str, Any]] = []
    for seed, ap in enumerate(aps):
        rows.append({"arm": "fp16", "seed": seed, "epoch": [2, 4], "AP": {"raw": [0, 0], "ema_bn": [0.001, ap]}})
    write(path, {"config": {"model": "yolov10n.yaml", "train.imgsz": 320}, "arms": {"fp16": []}, "rows": rows})
    return path


PTQ_APS = {"ptq-w4a16": 0.2198, "ptq-w4a16-bn": 0.3987}


def add_ptq(run: RunRoot) -> None:
    """Scores of the baseline quantized without training, beside those of the run."""
    for label, ap in PTQ_APS.items():
        made = metrics(label, f"net-{label}.onnx", SHA["qat"], ap, 2663676)
        write(run.root / f"{label}-coco/metrics.json", made)


TRUTH = {1: [(1, [10, 10, 20, 20])], 2: [(3, [5, 5, 30, 20])], 3: [], 4: [(1, [20, 8, 16, 30])]}  # category, box in px
FOUND = {"baseline-coco": (1, 4), "qat-w4a16-coco": (2, 4)}  # images whose object each variant finds exactly


def add_dataset(run: RunRoot, folder: Path) -> None:
    """Gives the run a val split of four drawn images and detections that fit: qat loses image 1 and gains image 2."""
    annotations = [truth_box(image_id, box, category) for image_id, rows in TRUTH.items() for category, box in rows]
    sizes = dict.fromkeys(TRUTH, (64, 48))
    file = write_annotations(folder / "annotations/instances_val2017.json", sizes, annotations)
    (folder / "val2017").mkdir()
    for image_id, size in sizes.items():
        Image.new("RGB", size, (40 * image_id, 90, 120)).save(folder / f"val2017/{image_id:012d}.png")
    tree = provenance()
    split = tree["splits"]["val"]
    split |= {"annotation_file": str(file), "annotation_sha256": sha256(file), "n_listed": 4, "n_images": 4}
    write(run.provenance, tree | {"coco_dir": str(folder)})
    for name, images in FOUND.items():
        rows = [
            {"image_id": image_id, "category_id": category, "bbox": box, "score": 0.5 + image_id / 16}
            for image_id in images
            for category, box in TRUTH[image_id]
        ]
        score_detections(run.root / name, rows, Dataset(folder, "val2017", None, "small set"))


def score_detections(folder: Path, rows: list[dict[str, Any]], dataset: Dataset) -> None:
    """Writes detections.json and enters what COCOeval says of it into metrics.json."""
    write(folder / "detections.json", rows)
    truth = load_truth(dataset.annotation_file)
    metrics_path = folder / "metrics.json"
    tree = json.loads(metrics_path.read_text())
    tree["dataset"] |= describe_dataset(truth, dataset, sorted(truth.imgs))
    tree["coco"] = score(truth, folder / "detections.json", sorted(truth.imgs))
    write(metrics_path, tree)

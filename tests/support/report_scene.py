"""A finished run root in which no two numbers are equal: a number in the wrong place of a page is seen."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from app.core.config import load
from app.core.results import write_rows
from app.core.run import RunRoot
from tests.support.report_fixtures import SHA, edit, environment, layer, metrics, write

STATS = "AP AP50 AP75 AP_small AP_medium AP_large AR_1 AR_10 AR_100 AR_small AR_medium AR_large".split()
COCO = {
    "baseline-coco": "0.5123 0.7034 0.5541 0.3019 0.5628 0.6637 0.3846 0.6055 0.6264 0.4173 0.6682 0.8091",
    "ptq-w4a16-coco": "0.3561 0.5247 0.3819 0.1606 0.3988 0.4729 0.2974 0.4452 0.4635 0.2288 0.5094 0.6276",
    "ptq-w4a16-bn-coco": "0.3772 0.5468 0.4021 0.1837 0.4162 0.4953 0.3115 0.4691 0.4874 0.2506 0.5317 0.6493",
    "qat-w4a16-coco": "0.4887 0.6795 0.5302 0.2713 0.5379 0.6404 0.3692 0.5816 0.6019 0.3925 0.6431 0.7853",
    "qat-w4a16-int4-coco": "0.4879 0.6783 0.5296 0.2708 0.5366 0.6398 0.3687 0.5807 0.6012 0.3918 0.6427 0.7848",
}
LABELS = {folder: folder.removesuffix("-coco") for folder in COCO}
SIZE_BYTES = dict(zip(COCO, (61_437_952, 16_318_207, 16_431_501, 16_205_110, 8_704_333), strict=True))
LATENCY_MS = {  # mean, p50, p90, p99
    "baseline-coco": (43.07, 41.52, 47.83, 53.91),
    "ptq-w4a16-coco": (35.63, 35.11, 38.62, 42.44),
    "ptq-w4a16-bn-coco": (35.98, 35.29, 38.86, 42.79),
    "qat-w4a16-coco": (37.06, 36.24, 39.75, 44.18),
    "qat-w4a16-int4-coco": (54.02, 52.37, 58.49, 63.32),
}
# Five epochs; the best by AP/ema_bn is the third of fp16 and the fourth of qat.
HISTORY: dict[str, dict[str, list[float]]] = {
    "fp16": {
        "train/box_loss": [2.51, 1.74, 1.11, 1.03, 0.95], "train/cls_loss": [3.62, 2.25, 1.52, 1.43, 1.31],
        "train/dfl_loss": [1.73, 1.16, 0.93, 0.91, 0.88],
        "AP/raw": [0.171, 0.302, 0.4507, 0.4216, 0.4428], "AP/ema": [0.152, 0.311, 0.4625, 0.4337, 0.4519],
        "AP/ema_bn": [0.213, 0.331, 0.4712, 0.4439, 0.4611],
        "val_loss/raw": [8.31, 5.62, 3.993, 3.914, 3.835], "val_loss/ema": [8.57, 5.41, 3.926, 3.842, 3.758],
        "val_loss/ema_bn": [8.04, 5.33, 3.871, 3.796, 3.702],
        "time/epoch_s": [720, 700, 710, 690, 680], "time/images_per_s": [164.1, 166.2, 165.3, 167.4, 168.5],
    },
    "qat-w4a16": {
        "train/box_loss": [2.93, 1.95, 1.36, 1.27, 1.04], "train/cls_loss": [3.87, 2.48, 1.71, 1.63, 1.47],
        "train/dfl_loss": [1.89, 1.28, 1.02, 0.98, 0.91],
        "AP/raw": [0.121, 0.243, 0.3708, 0.4201, 0.3816], "AP/ema": [0.103, 0.254, 0.3819, 0.4283, 0.3927],
        "AP/ema_bn": [0.184, 0.292, 0.4013, 0.4365, 0.4098],
        "val_loss/raw": [9.13, 6.24, 4.517, 4.381, 4.296], "val_loss/ema": [9.38, 6.07, 4.452, 4.318, 4.227],
        "val_loss/ema_bn": [8.86, 5.95, 4.304, 4.205, 4.113],
        "time/epoch_s": [1010, 990, 980, 1000, 1020], "time/images_per_s": [118.6, 119.7, 120.8, 121.9, 123.0],
        "health/oscillating": [0.011, 0.022, 0.033, 0.044, 0.055],
        "health/flipped": [0.061, 0.072, 0.083, 0.094, 0.105],
        "health/ema_differs": [0.116, 0.127, 0.138, 0.149, 0.157],
        "health/snr_mean_db": [20.1, 21.2, 22.4, 23.5, 24.6], "health/snr_min_db": [15.3, 16.4, 17.6, 18.7, 19.8],
    },
}  # fmt: skip
BITS = {f"model.{i}.conv": 8 if i < 2 else 4 for i in range(7)}  # two layers of 8 bits, five of 4
SNR_DB = {
    "ptq-w4a16": [37.9, 36.8, 17.3, 16.1, 14.8, 15.5, 17.4],
    "qat-w4a16": [39.5, 38.1, 21.7, 20.4, 19.3, 18.6, 22.3],
}
SHARES = {"ptq-w4a16": {"4": 0.873, "8": 0.127}, "qat-w4a16": {"4": 0.861, "8": 0.139}}
IN_FILE = {"4": 3, "8": 1}  # one head of two
COUNTS = ("n_images", "n_listed", "n_broken", "n_annotations", "n_crowd", "n_without_objects")
SPLITS = {"train": (8765, 9876, 12, 54321, 432, 98), "val": (2109, 3210, 3, 12345, 76, 54)}


def build_scene(runs_dir: Path, name: str = "scene", seed: int = 0) -> RunRoot:
    """fp16 and qat-w4a16 trained, PTQ beside them, all scored on a subset; the dataset is not there."""
    run = RunRoot(runs_dir, name)
    write(run.run_json, {"name": name, "stages": {}})
    write(run.provenance, provenance())
    for label in HISTORY:
        train(run, label, seed)
    for label in SNR_DB:
        quantize(run, label)
    for folder, label in LABELS.items():
        write(run.root / folder / "metrics.json", scored(folder))
        export(run, label)
    return run


def provenance() -> dict[str, Any]:
    splits = {
        split: dict(zip(COUNTS, counts, strict=True))
        | {"name": f"{split}2017", "annotation_file": f"/nowhere/{split}.json", "annotation_sha256": SHA[split]}
        | {"image_ids_sha256": SHA["ids"], "subset": True, "image_ids": [1]}
        for split, counts in SPLITS.items()
    }
    return {"title": "scene set", "coco_dir": "/nowhere", "seed": 31, "splits": splits}


def train(run: RunRoot, label: str, seed: int) -> None:
    config = load(label.partition("-")[0], sets=["train.epochs=5", "hyp.warmup_epochs=1", f"train.seed={seed}"])
    folder = run.variant_dir(label)
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(yaml.safe_dump(config.model_dump(mode="json")), encoding="utf-8")
    columns = HISTORY[label]
    rows = [{"epoch": epoch} | {name: values[epoch - 1] for name, values in columns.items()} for epoch in range(1, 6)]
    write_rows(folder / "results.csv", rows)
    write(folder / "env.json", environment(f"train --variant {config.variant}", device="cpu"))
    write(folder / "done.json", {"best_sha256": SHA["ids"]})


def quantize(run: RunRoot, label: str) -> None:
    layers = [layer(name, bits, "") for name, bits in BITS.items()] + [layer("model.23.dfl.conv", 32, "fixed")]
    tree = {"scheme": "w4a16", "layers": layers, "share_of_learned_weights": SHARES[label]}
    write(run.variant_dir(label) / "quant_config.json", tree)
    write(run.variant_dir(label) / "health.json", {"epoch": 4, "snr_db": dict(zip(BITS, SNR_DB[label], strict=True))})


def scored(folder: str) -> dict[str, Any]:
    """The metrics.json of one row; thresholds, counts and latency have numbers of their own too."""
    label = LABELS[folder]
    tree = metrics(label, f"net-{label}.onnx", SHA["qat"], 0.0, SIZE_BYTES[folder])
    tree["coco"] = dict(zip(STATS, map(float, COCO[folder].split()), strict=True))
    tree["model"]["imgsz"] = 608
    tree["dataset"] |= {"title": "scene set", "n_images": 2109, "n_images_listed": 3210, "subset": True}
    tree["settings"] |= {"conf": 0.0025, "max_det": 289}
    times = dict(zip(("mean", "p50", "p90", "p99"), LATENCY_MS[folder], strict=True))
    processing = {name: value + 100 for name, value in times.items()}
    tree["latency_ms"] = {"batch": 1, "warmup": 11, "runs": 137, **times, "with_processing": processing}
    return tree


def export(run: RunRoot, label: str) -> None:
    gates = {} if label == "baseline" else {"codes": {"layers": IN_FILE}}
    record = {"label": label, "file": f"net-{label}.onnx", "sha256": SHA["qat"], "size_bytes": 7}
    write(run.onnx_dir / f"net-{label}.json", record | {"checkpoint_sha256": SHA["ids"], "gates": gates})


def enter_ap(run: RunRoot, aps: dict[str, float]) -> None:
    """Changes the AP of some folders."""
    for folder, ap in aps.items():
        edit(run.root / folder / "metrics.json", "coco.AP", ap)

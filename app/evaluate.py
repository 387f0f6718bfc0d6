"""The evaluator: ONNX files and COCO annotations in, metrics.json and detections.json out. Knows nothing of torch."""

from __future__ import annotations

import contextlib
import hashlib
import io
import itertools
import json
import logging
import random
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from app.coco import N_VAL, read_instances
from app.config import Config, Eval, UserError
from app.detections import Letterbox, coco_results, decode, letterbox, read_image
from app.progress import track
from app.run import RunRoot, environment, read_json, record_stage, sha256, write_json, write_text
from app.session import Session, open_session

log = logging.getLogger(__name__)
EVALUATOR = "onnxruntime + pycocotools"
EVALUATOR_VERSION = 1  # raise when a change moves numbers: older results are then stale
N_DECODERS = 2  # threads that read images ahead; ONNX Runtime has its own
COCO_NAMES = "AP AP50 AP75 AP_small AP_medium AP_large AR_1 AR_10 AR_100 AR_small AR_medium AR_large".split()


@dataclass(frozen=True)
class Dataset:
    """Images to score: their ids and files, and the annotation file that judges them."""

    title: str
    image_dir: Path
    annotation_file: Path
    annotation_sha256: str
    split: str
    n_listed: int
    files: dict[int, str]  # image id -> file name, in the order of the ids

    @property
    def ids_sha256(self) -> str:
        return hashlib.sha256("\n".join(map(str, self.files)).encode()).hexdigest()


def evaluate(config: Config, run: RunRoot, force: bool) -> None:
    """Scores every ONNX file of a run; what is up to date is left alone.

    Raises:
        UserError: nothing exported yet, or a file that does not belong to its record.
    """
    paths = sorted(run.onnx_dir.glob("*.onnx"))
    if not paths:
        raise UserError(f"no ONNX files in {run.onnx_dir}: run 'make export' first")
    dataset = limit(dataset_of_run(read_json(run.provenance, "data")), config.eval.max_images)
    for path in paths:
        record = read_json(path.with_suffix(".json"), "export")
        if record["sha256"] != sha256(path):
            raise UserError(f"{path} is not the file that its .json describes: run 'make export ARGS=--force'")
        name = "baseline" if record["label"] == "fp16" else record["label"]
        out_dir = run.root / f"{name}-coco"
        if force or not is_current(out_dir, path, dataset, config.eval):
            metrics = evaluate_file(path, dataset, out_dir, config.eval)
            record_stage(run, f"eval {record['label']}", {"file": path.name, **metrics["coco"]})


def evaluate_standalone(config: Config, onnx_path: Path, coco_dir: Path, split: str, out_dir: Path) -> None:
    """Scores any ONNX file that keeps the contract on a split of a COCO folder."""
    annotation_file = coco_dir / "annotations" / f"instances_{split}.json"
    images = read_instances(annotation_file).images
    official = split == "val2017" and len(images) == N_VAL
    dataset = Dataset(
        "COCO 2017" if official else "a COCO-format dataset, not COCO 2017", coco_dir / split, annotation_file,
        sha256(annotation_file), split, len(images), {image["id"]: image["file_name"] for image in images},
    )  # fmt: skip
    evaluate_file(onnx_path, limit(dataset, config.eval.max_images), out_dir, config.eval)


def dataset_of_run(provenance: dict[str, Any]) -> Dataset:
    """The val images that the data stage chose."""
    val = provenance["splits"]["val"]
    annotation_file = Path(val["annotation_file"])
    if not annotation_file.is_file() or sha256(annotation_file) != val["annotation_sha256"]:
        raise UserError(
            f"{annotation_file} is missing or has changed since 'make data': run it again with ARGS=--force"
        )
    images = read_instances(annotation_file).images
    chosen = None if val["image_ids"] is None else set(val["image_ids"])
    files = {image["id"]: image["file_name"] for image in images if chosen is None or image["id"] in chosen}
    image_dir = Path(provenance["coco_dir"]) / val["name"]
    return Dataset(
        provenance["title"], image_dir, annotation_file, val["annotation_sha256"], val["name"], val["n_listed"], files
    )


def limit(dataset: Dataset, max_images: int | None) -> Dataset:
    """A seeded choice of `max_images` images; everything downstream calls it a subset."""
    if max_images is None or max_images >= len(dataset.files):
        return dataset
    chosen = sorted(random.Random(0).sample(list(dataset.files), max_images))  # noqa: S311
    return replace(dataset, files={image_id: dataset.files[image_id] for image_id in chosen})


def settings_hash(dataset: Dataset, settings: Eval) -> str:
    facts = [EVALUATOR_VERSION, settings.model_dump(), dataset.annotation_sha256, dataset.ids_sha256]
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]


def is_current(out_dir: Path, onnx_path: Path, dataset: Dataset, settings: Eval) -> bool:
    path = out_dir / "metrics.json"
    if not path.exists():
        return False
    old = read_json(path, "eval")
    if old["model"]["sha256"] == sha256(onnx_path) and old["settings_hash"] == settings_hash(dataset, settings):
        log.info("eval %s: done already (%s)", old["model"]["label"], path)
        return True
    log.info("eval %s: %s is of another file or other settings, scoring again", old["model"]["label"], path)
    return False


def evaluate_file(onnx_path: Path, dataset: Dataset, out_dir: Path, settings: Eval) -> dict[str, Any]:
    """Runs a file over all images, scores what it found, measures its latency, and writes both JSON files.

    Raises:
        UserError: the file does not keep the contract, the provider cannot be had, or an image is missing.
    """
    session = open_session(onnx_path, settings)
    subset = f"SUBSET of {dataset.n_listed:,} " if len(dataset.files) < dataset.n_listed else ""
    start = time.perf_counter()
    results, times = detect(session, dataset, settings, subset)
    times["total"] = time.perf_counter() - start
    text = json.dumps(results)
    coco = score(dataset, json.loads(text))
    first = dataset.image_dir / next(iter(dataset.files.values()))
    metrics = {
        "model": session.model_facts,
        "dataset": {
            "title": dataset.title, "image_dir": str(dataset.image_dir), "annotation_file": str(dataset.annotation_file),
            "split": dataset.split, "annotation_sha256": dataset.annotation_sha256, "n_images": len(dataset.files),
            "n_images_listed": dataset.n_listed, "n_annotations": coco.pop("n_annotations"), "subset": bool(subset),
            "image_ids_sha256": dataset.ids_sha256,
            "complete_coco_val": dataset.title == "COCO 2017" and len(dataset.files) == N_VAL,
        },
        "coco": coco,
        "settings": {"conf": settings.conf, "max_det": settings.max_det, "batch": settings.batch, "evaluator": EVALUATOR},
        "settings_hash": settings_hash(dataset, settings),
        "runtime": session.runtime_facts,
        "latency_ms": latency(session, letterbox(read_image(first), session.imgsz)[0], settings),
        "time_s": {name: round(value, 4) for name, value in times.items()},
        "n_detections": len(results),
        "environment": environment(),
    }  # fmt: skip
    write_text(out_dir / "detections.json", text)
    write_json(out_dir / "metrics.json", metrics)
    log.info(
        "eval %s: AP %.4f, AP50 %.4f on %s%d images of %s, %.1f images/s, latency p50 %.2f ms on %s",
        metrics["model"]["label"], coco["AP"] or 0.0, coco["AP50"] or 0.0, subset, len(dataset.files), dataset.title,
        len(dataset.files) / times["total"], metrics["latency_ms"]["p50"], metrics["runtime"]["device"],
    )  # fmt: skip
    return metrics


def detect(
    session: Session, dataset: Dataset, settings: Eval, subset: str
) -> tuple[list[dict[str, Any]], dict[str, float]]:
    """All detections as COCO results, and seconds spent in the session and around it.

    Threads decode ahead of the session by a bounded number of images: memory does not grow with the dataset.
    """
    results: list[dict[str, Any]] = []
    times = {"session": 0.0, "waiting_for_images": 0.0, "postprocess": 0.0}
    n_images = len(dataset.files)
    batch_size = session.batch or settings.batch
    desc = f"scoring {session.model_facts['file']} {subset}".strip()
    progress = track(range(n_images), desc, n_images)
    clock = time.perf_counter
    with contextlib.closing(progress):
        for batch in batched(prefetch(dataset, session.imgsz, 2 * batch_size + N_DECODERS), batch_size, times):
            start = clock()
            outputs = session.run(np.stack([tensor for _, tensor, _ in batch]))
            inferred = clock()
            for (image_id, _, way), output in zip(batch, outputs, strict=False):
                detections = decode(output, session.contract, settings.max_det, settings.conf)
                results += coco_results(image_id, way, detections)
                next(progress)
            times["session"] += inferred - start
            times["postprocess"] += clock() - inferred
        for _ in progress:  # lets it close its line
            pass
    return results, times


def prefetch(dataset: Dataset, imgsz: int, n_ahead: int) -> Iterator[tuple[int, np.ndarray, Letterbox]]:
    """Yields (image id, [3,S,S] float32, way back) in order, decoded by threads at most `n_ahead` images ahead."""

    def load(entry: tuple[int, str]) -> tuple[int, np.ndarray, Letterbox]:
        return entry[0], *letterbox(read_image(dataset.image_dir / entry[1]), imgsz)

    entries = iter(dataset.files.items())
    with ThreadPoolExecutor(N_DECODERS) as pool:
        waiting = [pool.submit(load, entry) for entry in itertools.islice(entries, n_ahead)]
        while waiting:
            yield waiting.pop(0).result()
            waiting += [pool.submit(load, entry) for entry in itertools.islice(entries, 1)]


def batched(images: Iterator[Any], size: int, times: dict[str, float]) -> Iterator[list[Any]]:
    """Groups images; the time spent waiting for them is added to `times`."""
    while True:
        start = time.perf_counter()
        batch = list(itertools.islice(images, size))
        times["waiting_for_images"] += time.perf_counter() - start
        if not batch:
            return
        yield batch


def score(dataset: Dataset, results: list[dict[str, Any]]) -> dict[str, Any]:
    """COCO's 12 box numbers over exactly the dataset's images; null where COCOeval has nothing to average (-1)."""
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        truth = COCO(str(dataset.annotation_file))
        found = truth.loadRes(results) if results else COCO()
        judge = COCOeval(truth, found, "bbox")
        judge.params.imgIds = list(dataset.files)
        if results:
            judge.evaluate()
            judge.accumulate()
            judge.summarize()
    log.debug("%s", printed.getvalue())
    numbers = judge.stats if results else [0.0] * len(COCO_NAMES)
    coco: dict[str, Any] = {
        name: None if value < 0 else float(value) for name, value in zip(COCO_NAMES, numbers, strict=True)
    }
    return coco | {"n_annotations": len(truth.getAnnIds(imgIds=list(dataset.files)))}


def latency(session: Session, tensor: np.ndarray, settings: Eval) -> dict[str, Any]:
    """Milliseconds of one session run at batch 1 (or the file's fixed batch), without pre- and post-processing."""
    batch = np.stack([tensor] * (session.batch or 1))
    for _ in range(settings.latency_warmup):
        session.run(batch)
    samples = []
    for _ in range(settings.latency_runs):
        start = time.perf_counter()
        session.run(batch)
        samples.append((time.perf_counter() - start) * 1e3)
    p50, p90, p99 = np.percentile(samples, (50, 90, 99)).round(4).tolist()
    facts = {"batch": len(batch), "warmup": settings.latency_warmup, "runs": settings.latency_runs}
    return {**facts, "mean": round(float(np.mean(samples)), 4), "p50": p50, "p90": p90, "p99": p99}

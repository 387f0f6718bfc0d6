"""Our evaluator beside `yolo val`: the same ONNX file and images, in turns: time, memory, and why AP differs."""

from __future__ import annotations

import logging
import math
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from pycocotools.coco import COCO

from app.bench.eval_tables import OURS, SESSION, STOCK, show
from app.bench.explain import explain
from app.bench.train import stock_dataset
from app.coco.categories import ids_by_name
from app.coco.dataset import SPLITS, annotation_path
from app.coco.score import ImageFile, image_files, truth_of, usable_ids
from app.core.config import Config, Eval, UserError, load
from app.core.environment import cpu_name, environment
from app.core.files import make_link, read_json, write_json
from app.core.labels import BASELINE
from app.core.run import RunRoot
from app.data.prepare import prepare
from app.eval.evaluate import METRICS, dataset_of_run, exported_files
from app.eval.pipeline import load_input
from app.eval.runtime import CPU, Model, gpu_name, open_model

log = logging.getLogger(__name__)
COPIES = (1, 2, 4)  # how often the images are repeated, to see whether memory and time an image grow with them
N_PRELOADED = 64  # images in memory for the pure session time


@dataclass(frozen=True)
class Given:
    """What both sides get: the file, the folder for views of the same images as YOLO and COCO, and the settings."""

    onnx_path: Path
    folder: Path
    truth: COCO
    images: list[ImageFile]
    settings: Eval


@dataclass(frozen=True)
class Amount:
    """Size of the measurement: turns, and images (at least) of our evaluator's last call; None: by COPIES."""

    n_rounds: int
    n_images: int | None

    def copies(self, n_given: int) -> tuple[int, ...]:
        """How often the `n_given` images are repeated, call by call."""
        if self.n_images is None:
            return COPIES
        return 1, max(2, math.ceil(self.n_images / n_given))


def bench_eval(run: RunRoot, overlays: list[Path], sets: list[str], onnx_path: Path | None, amount: Amount) -> None:
    """Times both evaluators in turns, each in a process of its own, then ours with the images repeated.

    Writes bench-eval.json. The val images of the run are scored with the settings eval.*; the file is the exported
    baseline of the run, or `onnx_path`, whose input size must be that of the training's.
    """
    config = load("qat", overlays, sets)
    prepare(config, run, force=False)
    given = set_up(config, run, onnx_path or exported_files(run)[str(BASELINE)].path)
    categories = ids_by_name(given.truth.dataset["categories"])
    model = open_model(given.onnx_path, given.settings.provider, categories=categories)
    recorded = run_stock(given, model, record=True)  # untimed: it warms the caches of both sides and keeps detections
    warm = run_ours(given, 1)
    explained = explain(given.truth, [image.id for image in given.images], warm["out_dir"], recorded)
    turns = take_turns(given, model, amount.n_rounds)
    n_images = len(given.images)
    repeated = {}
    for n_times in amount.copies(n_images):
        repeated[str(n_images * n_times)] = run_ours(given, n_times)
    result = {
        "file": given.onnx_path.name,
        "contract": model.contract,
        "imgsz": model.imgsz,
        "n_images": n_images,
        "provider": model.provider,
        "device": cpu_name() if model.provider == CPU else gpu_name(),
        "batch": model.batch or given.settings.batch,
        "turns": turns,
        "ours_by_images": repeated,
        **judge(turns),
        "AP": explained,
        "environment": environment(),
    }
    write_json(run.root / "bench-eval.json", result)
    show(result)


def take_turns(given: Given, model: Model, n_rounds: int) -> list[dict[str, Any]]:
    """Runs every side once a round; a round gives side -> its times."""
    turns = []
    for number in range(1, n_rounds + 1):
        ours, stock = run_ours(given, 1), run_stock(given, model, record=False)
        turns.append({OURS: ours, STOCK: stock, SESSION: time_session(given, model)})
        times = [f"{name} {side['total_s']:.2f} s" for name, side in turns[-1].items()]
        log.info("turn %d: %s", number, ", ".join(times))
    return turns


def set_up(config: Config, run: RunRoot, onnx_path: Path) -> Given:
    """Writes bench-eval/: the file with Ultralytics' metadata added, and the images in the layout of `yolo val`."""
    if not onnx_path.is_file():
        raise UserError(f"{onnx_path} is missing: give --onnx a file, or run 'make export' first")
    folder = run.root / "bench-eval"
    dataset, _ = dataset_of_run(config, run)
    truth = truth_of(dataset)
    images = image_files(truth, dataset, usable_ids(truth, dataset))
    shutil.rmtree(folder, ignore_errors=True)
    stock_dataset(run, folder)
    path = folder / onnx_path.name
    settings = config.eval.model_copy(update={"max_images": None})
    add_stock_metadata(onnx_path, path, settings)
    return Given(path, folder, truth, images, settings)


def add_stock_metadata(source: Path, target: Path, settings: Eval) -> None:
    """Adds what Ultralytics' AutoBackend asks of an ONNX file (nn/backends/base.py, 8.4.190); the graph stays."""
    model = onnx.load(source)
    facts = {entry.key: entry.value for entry in model.metadata_props}
    batch, _, side, _ = model.graph.input[0].type.tensor_type.shape.dim
    facts |= {"task": "detect", "stride": "32", "imgsz": str([side.dim_value] * 2), "channels": "3"}
    facts |= {"batch": str(batch.dim_value or settings.batch)}
    facts.setdefault("end2end", str(facts.get("contract") == "end2end"))
    onnx.helper.set_model_props(model, facts)
    onnx.save(model, target)


def repeat(given: Given, n_times: int) -> Path:
    """Makes a COCO folder with every image n times, unless it is there, and returns it.

    Images are links. With n_times=1 they keep their names and ids; else each link has a name and an id of its own.
    """
    coco_dir, split = given.folder / f"coco-{n_times}", SPLITS["val"]
    if coco_dir.exists():
        return coco_dir
    (coco_dir / split).mkdir(parents=True)
    tree: dict[str, Any] = {"categories": given.truth.dataset["categories"], "images": [], "annotations": []}
    for number, image in enumerate(given.images * n_times, 1):
        image_id, name = image.id, image.path.name
        if n_times > 1:
            image_id, name = number, f"{number:012d}{image.path.suffix}"
        make_link(coco_dir / split / name, image.path.resolve())
        tree["images"].append({**given.truth.imgs[image.id], "id": image_id, "file_name": name})
        for annotation in given.truth.imgToAnns[image.id]:
            own = {"image_id": image_id, "id": len(tree["annotations"]) + 1}
            tree["annotations"].append({**annotation, **own})
    write_json(annotation_path(coco_dir, split), tree)
    return coco_dir


def run_ours(given: Given, n_times: int) -> dict[str, Any]:
    """`python -m app eval --onnx` on the images n times: seconds, scoring included, and MiB of the process."""
    coco_dir, out_dir = repeat(given, n_times), given.folder / f"ours-{n_times}"
    settings = {**given.settings.model_dump(exclude={"max_images"}), "latency_warmup": 0, "latency_runs": 1}
    command = [sys.executable, "-m", "app", "eval", "--onnx", str(given.onnx_path), "--out", str(out_dir)]
    command += ["--coco-dir", str(coco_dir), "--runs-dir", str(given.folder.parent.parent)]
    for key, value in settings.items():
        command += ["--set", f"eval.{key}={value}"]
    measured = run_measured(command)
    metrics = read_json(out_dir / METRICS, "eval")
    seconds = metrics["time_s"]
    inside = {"total_s": seconds["total"] + seconds["score"], "session_s": seconds["session"]}
    return measured | inside | {"AP": metrics["coco"]["AP"], "out_dir": str(out_dir)}


def run_stock(given: Given, model: Model, record: bool) -> dict[str, Any]:
    """`yolo val` with the same thresholds, batch and device; `record` keeps its detections, which takes time."""
    arguments = {
        "conf": given.settings.conf, "max_det": given.settings.max_det, "imgsz": model.imgsz, "workers": 0,
        "batch": model.batch or given.settings.batch, "device": "cpu" if model.provider == CPU else "0",
    }  # fmt: skip
    facts = {
        "onnx": str(given.onnx_path), "arguments": arguments, "record": record, "n_images": len(given.images),
        "category_ids": list(model.category_ids),
    }  # fmt: skip
    write_json(given.folder / "val.json", facts)
    measured = run_measured([sys.executable, "-m", "app.bench.stock_val", str(given.folder)])
    return measured | read_json(given.folder / "val-result.json", "bench")


def run_measured(command: list[str]) -> dict[str, float]:
    """Runs a command to its end: process_s (wall, imports included) and peak_mib; a RuntimeError has its last lines."""
    start, peak_kib = time.perf_counter(), 0
    with tempfile.TemporaryFile("w+") as output:
        child = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT)
        while child.poll() is None:
            peak_kib = max(peak_kib, high_water_kib(child.pid))
            time.sleep(0.01)
        process_s = time.perf_counter() - start
        output.seek(0)
        if child.returncode:
            raise RuntimeError(f"{' '.join(command[1:5])} failed: {output.read()[-500:]}")
    return {"process_s": process_s, "peak_mib": peak_kib / 1024}


def high_water_kib(pid: int) -> int:
    """Peak resident memory of a process so far. What wait4 gives at its end is at least that of its parent."""
    try:
        status = Path(f"/proc/{pid}/status").read_text(encoding="utf-8")
    except OSError:  # it has just ended
        return 0
    for line in status.splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1])
    return 0


def time_session(given: Given, model: Model) -> dict[str, float]:
    """Seconds that the session alone takes for as many images, already decoded and in batches as in the evaluator."""
    size = model.batch or given.settings.batch
    loaded = [load_input(image, model.size).array for image in given.images[:N_PRELOADED]]
    arrays = np.stack(loaded)
    batches = []
    for first in range(0, len(arrays), size):
        indices = np.arange(first, first + size) % len(arrays)
        batches.append(arrays[indices])
    model.run(batches[0])
    start = time.perf_counter()
    for number, first in enumerate(range(0, len(given.images), size)):
        batch = batches[number % len(batches)]
        n_left = len(given.images) - first
        model.run(batch if model.batch else batch[:n_left])
    return {"total_s": time.perf_counter() - start}


def judge(turns: list[dict[str, Any]]) -> dict[str, float]:
    """Medians over the turns of our evaluator's ratios within a turn."""
    ratios: dict[str, list[float]] = {}
    for turn in turns:
        ours, stock, session = turn[OURS], turn[STOCK], turn[SESSION]
        of_turn = {
            "share_in_onnxruntime": ours["session_s"] / ours["total_s"],
            "to_pure_session": ours["total_s"] / session["total_s"],
            "to_yolo_val": ours["total_s"] / stock["total_s"],
            "process_to_yolo_val": ours["process_s"] / stock["process_s"],
        }
        for name, ratio in of_turn.items():
            ratios.setdefault(name, []).append(ratio)
    return {name: statistics.median(values) for name, values in ratios.items()}

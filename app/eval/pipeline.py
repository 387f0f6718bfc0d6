"""Images through a model: threads decode ahead, the session runs batches, detections go straight to the file."""

from __future__ import annotations

import itertools
import json
import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TextIO

import cv2
import numpy as np

from app.coco.detections import results, select
from app.coco.images import Placement, letterbox, read_image
from app.coco.score import ImageFile
from app.core.config import Eval, UserError
from app.core.progress import track
from app.eval.runtime import Model, clocks, n_decoders

BATCHES_AHEAD = 2
READ_S = 300.0  # for one image; longer means that the disk or network behind it hangs


@dataclass(frozen=True)
class Input:
    """A decoded image: float32 [3,imgsz,imgsz], where the image lies in it, and the seconds that it took."""

    image_id: int
    array: np.ndarray
    placement: Placement
    seconds: float


def detect(model: Model, images: list[ImageFile], file: TextIO, settings: Eval, title: str) -> dict[str, float]:
    """Runs the model over the images and writes COCO results, one image a line, in the order of the images.

    Threads decode a bounded number of images ahead, so memory does not grow with their number.

    Returns:
        seconds: total (wall), session (inside ONNX Runtime), wait (for decoded images), postprocess; and preprocess,
        the work of all decoding threads, which runs beside the session.
    """
    n_batch = model.batch or settings.batch
    inputs = np.zeros((n_batch, 3, model.imgsz, model.imgsz), np.float32)
    seconds = dict.fromkeys(("total", "session", "wait", "preprocess", "postprocess"), 0.0)
    cv2.setNumThreads(1)  # the threads below are enough; OpenCV's own would take cores from ONNX Runtime
    begin = asked = time.perf_counter()
    separator = "[\n"
    with ThreadPoolExecutor(n_decoders(model)) as pool:
        decoded = decode_ahead(pool, images, model.imgsz, BATCHES_AHEAD * n_batch + n_decoders(model))
        for batch in batches(track(decoded, title, len(images)), n_batch):
            for slot, one in zip(inputs, batch, strict=False):
                slot[:] = one.array
            start = time.perf_counter()
            # A fixed batch is always run whole: the rows behind the last image hold an older one and are not read.
            outputs = model.run(inputs if model.batch else inputs[: len(batch)])
            end = time.perf_counter()
            for one, output in zip(batch, outputs, strict=False):
                rows = results(one.image_id, select(output, model.contract, settings), one.placement)
                if rows:
                    file.write(separator + json.dumps(rows)[1:-1])
                    separator = ",\n"
            seconds["wait"] += start - asked
            seconds["session"] += end - start
            seconds["preprocess"] += sum(one.seconds for one in batch)
            asked = time.perf_counter()
            seconds["postprocess"] += asked - end
    file.write("[]\n" if separator == "[\n" else "\n]\n")
    return seconds | {"total": time.perf_counter() - begin}


def decode_ahead(pool: ThreadPoolExecutor, images: list[ImageFile], imgsz: int, n_ahead: int) -> Iterator[Input]:
    """Yields the decoded images in order, with at most n_ahead of them decoded or in work."""
    waiting: deque[Future[Input]] = deque()
    for image in images:
        waiting.append(pool.submit(load_input, image, imgsz))
        if len(waiting) >= n_ahead:
            yield decoded(waiting.popleft())
    while waiting:
        yield decoded(waiting.popleft())


def decoded(future: Future[Input]) -> Input:
    try:
        return future.result(READ_S)
    except TimeoutError as error:
        raise UserError(f"an image could not be read in {READ_S:.0f} s: check the disk of the dataset") from error


def batches(items: Iterator[Input], size: int) -> Iterator[list[Input]]:
    """Lists of `size` items; the last list may be shorter."""
    while batch := list(itertools.islice(items, size)):
        yield batch


def load_input(image: ImageFile, imgsz: int) -> Input:
    """Decodes and letterboxes one image.

    Raises:
        UserError: it cannot be read, or is not as large as the annotations say.
    """
    start = time.perf_counter()
    pixels = read_image(image.path)
    height, width = pixels.shape[:2]
    if (width, height) != (image.width, image.height):
        raise UserError(
            f"image {image.path} has {width} x {height} px, its annotations say {image.width} x {image.height}: "
            "its boxes would be wrong, restore the file"
        )
    array, placement = letterbox(pixels, imgsz)
    return Input(image.id, array, placement, time.perf_counter() - start)


def measure_latency(model: Model, image: ImageFile, settings: Eval) -> dict[str, Any]:
    """Times one image after another, apart from throughput: batch 1, or the file's own batch where that is fixed.

    Returns:
        batch, warmup and runs (counts); mean, p50, p90 and p99 of session.run alone (ms), and under `with_processing`
        of decoding, letterbox, session.run and the choice of detections together; clocks: right after the last run.
    """
    first = load_input(image, model.imgsz)
    inputs = np.repeat(first.array[None], model.batch or 1, axis=0)
    session_ms, whole_ms = [], []
    for _ in range(settings.latency_warmup + settings.latency_runs):
        begin = time.perf_counter()
        one = load_input(image, model.imgsz)
        inputs[0] = one.array
        start = time.perf_counter()
        output = model.run(inputs)[0]
        end = time.perf_counter()
        results(image.id, select(output, model.contract, settings), one.placement)
        whole_ms.append((time.perf_counter() - begin) * 1e3)
        session_ms.append((end - start) * 1e3)
    now = clocks(model.provider)
    counts = {"batch": len(inputs), "warmup": settings.latency_warmup, "runs": settings.latency_runs}
    n = settings.latency_warmup
    return {**counts, **percentiles(session_ms[n:]), "with_processing": percentiles(whole_ms[n:]), "clocks": now}


def percentiles(times_ms: list[float]) -> dict[str, float]:
    return {"mean": float(np.mean(times_ms))} | {f"p{q}": float(np.percentile(times_ms, q)) for q in (50, 90, 99)}

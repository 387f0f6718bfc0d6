"""Runs a model over images: threads decode ahead, the session runs batches, and detections are written at once."""

from __future__ import annotations

import contextlib
import itertools
import json
import logging
import multiprocessing
import threading
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from multiprocessing.pool import AsyncResult, ThreadPool
from typing import Any, TextIO

import cv2
import numpy as np

from app.coco.detections import results, select
from app.coco.images import InputSize, Placement, letterbox, read_image
from app.coco.score import ImageFile
from app.core.config import Eval, UserError
from app.core.environment import clocks
from app.core.progress import track
from app.eval.runtime import CPU, Model, n_decoders

BATCHES_AHEAD = 2
SMALL_PX = 2.0  # boxes of a network that puts out shares of 0 to 1 end before it
READ_S = 300.0  # timeout for one image: its disk or network hangs
LEAVE_S = 10.0  # for the images that are being decoded when the work ends early
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Input:
    """A decoded image: float32 [3,H,W], the placement of the image in it, and the seconds of the decoding."""

    image_id: int
    array: np.ndarray
    placement: Placement
    seconds: float


def detect(model: Model, images: list[ImageFile], file: TextIO, settings: Eval, title: str) -> dict[str, float]:
    """Runs the model over the images and writes COCO results, one image a line, in the order of the images.

    Threads decode a bounded number of images ahead, so memory does not grow with the number of images.

    Returns:
        seconds: total (wall), session (inside ONNX Runtime), wait (for decoded images), postprocess, and preprocess.
        The last is the sum over all decoding threads, which run in parallel with the session.
    """
    n_batch = model.batch or settings.batch
    inputs = np.zeros((n_batch, 3, *model.size), np.float32)
    seconds: dict[str, float] = dict.fromkeys(("total", "session", "wait", "preprocess", "postprocess"), 0.0)
    cv2.setNumThreads(1)  # images are decoded in parallel below; OpenCV's threads would take cores from ONNX Runtime
    begin = asked = time.perf_counter()
    separator, farthest = "[\n", 0.0
    with decoders(n_decoders(model)) as pool:
        n_ahead = BATCHES_AHEAD * n_batch + n_decoders(model)
        decoded_images = decode_ahead(pool, images, model.size, n_ahead)
        for batch in batches(track(decoded_images, title, len(images)), n_batch):
            for slot, image in zip(inputs, batch, strict=False):
                slot[:] = image.array
            start = time.perf_counter()
            # A fixed batch is always run whole; the rows after the last image hold older images and are not read.
            outputs = model.run(inputs if model.batch else inputs[: len(batch)])
            end = time.perf_counter()
            for image, output in zip(batch, outputs, strict=False):
                detections = select(output, model.contract, settings, len(model.category_ids))
                rows = results(image.image_id, detections, image.placement, model.category_ids)
                farthest = max(farthest, detections[:, :4].max(initial=0.0))
                if rows:
                    file.write(separator + json.dumps(rows)[1:-1])
                    separator = ",\n"
            seconds["wait"] += start - asked
            seconds["session"] += end - start
            seconds["preprocess"] += sum(image.seconds for image in batch)
            asked = time.perf_counter()
            seconds["postprocess"] += asked - end
    file.write("[]\n" if separator == "[\n" else "\n]\n")  # the first: no rows
    seconds["total"] = time.perf_counter() - begin
    if 0 < farthest < SMALL_PX:
        log.warning(
            "%s: no box reaches beyond %.2g px: are its boxes shares of the image instead of px?", title, farthest
        )
    return seconds


@contextlib.contextmanager
def decoders(n: int) -> Iterator[ThreadPool]:
    """Daemon threads: when a read hangs, neither this context nor the end of Python waits for its thread, as both do
    with concurrent.futures. The other threads get time for their images: OpenCV may abort a Python that ends meanwhile.
    """
    pool = ThreadPool(n)
    try:
        yield pool
    finally:
        pool.terminate()
        end = threading.Thread(target=pool.join, daemon=True)
        end.start()
        end.join(LEAVE_S)


def decode_ahead(pool: ThreadPool, images: list[ImageFile], imgsz: InputSize, n_ahead: int) -> Iterator[Input]:
    """Yields the decoded images in order; at most `n_ahead` images are decoded or being decoded."""
    waiting: deque[AsyncResult[Input]] = deque()
    for image in images:
        waiting.append(pool.apply_async(load_input, (image, imgsz)))
        if len(waiting) >= n_ahead:
            yield decoded(waiting.popleft())
    while waiting:
        yield decoded(waiting.popleft())


def decoded(result: AsyncResult[Input]) -> Input:
    try:
        return result.get(READ_S)
    except multiprocessing.TimeoutError as error:
        raise UserError(f"an image could not be read in {READ_S:.0f} s: check the disk of the dataset") from error


def batches(items: Iterator[Input], size: int) -> Iterator[list[Input]]:
    """Lists of `size` items; the last list may be shorter."""
    while batch := list(itertools.islice(items, size)):
        yield batch


def load_input(image: ImageFile, imgsz: InputSize) -> Input:
    """Decodes and letterboxes one image; raises a UserError if it is unreadable or its annotations say another size."""
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
    """Times the same image again and again: batch 1, or the file's batch if that is fixed.

    Returns:
        batch, warmup and runs (counts); mean, p50, p90 and p99 in ms of session.run alone, and under `with_processing`
        of decoding, letterbox, session.run and the choice of detections together; `clocks` right after the last run.
    """
    first = load_input(image, model.size)
    inputs = np.repeat(first.array[None], model.batch or 1, axis=0)
    session_ms, whole_ms = [], []
    n_warmup = settings.latency_warmup
    for _ in range(n_warmup + settings.latency_runs):
        begin = time.perf_counter()
        loaded = load_input(image, model.size)
        inputs[0] = loaded.array
        start = time.perf_counter()
        output = model.run(inputs)[0]
        end = time.perf_counter()
        detections = select(output, model.contract, settings, len(model.category_ids))
        results(image.id, detections, loaded.placement, model.category_ids)
        whole_ms.append((time.perf_counter() - begin) * 1e3)
        session_ms.append((end - start) * 1e3)
    return {
        "batch": len(inputs),
        "warmup": n_warmup,
        "runs": settings.latency_runs,
        **percentiles(session_ms[n_warmup:]),
        "with_processing": percentiles(whole_ms[n_warmup:]),
        "clocks": clocks(model.provider != CPU),
    }


def percentiles(times_ms: list[float]) -> dict[str, float]:
    figures = {"mean": float(np.mean(times_ms))}
    for percent in (50, 90, 99):
        figures[f"p{percent}"] = float(np.percentile(times_ms, percent))
    return figures

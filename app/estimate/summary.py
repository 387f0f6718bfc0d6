"""The content of estimate.json, and the lines for the terminal."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from app.core.config import Config
from app.core.environment import n_cores
from app.core.os_errors import free_bytes
from app.core.progress import clock
from app.core.run import RunRoot, n_bn_images
from app.estimate.cost import NOTHING, Cost
from app.estimate.estimate import Command
from app.estimate.pilot import VARIANTS, MeasuredJob
from app.estimate.price import (
    Parts,
    eval_parts,
    export_parts,
    job_files,
    limit,
    ptq_parts,
    report_parts,
    training_parts,
)
from app.train.device import BATCHES_PER_WORKER
from app.train.estimate import memory_bytes

MEMORY_SHARE = 0.92  # of a GPU or of the machine, up to which a batch may fill it
CACHED_SHARE = 0.75  # of a square that an image fills: most are as 4 to 3
FILE_BYTES = 4096  # a label file on the disk
MOST_BATCH = 2**16
N_PARTS = 3  # of a stage that a line names
GIB = 2**30


def job_parts(command: Command, measured: MeasuredJob, starts: dict[str, Cost]) -> dict[str, Parts]:
    """The cost of every stage of the job by its parts; `starts` are those of the stages' processes."""
    config, images = command.config("qat"), measured.images.images
    files = job_files(config, measured.has_packed_bits)
    parts: dict[str, Parts] = {"data": {"images": measured.images.cost}}
    for variant in VARIANTS:
        costs = measured.trainings[variant]
        own, plan = command.config(variant), measured.plan
        parts[f"train {variant}"] = training_parts(own, images, costs, plan.images.train, plan.n_processes)
    parts["ptq"] = ptq_parts(config, images, measured.trainings["fp16"], measured.after.ptq)
    parts["export"] = export_parts(config, images, measured.after, files)
    parts["eval"] = eval_parts(config, images, measured.after, files)
    parts["report"] = report_parts(images, measured.after, files)
    for stage, of_stage in parts.items():
        of_stage["start"] = of_stage.get("start", NOTHING) + starts[stage.split()[0]]
    return stretched(parts, measured.waits) if measured.waits else parts


def stretched(parts: dict[str, Parts], waits: float) -> dict[str, Parts]:
    """Seconds on the clock are those of the processor, times what the whole pilot had to wait.

    Where others use the cores, the clock of a piece of less than a second tells when its process had its turn.
    """
    by_stage = {}
    for stage, of_stage in parts.items():
        by_stage[stage] = {part: Cost(cost.cpu_s * waits, cost.cpu_s) for part, cost in of_stage.items()}
    return by_stage


def summary(
    command: Command, measured: MeasuredJob, starts: dict[str, Cost], available: int, run: RunRoot
) -> dict[str, Any]:
    """The content of estimate.json but for environment and times of the pilot.

    Args:
        available: bytes of memory before anything was measured.
        run: of the job.
    """
    config, plan, images = command.config("qat"), measured.plan, measured.images.images
    parts = job_parts(command, measured, starts)
    seconds = {stage: {part: cost.wall_s for part, cost in of.items()} for stage, of in parts.items()}
    totals = {stage: sum(of.values()) for stage, of in seconds.items()}
    whole_s = sum(totals.values())
    fp16 = parts["train fp16"]
    part, remedy = limit(config, measured.trainings["fp16"], fp16, n_cores())
    facts = {
        "hours": {stage: total / 3600 for stage, total in totals.items()} | {"whole job": whole_s / 3600},
        "seconds": seconds,
        "cpu_seconds": {stage: {part: cost.cpu_s for part, cost in of.items()} for stage, of in parts.items()},
        "done_at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(time.time() + whole_s)),
        "ram": ram(config, measured, available),
        "disk": disk(config, measured, run),
        "limit": {"part": part, "set": remedy},
        "computed": computed(config, measured),
        "pilot": {"batch": plan.batch, "imgsz": plan.imgsz, "n_train": plan.images.train, "n_val": plan.images.val},
        "images": {"train": images.train, "val": images.val},
        "config": config.model_dump(mode="json"),
    }
    if measured.gpu_total_bytes:
        facts["gpu"] = gpu(config, measured)
    return facts


def computed(config: Config, measured: MeasuredJob) -> list[str]:
    """What was not measured at the job's size, and what it was computed from."""
    plan, train = measured.plan, config.train
    lines = [measured.images.scaled] if measured.images.scaled else []
    if plan.imgsz < train.imgsz:
        lines.append(
            f"all networks: from images of {plan.imgsz} px, by the pixels beyond what a batch costs at any size"
        )
    if plan.batch * plan.n_processes < train.batch:
        halves = f" and {max(plan.batch // 2, 1)}" if measured.probe else ""
        lines.append(f"a step of {train.batch} images: from batches of {plan.batch}{halves}")
    if plan.images.val < measured.images.images.val:
        lines.append(f"validation, eval and report: from {plan.images.val} val images, by their number")
    of_what = "what a network keeps of one image" if measured.probe else f"the memory of one batch of {plan.batch}"
    lines.append(f"the largest batch: from {of_what}")
    kinds = sum(len(set(labels)) for labels in job_files(config, measured.has_packed_bits).values())
    lines.append(f"export: {len(measured.after.files)} of {kinds} files measured; the others cost what their like do")
    if len(measured.after.scores) < len(measured.after.files):
        lines.append(f"eval: {len(measured.after.scores)} files, the repacked as the traced ones")
    if measured.waits:
        lines.append(f"seconds: from those of the processor, times {measured.waits:.1f}: others use this machine too")
    if plan.n_processes > 1:
        lines.append(f"{plan.n_processes} GPUs: from one, without the exchange of gradients")
    return lines


# --- memory and disk -------------------------------------------------------------------------------------------------


def ram(config: Config, measured: MeasuredJob, available: int) -> dict[str, Any]:
    """Without a GPU from the activations of one image; with one from the processes of the pilot, of one GPU."""
    train, images, probe, plan = config.train, measured.images.images, measured.probe, measured.plan
    n, n_seen = plan.n_processes, min(plan.n_bn_batches * plan.batch, plan.images.train)

    def bytes_at(batch: int) -> float:
        at_batch = config.model_copy(update={"train": train.model_copy(update={"batch": batch})})
        if probe:
            return measured.process_bytes + memory_bytes(at_batch, probe, images)
        more_ahead = (-(-batch // n) - plan.batch) * train.workers * BATCHES_PER_WORKER
        more_bn = n_bn_images(at_batch, images) / n - n_seen  # the first process has those of all
        return n * (measured.process_bytes + (more_ahead + more_bn) * 3 * train.imgsz**2)

    cache_gib = n * images.train * 3 * train.imgsz**2 * CACHED_SHARE / GIB
    return memory(bytes_at, train.batch, available) | {"train_cache_gib": cache_gib}


def gpu(config: Config, measured: MeasuredJob) -> dict[str, Any]:
    """From the larger of the two trainings' peaks."""
    peak, before = max(costs.gpu_bytes for costs in measured.trainings.values() if costs.gpu_bytes)
    per_image = (peak - before) / measured.plan.batch
    n = measured.plan.n_processes
    facts = memory(lambda batch: before + -(-batch // n) * per_image, config.train.batch, measured.gpu_total_bytes)
    return facts


def memory(bytes_at: Callable[[int], float], batch: int, total: float) -> dict[str, Any]:
    return {
        "peak_gib": bytes_at(batch) / GIB,
        "available_gib": total / GIB,
        "largest_batch": largest_batch(bytes_at, total * MEMORY_SHARE),
    }


def largest_batch(bytes_at: Callable[[int], float], most_bytes: float) -> int:
    """The largest batch, up to MOST_BATCH, that takes no more bytes; 0: none."""
    fits, too_large = 0, MOST_BATCH + 1
    while too_large - fits > 1:
        middle = (fits + too_large) // 2
        if bytes_at(middle) <= most_bytes:
            fits = middle
        else:
            too_large = middle
    return fits


def disk(config: Config, measured: MeasuredJob, run: RunRoot) -> dict[str, float]:
    """What the run leaves behind, and what is free; detections grow with val images and files, labels with images."""
    sizes, images = measured.sizes, measured.images.images
    detections = [size for name, size in sizes.items() if name.endswith("detections.json")]
    files = job_files(config, measured.has_packed_bits)
    n_files = sum(map(len, files.values()))
    per_image = sum(detections) / max(len(detections), 1) / measured.plan.images.val
    onnx = [size for name, size in sizes.items() if name.startswith("onnx/")]
    others = sum(sizes.values()) - sum(detections) + sum(onnx) * (n_files / max(len(onnx) / 2, 1) - 1)
    labels = (images.train + images.val) * FILE_BYTES
    n_kept = config.train.epochs // config.train.save_period if config.train.save_period else 0
    kept = n_kept * sum(size for name, size in sizes.items() if name.endswith("/last.pt"))
    needed = others + per_image * images.val * n_files + labels + kept
    return {"needed_gib": needed / GIB, "free_gib": free_bytes(run.root) / GIB}


# --- the terminal ----------------------------------------------------------------------------------------------------


def shown(facts: dict[str, Any]) -> list[str]:
    """Lines for the terminal, of at most 100 columns but for the advice."""
    lines = [row("stage", "takes", "most of it")]
    for stage, parts in facts["seconds"].items():
        largest = sorted(((value, part) for part, value in parts.items() if value >= 1), reverse=True)[:N_PARTS]
        of_what = ", ".join(f"{part} {clock(value)}" for value, part in largest)
        lines.append(row(stage, clock(sum(parts.values())), of_what))
    whole = clock(facts["hours"]["whole job"] * 3600)
    lines.append(row("whole job", whole, f"started now, it would be done at {facts['done_at']}"))
    for name, title in (("ram", "memory"), ("gpu", "GPU memory")):
        if of := facts.get(name):
            peak, there = of["peak_gib"], of["available_gib"]
            fits = f"the largest batch that fits is {of['largest_batch']:,}"
            lines.append(f"{title}: {peak:.1f} of {there:.1f} GiB at batch {facts['config']['train']['batch']}; {fits}")
    lines.append(f"train.cache=true takes {facts['ram']['train_cache_gib']:.1f} GiB of memory more")
    needed, free = facts["disk"]["needed_gib"], facts["disk"]["free_gib"]
    lines.append(f"disk: {needed:.1f} GiB needed, {free:.0f} GiB free" + (": make room" if needed > free else ""))
    lines.append(f"limited by: {facts['limit']['part']}; to set: {facts['limit']['set']}")
    return [*lines, *(f"computed: {line}" for line in facts["computed"])]


def row(stage: str, takes: str, of_it: str) -> str:
    return f"{stage:<10}  {takes:>10}  {of_it}"

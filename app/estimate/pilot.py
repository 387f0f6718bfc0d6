"""The pilot: all pieces of the job, measured one after the other within the time that there is."""

from __future__ import annotations

import gc
import logging
import shutil
from dataclasses import dataclass, replace

import torch

from app.core.config import Config
from app.core.files import read_json
from app.core.labels import Label
from app.core.memory import own_memory
from app.core.progress import clock
from app.core.run import RunRoot
from app.data.prepare import prepare
from app.estimate.cost import Budget
from app.estimate.estimate import Command
from app.estimate.files import measure_eval, measure_export, measure_ptq, measure_report
from app.estimate.images import JobImages, job_images
from app.estimate.pieces import AfterCosts, TrainingCosts
from app.estimate.plan import PROBE_PX, SAMPLE, SAMPLE_GPU, Plan, plan_for_cpu, plan_for_gpu
from app.estimate.training import measure_training
from app.export.done import has_packed_bits
from app.train.device import check_devices
from app.train.estimate import Measured, measure

# Shares of the time. What has the last ones, as the report, takes what it takes.
TRAINING_SHARE, EXPORT_SHARE, EVAL_SHARE = 0.2, 0.2, 0.1
VARIANTS = ("fp16", "qat")
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Places:
    """Run roots: for the job's images, for a sample of them, and for the pilot."""

    whole: RunRoot
    sampled: RunRoot
    pilot: RunRoot


@dataclass(frozen=True)
class MeasuredJob:
    """What the pilot has found.

    Attributes:
        probe: of a step without a GPU; None with one.
        trainings: by variant.
        has_packed_bits: whether the scheme has layers whose codes an INT4 file packs.
        process_bytes: of memory; without a GPU, of this process before it builds a network; with one, of one process
            of a training and its loader processes, at the plan's batch.
        gpu_total_bytes: of the GPU; 0 without one.
        sizes: bytes of the pilot's files, by name in its run root.
        waits: see Budget.waits.
    """

    images: JobImages
    plan: Plan
    probe: Measured | None
    trainings: dict[str, TrainingCosts]
    after: AfterCosts
    has_packed_bits: bool
    process_bytes: int
    gpu_total_bytes: int
    sizes: dict[str, int]
    waits: float | None


def measure_job(command: Command, places: Places, budget: Budget) -> MeasuredJob:
    """Measures every part of the job.

    Raises:
        UserError: the job would end with it too.
    """
    config = command.config("qat")
    devices = check_devices(config)
    say("the images", budget)
    on_gpu = devices != ["cpu"]
    budget.stretch = 1.0 if on_gpu else budget.stretch  # a process that waits for its GPU is kept waiting by nobody
    images = job_images(config, places.whole, places.sampled, SAMPLE_GPU if on_gpu else SAMPLE)
    try:
        if on_gpu:
            return measure_plan(command, places.pilot, images, plan_for_gpu(config, images.there, len(devices)), budget)
        before, _ = own_memory()
        say("a step of one image", budget)
        probe = measure(command.config("fp16"), PROBE_PX)
        px_s = min(probe.step_s, probe.step_cpu_s) / config.train.imgsz**2
        plan = plan_for_cpu(config, images.there, px_s, TRAINING_SHARE * budget.seconds)
        measured = measure_plan(command, places.pilot, images, plan, budget)
        return replace(measured, probe=probe, process_bytes=before)
    finally:
        if images.sets:
            shutil.rmtree(read_json(places.sampled.provenance, "data")["view_dir"], ignore_errors=True)


def say(what: str, budget: Budget) -> None:
    log.info("estimate: %s (%s of about %s)", what, clock(budget.passed.wall_s), clock(budget.seconds))


def measure_plan(command: Command, run: RunRoot, images: JobImages, plan: Plan, budget: Budget) -> MeasuredJob:
    """Measures the pilot of a plan; with half its batch, and half of that, where the GPU has no room for it."""
    device = check_devices(command.config("qat"))[0]
    trainings = None
    while trainings is None:
        configs = {variant: command.config(variant, *images.sets, *plan.sets()) for variant in VARIANTS}
        try:
            trainings = measure_trainings(configs, run, device, budget)
        except torch.OutOfMemoryError:  # keeps the network on the GPU as long as it is handled: not measured in here
            if plan.batch == 1:
                raise
            log.info("estimate: batch %d does not fit into the GPU's memory, half of it is measured", plan.batch)
            plan = replace(plan, batch=plan.batch // 2)
    total = torch.cuda.get_device_properties(int(device)).total_memory if device != "cpu" else 0
    process_bytes = max(costs.process_bytes for costs in trainings.values())
    after = measure_after(configs["qat"], run, trainings["fp16"], plan, budget)
    packed = has_packed_bits(run, Label.parse(configs["qat"].label))
    sizes = {str(path.relative_to(run.root)): path.stat().st_size for path in run.root.rglob("*") if path.is_file()}
    return MeasuredJob(images, plan, None, trainings, after, packed, process_bytes, total, sizes, budget.waits)


def measure_trainings(
    configs: dict[str, Config], run: RunRoot, device: str, budget: Budget
) -> dict[str, TrainingCosts]:
    """By variant, as the configs are."""
    trainings = {}
    for variant, config in configs.items():
        say(f"training {variant}, batch {config.train.batch}, {config.train.imgsz} px", budget)
        prepare(config, run, force=False)
        trainings[variant] = measure_training(config, run, device, budget.share(TRAINING_SHARE))
    return trainings


def measure_after(config: Config, run: RunRoot, costs: TrainingCosts, plan: Plan, budget: Budget) -> AfterCosts:
    """The stages after the trainings; `costs` are those of the FP16 training."""
    gc.collect()
    gc.freeze()  # in a process of its own, a stage has nothing of the trainings to look through
    say("ptq", budget)
    fixed = measure_ptq(config, run, costs, plan.n_bn_batches)
    say("export", budget)
    checkpoints, files = measure_export(config, run, budget.share(EXPORT_SHARE), plan.exports_as_job)
    say("eval", budget)
    scores = measure_eval(config, run, budget.share(EVAL_SHARE))
    say("report", budget)
    return AfterCosts(fixed, checkpoints, files, scores, *measure_report(config, run))

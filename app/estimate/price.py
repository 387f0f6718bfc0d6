"""From what the pieces cost to what the job costs: the arithmetic alone.

A training:  start + epochs * (n_train * sample + n_batches * step + n_steps * optimizer + checkpoint)
             + n_validations * (copies + n_val * (decode + image) + n_bn * reestimation) + n_bn * sample
             with loader processes an epoch takes as long as the slower of samples and steps, and so does validation
PTQ:         start + n_bn * (sample + reestimation)
Export:      checkpoints * (read + images * forward) + files * (written + images * gates)
Eval:        start + files * (opened + n_val * image + (warm-up + runs) * latency)
Report:      figures + files * n_val * analysis

A step of a batch and all that a network computes are lines of the pixels of their images: fixed + pixels * each. n_bn:
images that BatchNorm is re-estimated on, train.bn_batches batches or all.
"""

from __future__ import annotations

from collections.abc import Mapping

from app.core.config import Config
from app.core.labels import FP16, Label
from app.core.results import STATES
from app.core.run import Images, n_bn_images
from app.estimate.cost import NOTHING, Cost, beside
from app.estimate.pieces import AfterCosts, Kind, TrainingCosts, kind_of
from app.export.done import N_PARITY_IMAGES, labels_of_files
from app.train.done import ptq_labels

Parts = dict[str, Cost]  # of a stage


def training_parts(config: Config, images: Images, costs: TrainingCosts, n_seen: int, n_processes: int = 1) -> Parts:
    """See the formula above.

    Args:
        config, images: of the job; costs: of one process; n_seen: train images of the pilot.
        n_processes: of the training; the first one validates alone.
    """
    train = config.train
    image_px = train.imgsz**2
    n_validations = -(-train.epochs // train.val_every)
    n_bn = n_bn_images(config, images)
    in_process = costs.decode + costs.augment
    n_passes = min(train.epochs, 1) if train.cache else train.epochs  # in which images are decoded
    samples = images.train * (n_passes * costs.decode + train.epochs * costs.augment)
    steps = train.epochs * steps_of_epoch(config, images, costs, n_processes)
    if costs.loader:
        steps = beside(steps, train.epochs * images.train / n_processes * costs.loader)
        samples, in_process = NOTHING, costs.loader
    reestimated = n_batches(n_bn, train.batch) * costs.reestimate.fixed + n_bn * image_px * costs.reestimate.each
    return {
        "start": costs.start + max(images.train - n_seen, 0) * costs.labels + costs.end,
        "samples": samples,
        "steps": steps,
        "validation": n_validations * (costs.validation + scored_once(config, images, costs, n_processes)),
        "BatchNorm": n_validations * reestimated + n_bn * in_process,
        "checkpoints": train.epochs * costs.checkpoint,
    }


def scored_once(config: Config, images: Images, costs: TrainingCosts, n_processes: int) -> Cost:
    """The val images through three states. Loader processes read them beside that, unless they are one batch."""
    n_in_batches = n_batches(images.val, n_batches(2 * config.train.batch, n_processes))
    computed = images.val * config.train.imgsz**2 * costs.val_px + len(STATES) * n_in_batches * costs.reestimate.fixed
    if costs.loader is None or n_in_batches == 1:
        return computed + images.val * costs.decode
    share = costs.decode.wall_s / (costs.decode + costs.augment).wall_s  # of a sample that is reading
    return beside(computed, images.val * share * costs.loader)


def steps_of_epoch(config: Config, images: Images, costs: TrainingCosts, n_processes: int) -> Cost:
    """Forward, loss, backward and optimizer, of one process."""
    train = config.train
    of_batches = n_batches(images.train, train.batch)
    n_steps = n_batches(of_batches, max(round(config.hyp.nbs / train.batch), 1))
    own_px = images.train / n_processes * train.imgsz**2
    return of_batches * costs.step.fixed + own_px * costs.step.each + n_steps * costs.optimizer


def n_batches(n_images: int, size: int) -> int:
    return -(-n_images // size)


def ptq_parts(config: Config, images: Images, costs: TrainingCosts, fixed: Cost) -> Parts:
    """`fixed`: without the images of BatchNorm; `costs`: of the FP16 training."""
    train, n_bn = config.train, n_bn_images(config, images)
    sample = costs.loader or costs.decode + costs.augment
    passes = n_batches(n_bn, train.batch) * costs.reestimate.fixed + n_bn * train.imgsz**2 * costs.reestimate.each
    return {"start": fixed, "BatchNorm": n_bn * sample + passes}


def job_files(config: Config, has_packed_bits: bool) -> dict[Label, list[Label]]:
    """Labels of the ONNX files that the job makes, by checkpoint."""
    if config.quant is None:
        return {}
    qat = Label("qat", config.quant.scheme.name)
    checkpoints = [FP16, qat, *ptq_labels(config.quant)]
    return {checkpoint: labels_of_files(checkpoint, config.export, has_packed_bits) for checkpoint in checkpoints}


def export_parts(config: Config, images: Images, costs: AfterCosts, files: dict[Label, list[Label]]) -> Parts:
    """A kind of file that was not measured costs what the traced one of its checkpoint does."""
    px = min(N_PARITY_IMAGES, images.val) * config.train.imgsz**2
    read = written = compared = NOTHING
    for checkpoint, labels in files.items():
        of_checkpoint = costs.checkpoints[checkpoint.is_quantized]
        read += of_checkpoint.read + of_checkpoint.truth.at(px)
        for label in labels:
            of_file = costs.files[known(kind_of(label), costs.files)]
            written += of_file.write
            compared += of_file.gates.at(px)
    return {"PyTorch": read, "files": written, "gates": compared}


def known(kind: Kind, measured: Mapping[Kind, object]) -> Kind:
    return kind if kind in measured else (kind[0], False)


def eval_parts(config: Config, images: Images, costs: AfterCosts, files: dict[Label, list[Label]]) -> Parts:
    n_val = min(config.eval.max_images or images.val, images.val)
    n_runs, px = config.eval.latency_warmup + config.eval.latency_runs, config.train.imgsz**2
    start = scored = latency = NOTHING
    for labels in files.values():
        for label in labels:
            of_file = costs.scores[known(kind_of(label), costs.scores)]
            start += of_file.start
            scored += n_val * (of_file.image + px * of_file.image_px)
            latency += n_runs * (of_file.run + px * of_file.run_px)
    return {"start": start, "images": scored, "latency": latency}


def report_parts(images: Images, costs: AfterCosts, files: dict[Label, list[Label]]) -> Parts:
    n_files = sum(map(len, files.values()))
    return {"figures": costs.report, "analysis": n_files * images.val * costs.analysis}


def limit(config: Config, costs: TrainingCosts, parts: Parts, n_cores: int) -> tuple[str, str]:
    """What a training waits for, and what to set; of several processes, one of them."""
    train = config.train
    if costs.loader is None:
        if parts["samples"].wall_s > parts["steps"].wall_s:
            return "reading and augmenting images", "train.cache=true if the images fit into memory; smaller images"
        return "processor", "a GPU, or fewer images, epochs or px (data.n_train, train.epochs, train.imgsz)"
    loaded_s = train.batch * costs.loader.wall_s
    step_s = (costs.step.at(train.batch * train.imgsz**2) + costs.optimizer).wall_s
    if step_s >= loaded_s:
        return "GPU", "nothing here: it is busy; more GPUs shorten the job (GPUS=n)"
    more = f"train.workers higher ({train.workers} of {n_cores} cores)" if train.workers < n_cores else "more cores"
    return "loader or disk", f"{more}; train.cache=true if the images fit into memory; a faster disk"

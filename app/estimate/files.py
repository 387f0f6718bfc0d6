"""What the stages after the trainings cost: PTQ, export, eval and report of the pilot's checkpoints, file by file."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from app.coco.detail import analyse
from app.core.config import Config, UserError
from app.core.files import read_json
from app.core.labels import FP16, Label
from app.core.run import RunRoot
from app.data.prepare import prepared
from app.estimate.cost import NOTHING, BudgetShare, Cost, Line, Stopwatch, line
from app.estimate.pieces import (
    CheckpointCosts,
    FileCosts,
    Kind,
    ScoreCosts,
    TrainingCosts,
    kind_of,
)
from app.eval.evaluate import dataset_of_run, evaluate_file
from app.export.done import N_PARITY_IMAGES, has_packed_bits, labels_of_files
from app.export.export import Trained, check, file_path, load_trained, write_file
from app.export.gates import Truth
from app.export.trace import torch_truth
from app.report.evidence import gather
from app.report.groups import distinct, measured_alike
from app.report.report import report, scored_dataset
from app.train.ptq import ptq

WATCH = Stopwatch()
FEW_IMAGES = 2  # for which a file is compared with PyTorch, where their number is scaled
NO_LINE = Line(NOTHING, NOTHING)  # nothing of a cost is apart from it


def measure_ptq(config: Config, run: RunRoot, costs: TrainingCosts, n_bn_batches: int) -> Cost:
    """PTQ without the images of BatchNorm and their pass through the network; it leaves its checkpoints."""
    whole = WATCH.cost(lambda: ptq(config, run, force=False))
    train = config.train
    in_batch = train.batch * costs.draw + costs.reestimate.at(train.batch * train.imgsz**2)
    return whole - n_bn_batches * in_batch


def measure_export(
    config: Config, run: RunRoot, share: BudgetShare, is_job_size: bool
) -> tuple[dict[bool, CheckpointCosts], dict[Kind, FileCosts]]:
    """Exports both trainings' files of the first contract; repacked ones as long as there is time.

    `is_job_size`: the images of the comparison with PyTorch are as many and as large as the job's.
    """
    prepared(run)
    checkpoints, files = {}, {}
    settings = config.export.model_copy(update={"contracts": config.export.contracts[:1]})
    for checkpoint in (FP16, Label.parse(config.label)):
        trained, checkpoints[checkpoint.is_quantized] = read(run, checkpoint, is_job_size)
        for label in labels_of_files(checkpoint, settings, has_packed_bits(run, checkpoint)):
            if label.packing and share.left_s <= 0:
                continue
            whole = WATCH.cost(lambda made=(trained, label): write_file(config.export, run, *made))
            files[kind_of(label)] = FileCosts(whole, NO_LINE) if is_job_size else split(whole, run, trained, label)
    return checkpoints, files


def read(run: RunRoot, checkpoint: Label, is_job_size: bool) -> tuple[Trained, CheckpointCosts]:
    n_images = N_PARITY_IMAGES if is_job_size else FEW_IMAGES
    whole, trained = WATCH.timed(lambda: load_trained(run, checkpoint, n_images))
    images = trained.truth.images
    if is_job_size:
        return trained, CheckpointCosts(whole, NO_LINE)
    of_one = WATCH.cost(lambda: torch_truth(trained.model, images[:1]))
    of_all = WATCH.cost(lambda: torch_truth(trained.model, images))
    return trained, CheckpointCosts(whole - of_all, line((px_of(images[:1]), of_one), (px_of(images), of_all)))


def split(whole: Cost, run: RunRoot, trained: Trained, label: Label) -> FileCosts:
    """A file without its gates; these by the pixels of their images, measured again with one of them and with all."""
    path, truth = file_path(run, trained, label), trained.truth
    one: Truth = replace(truth, images=truth.images[:1], raw=truth.raw[:1])
    of_one = WATCH.cost(lambda: check(path, run, replace(trained, truth=one), label))
    of_all = WATCH.cost(lambda: check(path, run, trained, label))
    return FileCosts(whole - of_all, line((px_of(one.images), of_one), (px_of(truth.images), of_all)))


def px_of(images: Any) -> int:
    """Pixels of images [N,3,H,W]."""
    return len(images) * images.shape[2] * images.shape[3]


def measure_eval(config: Config, run: RunRoot, share: BudgetShare) -> dict[Kind, ScoreCosts]:
    """Scores the pilot's files, traced ones first, the others as long as there is time."""
    dataset, _ = dataset_of_run(config, run)
    scores: dict[Kind, ScoreCosts] = {}
    for label in sorted(map(Label.parse, exported(run)), key=lambda label: bool(label.packing)):
        if label.packing and share.left_s <= 0:
            continue
        path, out_dir = run.onnx_dir / label.file_name(config.model_name), run.root / label.scores_dir
        whole, metrics = WATCH.timed(lambda path=path, out=out_dir: evaluate_file(path, dataset, out, config.eval))
        scores[kind_of(label)] = score_costs(whole, metrics, config.train.imgsz**2)
    return scores


def exported(run: RunRoot) -> list[str]:
    return [read_json(path, "export")["label"] for path in sorted(run.onnx_dir.glob("*.json"))]


def score_costs(whole: Cost, metrics: dict[str, Any], px: int) -> ScoreCosts:
    """From a metrics.json, whose seconds are those of the clock; the processor's are shared out as those are."""
    time_s, latency = metrics["time_s"], metrics["latency_ms"]
    n_images, n_runs = metrics["dataset"]["n_images"], latency["warmup"] + latency["runs"]
    run_s, session_s = latency["with_processing"]["p50"] / 1e3, latency["p50"] / 1e3
    images_s = time_s["total"] + time_s["score"]
    cores = whole.cpu_s / whole.wall_s

    def cost(wall_s: float) -> Cost:
        return Cost(max(wall_s, 0.0), max(wall_s, 0.0) * cores)

    return ScoreCosts(
        start=cost(whole.wall_s - images_s - n_runs * run_s),
        image_px=cost(time_s["session"] / n_images / px),
        image=cost((images_s - time_s["session"]) / n_images),
        run_px=cost(session_s / px),
        run=cost(run_s - session_s),
    )


def measure_report(config: Config, run: RunRoot) -> tuple[Cost, Cost]:
    """The report without its analysis, and the analysis of an image of a file."""
    whole = WATCH.cost(lambda: report(config, run))
    evidence = gather(run)
    group = distinct(measured_alike(evidence.scored)[0])
    try:
        dataset = scored_dataset(evidence, group[0])
        analysis = WATCH.cost(lambda: analyse(dataset, group))
    except UserError:
        return whole, NOTHING
    n_images = group[0]["dataset"]["n_images"]
    return whole - analysis, analysis / (n_images * len(group))

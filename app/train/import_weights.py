"""The import-weights stage: a trained network from anywhere becomes the FP16 baseline of a run, without training."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path

from ultralytics.nn.tasks import DetectionModel

from app.core.config import Config, UserError
from app.core.environment import environment, utc_now
from app.core.files import sha256, write_json
from app.core.labels import FP16
from app.core.run import RunRoot, record_stage
from app.core.start import Start, of_file
from app.data.prepare import prepare, prepared
from app.quant.model import IMPORTED_EPOCH, cpu_state_dict, save_checkpoint
from app.quant.start import read_start
from app.quant.weights import Weights, architecture_of, fit, other_network
from app.train.done import OTHER_RUN, imported_into

log = logging.getLogger(__name__)


def import_weights(config: Config, run: RunRoot, path: Path, force: bool) -> None:
    """Writes runs/<name>/fp16 with the weights of a checkpoint, for ptq, export, eval and report.

    The file says which YOLOv10 it is and which classes it has; `config` gives everything else, the input size too.
    BatchNorm is re-estimated for PTQ on train images without mosaic: published trainings end without it.

    Raises:
        UserError: the file cannot be used, or the run has another baseline and `force` is not set.
    """
    start = of_file(path)
    if not force and is_imported(run, start):
        return
    weights = read_start(start)
    if weights.is_quantized:
        raise UserError(f"{path} was trained or made with quantized weights: import a float network")
    model = architecture_of(weights)
    if model is None:
        raise UserError(f"{path} holds {other_network(weights, config.model)}")
    prepare(config, run, force=False, says_done=False)
    names = names_for(weights, prepared(run)["names"])
    network = DetectionModel(model, ch=3, nc=len(names), verbose=False)
    network.names = dict(enumerate(names))
    fit(network, weights, model)
    config = as_imported(config, model, start)
    tell(config, weights, names)
    write(config, run, network, force)


def is_imported(run: RunRoot, start: Start) -> bool:
    """Whether the run's baseline is this checkpoint already; logs that it is.

    Raises:
        UserError: it is another one, or a training.
    """
    folder = run.variant_dir(FP16)
    if not folder.exists():
        return False
    imported = imported_into(run, FP16)
    if imported is None and (run.done(FP16).exists() or any((folder / "weights").glob("last*.pt"))):
        raise UserError(f"{folder} holds a training: {OTHER_RUN}")
    if imported and imported["sha256"] != start.sha256:
        raise UserError(f"{folder} holds the weights of another file ({imported['file']}): {OTHER_RUN}")
    if imported:
        log.info("import-weights: done already (%s)", run.best(FP16))
    return imported is not None


def names_for(weights: Weights, of_dataset: list[str]) -> list[str]:
    """The classes of the network: as the file names them, or else those of the dataset.

    Raises:
        UserError: the file names none, or too few, and the dataset has another number.
    """
    n_classes = weights.n_classes
    if weights.names and len(weights.names) == n_classes:
        return weights.names
    if n_classes != len(of_dataset):
        raise UserError(
            f"{weights.start.path} has {n_classes} classes without names and the dataset {len(of_dataset)}: score it "
            f"on its own dataset, or fine-tune it with --set train.weights={weights.start.path}"
        )
    return of_dataset


def as_imported(config: Config, model: str, start: Start) -> Config:
    """The configuration as the checkpoint gets it: the network of the file, and no mosaic."""
    train = config.train.model_copy(update={"weights": start})
    hyp = config.hyp.model_copy(update={"mosaic": 0.0, "close_mosaic": 0})
    return config.model_copy(update={"model": model, "train": train, "hyp": hyp})


def tell(config: Config, weights: Weights, names: list[str]) -> None:
    """Logs what was found, and an input size that is not that of the file's training."""
    log.info("import-weights: %s %s, %d classes", config.model_name, weights.start, len(names))
    imgsz = config.train.imgsz
    if weights.imgsz not in (None, imgsz):
        log.warning(
            "import-weights: it was trained at %d px and will be scored at %d: ARGS=\"--set train.imgsz=%d --force\" "
            "imports it for its own size", weights.imgsz, imgsz, weights.imgsz
        )  # fmt: skip


def write(config: Config, run: RunRoot, network: DetectionModel, force: bool) -> None:
    folder, start = run.variant_dir(FP16), config.train.weights
    if force and folder.exists():
        shutil.rmtree(folder)
    names = list(network.names.values())
    write_json(folder / "env.json", environment())
    entries = {"scored": cpu_state_dict(network), "epoch": IMPORTED_EPOCH, "names": names}
    save_checkpoint(run.best(FP16), config, entries)
    done = {"imported": start.facts if start else {}, "model": config.model_name, "n_classes": len(names)}
    done |= {"imgsz": config.train.imgsz, "best_sha256": sha256(run.best(FP16))}
    write_json(run.done(FP16), {**done, "time_utc": utc_now()})
    record_stage(run, "import-weights", {"start": str(start), **done})
    log.info("import-weights: %s, for 'make ptq', 'make export' and 'make eval'", run.best(FP16))

"""PTQ: the trained FP16 baseline, quantized without training, so that the report shows what QAT buys over it."""

from __future__ import annotations

import logging
from typing import Any, cast

import torch
from ultralytics.cfg import get_cfg
from ultralytics.data.utils import check_det_dataset
from ultralytics.nn.tasks import DetectionModel

from app.core.config import Config, Quant, UserError
from app.core.files import read_json, sha256, write_json
from app.core.run import RunRoot
from app.export.export import file_name, file_settings, is_done, load_trained, write_file, write_overview
from app.quant.batchnorm import reestimate_batchnorm
from app.quant.health import signal_to_noise
from app.quant.model import load_scored, save_checkpoint, scored_state
from app.quant.schemes import quantize
from app.train.bn_images import BnImages
from app.train.device import check_devices
from app.train.loader import CocoDataset

log = logging.getLogger(__name__)
KIND = ("qcdq", "raw")  # precision and contract of the files


def ptq(config: Config, run: RunRoot, force: bool) -> None:
    """Quantizes runs/<name>/fp16 with the abs-max quantizers of quant.scheme: once as it is (label ptq-<scheme>), once
    with BatchNorm re-estimated afterwards (ptq-<scheme>-bn). Writes <label>/weights/best.pt, its quant_config.json and
    health.json, and onnx/...ptq[-bn].onnx.

    Raises:
        UserError: no trained FP16 baseline, or files of another checkpoint or other settings without `force`.
        RuntimeError: a gate of the export failed; the file was not written.
    """
    if config.quant is None:
        raise UserError("ptq takes the scheme from quant.scheme: give it the configuration of a qat variant")
    source_path = run.best("fp16")
    model, trained, checkpoint = load_scored(source_path)
    quant = Quant(scheme=config.quant.scheme, fast_path=False)
    quant_config = quantize(model, quant)
    wanted = {"source_sha256": sha256(source_path), "export": file_settings(config.export)}
    quantized = trained.model_copy(update={"variant": "qat", "quant": quant})
    for ending in ("", "-bn"):
        label = f"ptq-{quant.scheme}{ending}"
        onnx_path = run.onnx_dir / file_name(label, quantized, KIND)
        if not force and is_done(onnx_path, wanted):
            log.info("ptq %s: done already (%s)", label, onnx_path)
            continue
        if ending:
            machine = trained.train.model_copy(update={"device": config.train.device, "workers": config.train.workers})
            reestimate(model, trained.model_copy(update={"train": machine}), run, checkpoint["epoch"])
        write_json(run.variant_dir(label) / "quant_config.json", quant_config)
        health = {"epoch": checkpoint["epoch"] + 1, "snr_db": signal_to_noise(model)}
        write_json(run.variant_dir(label) / "health.json", health)
        entries = {"scored": scored_state(model), "epoch": checkpoint["epoch"], "source_sha256": sha256(source_path)}
        save_checkpoint(run.best(label), quantized, entries)
        write_file(config.export, run, load_trained(run, label), KIND)
    write_overview(run)


def reestimate(model: DetectionModel, config: Config, run: RunRoot, epoch: int) -> None:
    """Replaces BatchNorm's statistics by those over the train batches that the baseline's own came from after `epoch`
    (from 0)."""
    device = check_devices(config)[0]
    place = torch.device("cpu" if device == "cpu" else f"cuda:{device}")
    workers = 0 if device == "cpu" else config.train.workers  # as the trainer has it
    batches = bn_images(config, run, workers).after(epoch)
    with torch.no_grad():
        n_batches = reestimate_batchnorm(model.to(place), (images.to(place) / 255 for images in batches))
    log.info("ptq: BatchNorm re-estimated on %d train batches", n_batches)
    model.to("cpu")


def bn_images(config: Config, run: RunRoot, workers: int) -> BnImages:
    """The images that a training of `config` on the run's data re-estimates BatchNorm on."""
    t, data = config.train, check_det_dataset(str(run.dataset_yaml))
    hyp = cast(Any, get_cfg(overrides={**config.hyp.model_dump(), "workers": workers}))
    provenance = read_json(run.provenance, "data")
    dataset = CocoDataset("train", data, provenance, t.seed, imgsz=t.imgsz, batch_size=t.batch, hyp=hyp, cache=None)
    return BnImages(dataset, hyp, config)

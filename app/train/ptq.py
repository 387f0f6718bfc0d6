"""The ptq stage: the trained FP16 baseline, quantized without training, so that the report shows what QAT adds."""

from __future__ import annotations

import logging
from typing import Any, cast

import torch
from ultralytics.cfg import get_cfg
from ultralytics.nn.tasks import DetectionModel

from app.core.config import Config, UserError
from app.core.environment import utc_now
from app.core.files import sha256, write_json
from app.core.labels import FP16
from app.core.run import RunRoot, record_stage
from app.core.scheme import keep_scheme
from app.data.prepare import prepared
from app.quant.batchnorm import reestimate_batchnorm
from app.quant.health import signal_to_noise
from app.quant.model import cpu_state_dict, load_scored, names_of, save_checkpoint
from app.quant.schemes import quantize
from app.train.bn_images import BnImages
from app.train.device import check_devices
from app.train.done import is_quantized, ptq_labels
from app.train.loader import CocoDataset, dataset_of

log = logging.getLogger(__name__)


def ptq(config: Config, run: RunRoot, force: bool) -> None:
    """Quantizes runs/<name>/fp16 with the abs-max quantizers of quant.scheme, with every other option of quant off.

    Writes two checkpoints, as weights/best.pt with quant_config.json, health.json and done.json: ptq-<scheme> as it is,
    and ptq-<scheme>-bn with BatchNorm re-estimated afterwards. Export makes ONNX files of them.

    Raises:
        UserError: no trained FP16 baseline, or a result of another baseline or scheme without `force`.
    """
    if config.quant is None:
        raise UserError("ptq takes the scheme from quant.scheme: give it the configuration of a qat variant")
    source = run.finished(FP16)
    log.info("ptq %s: quantizing the weights of %s", config.quant.scheme, source)
    model, trained, checkpoint = load_scored(source)
    quant = config.quant.without_options()
    quant_config = quantize(model, quant)
    quantized = trained.model_copy(update={"variant": "qat", "quant": quant})
    facts = {"epoch": checkpoint["epoch"], "source_sha256": sha256(source), "names": names_of(checkpoint)}
    for label in ptq_labels(quant):
        if not force and is_quantized(run, label, facts["source_sha256"], quant.scheme):
            log.info("ptq %s: done already (%s)", label, run.best(label))
            continue
        if label.bn:
            machine = trained.train.model_copy(update={"device": config.train.device, "workers": config.train.workers})
            log.info("ptq %s: re-estimating BatchNorm on train images", label)
            prepared(run, config.data.coco_dir)  # `trained` names the place of then
            reestimate(model, trained.model_copy(update={"train": machine}), run, checkpoint["epoch"])
        folder = run.variant_dir(label)
        run.done(label).unlink(missing_ok=True)  # until all that it speaks for is written
        keep_scheme(quant.scheme, folder)
        write_json(folder / "quant_config.json", quant_config)
        write_json(folder / "health.json", {"epoch": checkpoint["epoch"] + 1, "snr_db": signal_to_noise(model)})
        save_checkpoint(run.best(label), quantized, {"scored": cpu_state_dict(model), **facts})
        done = {"source_sha256": facts["source_sha256"], "best_sha256": sha256(run.best(label))}
        write_json(run.done(label), {**done, "time_utc": utc_now()})
        record_stage(run, f"ptq {label}", done)
        log.info("ptq %s: %s, for 'make export'", label, run.best(label))


def reestimate(model: DetectionModel, config: Config, run: RunRoot, epoch: int) -> None:
    """Replaces BatchNorm's statistics by those over the train batches that the baseline's own came from after `epoch`.

    `epoch` counts from 0.
    """
    name = check_devices(config)[0]
    device = torch.device("cpu" if name == "cpu" else f"cuda:{name}")
    workers = 0 if name == "cpu" else config.train.workers  # as the trainer has it
    batches = bn_images(config, run, workers).after(epoch)
    with torch.no_grad():
        n_batches = reestimate_batchnorm(model.to(device), (images.to(device) / 255 for images in batches))
    log.info("ptq: BatchNorm re-estimated on %d train batches", n_batches)
    model.to("cpu")


def bn_images(config: Config, run: RunRoot, workers: int) -> BnImages:
    """The images that a training of `config` on the run's data re-estimates BatchNorm on."""
    provenance = prepared(run)
    train, data = config.train, dataset_of(run.dataset_yaml.parent.resolve(), provenance["names"])
    hyp = cast(Any, get_cfg(overrides={**config.hyp.model_dump(), "workers": workers}))
    dataset = CocoDataset(
        "train", data, provenance, train.seed, imgsz=train.imgsz, batch_size=train.batch, hyp=hyp, cache=None
    )
    return BnImages(dataset, hyp, config)
